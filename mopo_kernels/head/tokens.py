"""token_logprob as torch sees it: the fold kernels on logits that exist already, one read in the forward.

The backward writes its result elsewhere, so logits that another operator has saved stay as they are; where the caller
gives the logits away it overwrites them, and torch's version counter tells whoever saved them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mopo_kernels import backends
from mopo_kernels.backends import transforms
from mopo_kernels.backends.fold import Statistics, Tile
from mopo_kernels.backends.reference import RowValues
from mopo_kernels.checks import check_result
from mopo_kernels.head.call import HeadCall
from mopo_kernels.head.ops import no_values, refuse_double_backward, returned, row_values, upstream_of
from mopo_kernels.head.plan import accumulate_dtype


def run_logits_logprob(
    logits: Tensor,  # [N, V]
    target: Tensor,  # [N]
    call: HeadCall,
    *,
    overwrite_logits: bool,
) -> RowValues:
    """What `reference.logits_rows` computes, by the fold kernels."""
    overwrite = overwrite_logits and not torch.compiler.is_compiling()  # a compiler plans memory itself
    return RowValues(*logits_logprob(logits, target, call.flat(), overwrite))


@torch.library.custom_op("mopo_kernels::token_logprob", mutates_args=())
def logits_logprob(
    logits: Tensor,  # [N, V]
    target: Tensor,  # [N]
    call: list[float],
    overwrite: bool,  # the logits, by the backward
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `head_logprob` says of rows, reading the logits of those that count once."""
    options = HeadCall.unflat(call)
    ignored = target == options.ignore_index
    statistics = Statistics.start(target.shape[0], target.device, entropy=options.outputs.entropy)
    tile = Tile(_row_major(logits), target.masked_fill(ignored, -1), options.transform)
    backends.fold(options.backend).fold_statistics(tile, statistics)
    values = row_values(statistics, options.outputs)
    values = RowValues(*(x if len(x) == 0 else x.masked_fill(ignored, 0) for x in values))
    check_result(values.logp, logits=logits)
    return returned(values, accumulate_dtype(logits.dtype))


@logits_logprob.register_fake
def _(logits: Tensor, target: Tensor, call: list[float], overwrite: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return returned(no_values(target, HeadCall.unflat(call).outputs), accumulate_dtype(logits.dtype))


@torch.library.custom_op("mopo_kernels::token_logprob_backward", mutates_args=())
def logits_logprob_backward(
    upstream: Tensor,  # [1, N] by logp, or [2, N] by logp and lse
    logits: Tensor,  # [N, V]
    target: Tensor,  # [N]
    lse: Tensor,  # [N]
    call: list[float],
) -> Tensor:  # [N, V]
    grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
    _fold_gradient(upstream, _row_major(logits), target, lse, call, grad)
    return grad


@logits_logprob_backward.register_fake
def _(upstream: Tensor, logits: Tensor, target: Tensor, lse: Tensor, call: list[float]) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@torch.library.custom_op("mopo_kernels::token_logprob_overwrite", mutates_args=("logits",))
def logits_logprob_overwrite(
    upstream: Tensor,  # [1, N] by logp, or [2, N] by logp and lse
    logits: Tensor,  # [N, V], row-major
    target: Tensor,  # [N]
    lse: Tensor,  # [N]
    call: list[float],
) -> None:
    """logits ← their gradient."""
    _fold_gradient(upstream, logits, target, lse, call, logits)


@logits_logprob_overwrite.register_fake
def _(upstream: Tensor, logits: Tensor, target: Tensor, lse: Tensor, call: list[float]) -> None:
    return None


def _fold_gradient(
    upstream: Tensor, logits: Tensor, target: Tensor, lse: Tensor, call: list[float], out: Tensor
) -> None:
    options = HeadCall.unflat(call)
    coefficient, *of_lse = upstream.double().masked_fill(target == options.ignore_index, 0)
    tile = Tile(logits, target.contiguous(), options.transform)
    backends.fold(options.backend).fold_gradient(tile, lse, coefficient, out, *of_lse)


def _row_major(logits: Tensor) -> Tensor:
    """Rows may lie anywhere apart, but a row's elements side by side."""
    whole_rows = logits.stride(1) == 1 and logits.stride(0) >= logits.shape[1]
    return logits if whole_rows else logits.contiguous()


def _save_logits(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, target, ctx.call, ctx.overwrite = inputs
    _, lse, entropy, hit = output
    ctx.mark_non_differentiable(entropy, hit)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, target, lse)


def _logits_backward(
    ctx: Any, grad_logp: Tensor | None, grad_lse: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    if grad_logp is None and grad_lse is None:
        return None, None, None, None
    logits, target, lse = ctx.saved_tensors
    upstream = upstream_of(grad_logp, grad_lse)
    if ctx.overwrite and not torch.is_grad_enabled() and not transforms.is_batched(upstream):
        grad = _row_major(logits.detach())
        logits_logprob_overwrite(upstream, grad, target, lse, ctx.call)
    else:
        grad = logits_logprob_backward(upstream, logits, target, lse, ctx.call)
    return grad, None, None, None


logits_logprob.register_autograd(_logits_backward, setup_context=_save_logits)
refuse_double_backward(logits_logprob_backward)
