"""Contestants of the GPU report, each behind its own entry point, and how they are timed: in turn, with a cold L2.

A contestant is a function of the inputs that gives a call to repeat; peers are imported when they enter, so that a
missing one is a line of the report. CCE leaves out small gradients unless told otherwise, so it enters twice.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch
from mopo_kernels.roofline import Run, peak_bytes, time_once
from mopo_kernels.workloads import WORKLOADS, Sizes, forward_and_backward
from torch import Tensor
from torch._functorch import config as functorch
from torch.nn import functional as F

ROUNDS = 5
SECONDS = 20.0  # after which a contest has no more rounds, if it has had MIN_ROUNDS
MIN_ROUNDS = 2


class Contestant(NamedTuple):
    """Who does the work of a workload, and how."""

    name: str
    workload: str
    bind: Callable[..., Run]


def hold(contestants: list[Contestant], sizes: Sizes, *, rounds: int = ROUNDS) -> Iterator[dict[str, Any]]:
    """Time contestants of workloads that have the same inputs; one that fails is reported and leaves the rest alone."""
    inputs = WORKLOADS[contestants[0].workload].inputs(sizes)
    cold = _cold_cache(sizes.device)
    calls, results = {}, {}
    for contestant in contestants:
        results[contestant] = _result(contestant, sizes)
        try:
            call = contestant.bind(*inputs)
            call()  # compiles kernels, chooses algorithms
            results[contestant]["peak_bytes"] = peak_bytes(call, sizes.device)
            calls[contestant] = call
        except Exception as error:
            results[contestant]["error"] = reason(error)
        _forget(*inputs)
    start = time.monotonic()
    for done in range(rounds):
        if done >= MIN_ROUNDS and time.monotonic() - start > SECONDS:
            break
        for contestant, call in list(calls.items()):
            cold()
            try:
                results[contestant]["rounds"].append(time_once(call, sizes.device))
            except Exception as error:
                results[contestant]["error"] = reason(error)
                del calls[contestant]
    for result in results.values():
        if result["rounds"] and "error" not in result:
            result["seconds"] = median(result["rounds"])
        yield result


def reason(error: BaseException) -> str:
    """One line: out of memory, or what kind of error says what."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"


def _result(contestant: Contestant, sizes: Sizes) -> dict[str, Any]:
    n, h, v, *_ = sizes
    work = WORKLOADS[contestant.workload].work(sizes)
    return {
        "kind": "time",
        **{"name": contestant.name, "workload": contestant.workload, "sizes": [n, h, v]},
        **{"flops": work.flops, "bytes": work.bytes, "rounds": []},
    }


def _cold_cache(device: torch.device) -> Callable[[], object]:
    """Overwrites L2; while that runs, the host gets ahead of the device, as it does in training."""
    if device.type != "cuda":
        return lambda: None
    size = 4 * torch.cuda.get_device_properties(device).L2_cache_size
    return torch.empty(size, dtype=torch.uint8, device=device).zero_


def _forget(*inputs: Tensor) -> None:
    """Gradients and cached memory that a failed contestant left behind."""
    for x in inputs:
        x.grad = None
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ---------------------------------------------------------------------------------------------------------- LM heads


def ours(workload: str, backend: str | None = None) -> Contestant:
    name = workload if backend is None else f"{workload}, {backend}"
    return Contestant(name, workload, partial(WORKLOADS[workload].bind, backend))


def heads(*, compiler: str) -> list[Contestant]:
    """Ours by the table's choice and by each backend, then the peers' forward and backward."""
    peer = partial(Contestant, workload="linear_logprob")
    return [
        *(ours("mopo_loss", backend) for backend in (None, "cuda", "triton", "cut")),
        *(ours("linear_logprob", backend) for backend in (None, "cuda", "triton", "cut")),
        ours("linear_logprob_rows"),
        *(ours("linear_logprob_forward", backend) for backend in (None, "cut")),
        *(ours("frozen_head", backend) for backend in (None, "cut")),
        peer("CCE", bind=_cce("high")),
        peer("CCE, all gradients", bind=_cce(None)),
        peer("Liger", bind=_liger),
        peer("torch linear_cross_entropy", bind=_torch_linear_cross_entropy),
        peer("torch.compile", bind=_compiled(_eager_loss, compiler)),
        peer("eager", bind=_losses(_eager_loss)),
    ]


def _eager_loss(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), target, reduction="sum")


def _losses(loss: Callable[..., Tensor]) -> Callable[..., Run]:
    def bind(*inputs: Tensor) -> Run:
        return forward_and_backward(lambda: loss(*inputs), *(x for x in inputs if x.requires_grad))

    return bind


def _compiled(loss: Callable[..., Tensor], compiler: str) -> Callable[..., Run]:
    def bind(*inputs: Tensor) -> Run:
        torch._dynamo.reset()  # or the eighth size is one too many
        return _losses(torch.compile(loss, dynamic=False, backend=compiler))(*inputs)

    return bind


def _torch_linear_cross_entropy(*inputs: Tensor) -> Run:
    return _losses(partial(F.linear_cross_entropy, reduction="sum"))(*inputs)


def _cce(filter_eps: str | None) -> Callable[..., Run]:
    def bind(*inputs: Tensor) -> Run:
        from cut_cross_entropy import linear_cross_entropy

        return _losses(partial(linear_cross_entropy, reduction="sum", filter_eps=filter_eps))(*inputs)

    return bind


def _liger(hidden: Tensor, weight: Tensor, target: Tensor) -> Run:
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")
    return forward_and_backward(lambda: loss(weight, hidden, target), hidden, weight)


# ------------------------------------------------------------------------------------------------------- from logits


def token_ops(*, compiler: str) -> list[Contestant]:
    forward = partial(Contestant, workload="token_logprob")
    backward = partial(Contestant, workload="token_logprob_backward")
    functorch.donated_buffer = False  # a graph's backward is timed again and again
    compiled = torch.compile(_eager_rows, dynamic=True, backend=compiler)
    return [
        *(ours("token_logprob", backend) for backend in (None, "cuda", "triton")),
        *(ours("token_logprob_backward", backend) for backend in (None, "cuda", "triton")),
        forward("eager", bind=_forward_of(_eager_rows)),
        forward("torch.compile", bind=_forward_of(compiled)),
        backward("eager, backward", bind=_backward_of(_eager_rows)),
        backward("torch.compile, backward", bind=_backward_of(compiled)),
    ]


def _eager_rows(logits: Tensor, target: Tensor) -> Tensor:
    return -F.cross_entropy(logits.float(), target, reduction="none")


def _forward_of(rows: Callable[..., Tensor]) -> Callable[..., Run]:
    return lambda logits, target: partial(rows, logits.detach(), target)


def _backward_of(rows: Callable[..., Tensor]) -> Callable[..., Run]:
    def bind(logits: Tensor, target: Tensor) -> Run:
        logp = rows(logits, target)
        upstream = torch.ones_like(logp)
        return lambda: torch.autograd.grad(logp, logits, upstream, retain_graph=True)

    return bind
