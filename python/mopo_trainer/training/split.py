"""Weights of which every process holds a part: FSDP's DTensors, and ZeRO-3's, which are empty outside their module."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel


def is_zero3(parameter: Tensor) -> bool:
    """Whether DeepSpeed's ZeRO-3 has this parameter."""
    return hasattr(parameter, "ds_id")


def whole(x: Tensor) -> Tensor:
    """All of a tensor that processes may share: all of them ask for it together."""
    if isinstance(x, DTensor):
        return x.full_tensor().detach()
    if is_zero3(x):
        with _gathered(x):
            return x.detach().clone()
    return x.detach()


def whole_shape(x: Tensor) -> torch.Size:
    """The shape that `whole` would have."""
    return getattr(x, "ds_shape", x.shape)


def parameter_count(model: PreTrainedModel) -> int:
    """Parameters beside embeddings."""
    if not any(map(is_zero3, model.parameters())):
        return model.num_parameters(exclude_embeddings=True)
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return sum(whole_shape(p).numel() for p in model.parameters() if id(p) not in embeddings)


@contextmanager
def gathered_passes(model: nn.Module) -> Iterator[None]:
    """While open, a model that ZeRO-3 split as it was loaded runs forward: one module at a time is whole.

    In training its engine does so; before, nobody does.
    """
    handles = []
    for module in model.modules():
        if parameters := [p for p in module.parameters(recurse=False) if is_zero3(p)]:
            handles += _gather_for_forward(module, parameters)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _gather_for_forward(module: nn.Module, parameters: list[nn.Parameter]) -> list[Any]:
    contexts: list[Any] = []

    def before(*_: Any) -> None:
        contexts.append(_gathered(*parameters))
        contexts[-1].__enter__()

    def after(*_: Any) -> None:
        contexts.pop().__exit__(None, None, None)

    return [module.register_forward_pre_hook(before), module.register_forward_hook(after, always_call=True)]


def _gathered(*parameters: Tensor) -> Any:
    from deepspeed import zero  # optional dependency

    return zero.GatheredParameters(list(parameters))
