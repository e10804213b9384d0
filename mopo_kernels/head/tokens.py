"""token_logprob as torch sees it: the fold kernels on logits that exist already, one read in the forward.

The backward writes its result elsewhere, so logits that another operator has saved stay as they are; where the caller
gives the logits away it overwrites them, and torch's version counter tells whoever saved them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mopo_kernels import backends
from mopo_kernels.backends.fold import Statistics
from mopo_kernels.head_ops import refuse_double_backward, scales_of, transform_of
from mopo_kernels.plan import accumulate_dtype


def run_token_logprob(
    logits: Tensor,  # [N, V]
    target: Tensor,  # [N]
    *,
    temperature: float,
    softcap: float | None,
    ignore_index: int,
    overwrite_logits: bool,
    backend: str,
) -> Tensor:  # [N]
    """What `reference.token_logprob` computes, by the fold kernels."""
    overwrite = overwrite_logits and not torch.compiler.is_compiling()  # a compiler plans memory itself
    return token_logprob(logits, target, scales_of(temperature, softcap), ignore_index, overwrite, backend)[0]


@torch.library.custom_op("mopo_kernels::token_logprob", mutates_args=())
def token_logprob(
    logits: Tensor,  # [N, V]
    target: Tensor,  # [N]
    scales: list[float],
    ignore_index: int,
    overwrite: bool,  # the logits, by the backward
    backend: str,
) -> tuple[Tensor, Tensor]:
    """logp[N] and lse[N] (float64), reading the logits of counted rows once."""
    fold, transform = backends.fold(backend), transform_of(scales)
    statistics = Statistics.start(target.shape[0], target.device)
    fold.fold_statistics(_row_major(logits), _skipping(target, ignore_index), statistics, transform)
    counts = target != ignore_index
    logp = torch.where(counts, statistics.logp, 0).to(accumulate_dtype(logits.dtype))
    return logp, torch.where(counts, statistics.lse, 0)


@token_logprob.register_fake
def _(
    logits: Tensor, target: Tensor, scales: list[float], ignore_index: int, overwrite: bool, backend: str
) -> tuple[Tensor, Tensor]:
    logp = logits.new_empty(target.shape, dtype=accumulate_dtype(logits.dtype))
    return logp, logits.new_empty(target.shape, dtype=torch.float64)


@torch.library.custom_op("mopo_kernels::token_logprob_backward", mutates_args=())
def token_logprob_backward(
    grad_logp: Tensor,  # [N]
    logits: Tensor,  # [N, V]
    target: Tensor,  # [N]
    lse: Tensor,  # [N]
    scales: list[float],
    ignore_index: int,
    backend: str,
) -> Tensor:  # [N, V]
    grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
    _fold_gradient(grad_logp, _row_major(logits), target, lse, scales, ignore_index, backend, grad)
    return grad


@token_logprob_backward.register_fake
def _(
    grad_logp: Tensor,
    logits: Tensor,
    target: Tensor,
    lse: Tensor,
    scales: list[float],
    ignore_index: int,
    backend: str,
) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@torch.library.custom_op("mopo_kernels::token_logprob_overwrite", mutates_args=("logits",))
def token_logprob_overwrite(
    grad_logp: Tensor,  # [N]
    logits: Tensor,  # [N, V], row-major
    target: Tensor,  # [N]
    lse: Tensor,  # [N]
    scales: list[float],
    ignore_index: int,
    backend: str,
) -> None:
    """logits ← their gradient."""
    _fold_gradient(grad_logp, logits, target, lse, scales, ignore_index, backend, None)


@token_logprob_overwrite.register_fake
def _(
    grad_logp: Tensor,
    logits: Tensor,
    target: Tensor,
    lse: Tensor,
    scales: list[float],
    ignore_index: int,
    backend: str,
) -> None:
    return None


def _fold_gradient(
    grad_logp: Tensor,
    logits: Tensor,
    target: Tensor,
    lse: Tensor,
    scales: list[float],
    ignore_index: int,
    backend: str,
    out: Tensor | None,
) -> None:
    coefficient = torch.where(target != ignore_index, grad_logp.double(), 0)
    transform = transform_of(scales)
    backends.fold(backend).fold_gradient(logits, target.contiguous(), lse, coefficient, transform, out=out)


def _row_major(logits: Tensor) -> Tensor:
    """Rows may lie anywhere apart, but a row's elements side by side."""
    whole_rows = logits.stride(1) == 1 and logits.stride(0) >= logits.shape[1]
    return logits if whole_rows else logits.contiguous()


def _skipping(target: Tensor, ignore_index: int) -> Tensor:
    """Targets of the fold contract, where rows that do not count are negative."""
    return target.masked_fill(target == ignore_index, -1)


def _save_logits(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, target, *options = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, target, output[1])
    ctx.options = options


def _logits_backward(ctx: Any, grad_logp: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad_logp is None:
        return (None,) * 6
    logits, target, lse = ctx.saved_tensors
    scales, ignore_index, overwrite, backend = ctx.options
    if overwrite and not torch.is_grad_enabled():
        grad = _row_major(logits.detach())
        token_logprob_overwrite(grad_logp, grad, target, lse, scales, ignore_index, backend)
    else:
        grad = token_logprob_backward(grad_logp, logits, target, lse, scales, ignore_index, backend)
    return grad, *(None,) * 5


token_logprob.register_autograd(_logits_backward, setup_context=_save_logits)
refuse_double_backward(token_logprob_backward)
