"""linear_logprob as torch sees it: operators over the tile engine, with fake kernels and an autograd formula.

Arguments are validated and flattened by logprob.py; `backend` names a module of the fold contract. What the operators
of a head share stands here too (policy_ops.py, token_ops.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mopo_kernels import backends
from mopo_kernels.backends.cpu import on_huge_pages
from mopo_kernels.backends.fold import Transform
from mopo_kernels.plan import (
    Logits,
    Plan,
    accumulate_dtype,
    cache_of,
    cut_plan,
    default_workspace,
    fits_kept,
    plan,
    seconds,
)
from mopo_kernels.rates import rates_of
from mopo_kernels.tiles import GradientSum, Head, Rows, count, fused_gradients, gather, rows_that_count, split

Gradients = tuple[Tensor, Tensor, Tensor]  # of hidden, weight and bias; [0] where not needed


def backend_for(hidden: Tensor, weight: Tensor, backend: str | None, workspace_bytes: int | None) -> str:
    """The table's choice, or the cut kernels where nobody asks for another and rates measured here are for them."""
    choice = backends.choose("linear_logprob", hidden.device.type, backend, weight.dtype)
    rates = rates_of(hidden.device, weight.dtype)
    if rates is None or choice.requested or choice.backend == "reference" or backends.cut.UNAVAILABLE:
        return choice.backend
    rows, (vocab, hidden_size) = hidden.shape[:-1].numel(), weight.shape
    workspace_bytes = default_workspace(hidden.device) if workspace_bytes is None else workspace_bytes
    tiles = plan_for(slice(0, rows), weight, choice.backend, workspace_bytes, "fused")
    by_tiles, by_cut = seconds(rows, hidden_size, vocab, weight.itemsize, tiles, rates)
    return "cut" if by_cut < by_tiles else choice.backend


def plan_for(
    rows: Rows, weight: Tensor, backend: str, workspace_bytes: int, logits: Logits, *, filtered: bool = False
) -> Plan:
    vocab, hidden_size = weight.shape
    if backend == "cut":
        return cut_plan(count(rows), hidden_size, weight.dtype)
    return plan(
        count(rows),
        hidden_size,
        vocab,
        dtype=weight.dtype,
        compute=compute_for(weight, backend),
        workspace_bytes=workspace_bytes,
        logits=logits,
        gathered=not isinstance(rows, slice),
        filtered=filtered,
        cache_bytes=cache_of(weight.device, logits),
    )


def compute_for(weight: Tensor, backend: str) -> torch.dtype:
    """What the products run in."""
    is_widened = backend != "cut" and weight.dtype in backends.fold(backend).WIDENED
    return torch.float32 if is_widened else weight.dtype


def head_for(
    weight: Tensor,
    bias: Tensor | None,
    scales: list[float],
    backend: str,
    plan: Plan,
    grad_filter: float | None = None,
) -> Head:
    wide_bias = None if bias is None else bias.to(accumulate_dtype(weight.dtype)).contiguous()
    return Head(weight, wide_bias, transform_of(scales), backend, plan, grad_filter)


def scales_of(temperature: float, softcap: float | None, logit_scale: float = 1.0) -> list[float]:
    """A Transform as floats, the form that a torch operator can take."""
    return [float(x) for x in Transform.of(temperature, softcap, logit_scale)]


def transform_of(scales: list[float]) -> Transform:
    inner, outer, softcap = scales
    return Transform(inner, outer, bool(softcap))


def refuse_double_backward(operator: torch.library.CustomOpDef) -> None:
    """Make a second differentiation an error that says what to do."""

    def refuse(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError(
            "the fused log-probabilities are differentiable once; for gradients of gradients use backend='reference'"
        )

    operator.register_autograd(refuse)


def run_linear_logprob(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    target: Tensor,  # [N]
    *,
    bias: Tensor | None,  # [V]
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    grad_filter: float | None,
    workspace_bytes: int | None,
    backend: str,
) -> Tensor:  # [N]
    """What `reference.linear_logprob` computes, by the tile engine."""
    workspace_bytes = default_workspace(hidden.device) if workspace_bytes is None else workspace_bytes
    scales = scales_of(temperature, softcap, logit_scale)
    save = _what_to_save(hidden, weight, bias, target, grad_filter, workspace_bytes, backend)
    return linear_logprob(
        hidden, weight, bias, target, scales, ignore_index, grad_filter, workspace_bytes, save, backend
    )[0]


def _what_to_save(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    grad_filter: float | None,
    workspace_bytes: int,
    backend: str,
) -> str:
    """What the forward leaves for the backward.

    "grad_hidden": ∂logp/∂hidden, which upstream gradients only scale row by row: where nothing else is asked for (a
    frozen head, LoRA) it is formed in the forward's pass. "logits": where they fit the workspace. Else "nothing".
    """
    others = weight.requires_grad or (bias is not None and bias.requires_grad)
    if not torch.is_grad_enabled() or not (hidden.requires_grad or others):
        return "nothing"
    if not others:
        return "grad_hidden"
    if backend == "cut":
        return "nothing"
    fits = fits_kept(
        *(target.shape[0], weight.shape[1], weight.shape[0]),
        dtype=weight.dtype,
        compute=compute_for(weight, backend),
        workspace_bytes=workspace_bytes,
        filtered=grad_filter is not None,
    )
    return "logits" if fits else "nothing"


@torch.library.custom_op("mopo_kernels::linear_logprob", mutates_args=())
def linear_logprob(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    target: Tensor,  # [N]
    scales: list[float],
    ignore_index: int,
    grad_filter: float | None,
    workspace_bytes: int,
    save: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """logp[N], lse[N] (float64) and what is saved: grad_hidden[N, H], logits[N, V] (counted rows first) or [0]."""
    target = target.contiguous()
    rows = rows_that_count(target, ignore_index)
    plan = plan_for(rows, weight, backend, workspace_bytes, _PLANS[save], filtered=grad_filter is not None)
    head = head_for(weight, bias, scales, backend, plan, grad_filter)
    logp = torch.zeros(target.shape, dtype=torch.float64, device=target.device)
    lse = torch.zeros_like(logp)
    dtype = accumulate_dtype(weight.dtype)
    parts = split(rows, plan.row_block)
    if save == "grad_hidden":
        sums = GradientSum(head, hidden, needs=(True, False, False), blocks=len(parts))
        logp = fused_gradients(head, hidden, target, parts, lambda _, logp: torch.ones_like(logp), sums)
        return logp.to(dtype), lse, present(sums.finish(bias), weight)[0]
    logits = on_huge_pages(weight.new_empty(_kept_shape(target, weight, save), dtype=plan.compute))
    tile = logits if save == "logits" else head.tile(count(rows))
    for part in parts:
        statistics = head.statistics(gather(head, hidden, part), target[part], tile)
        logp[part], lse[part] = statistics.logp, statistics.lse
    return logp.to(dtype), lse, logits


@linear_logprob.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    scales: list[float],
    ignore_index: int,
    grad_filter: float | None,
    workspace_bytes: int,
    save: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    logp = hidden.new_empty(target.shape, dtype=accumulate_dtype(weight.dtype))
    lse = hidden.new_empty(target.shape, dtype=torch.float64)
    if save == "grad_hidden":
        return logp, lse, torch.empty_like(hidden, memory_format=torch.contiguous_format)
    return logp, lse, weight.new_empty(_kept_shape(target, weight, save), dtype=compute_for(weight, backend))


_PLANS: dict[str, Logits] = {"grad_hidden": "fused", "logits": "kept", "nothing": "recompute"}


def _kept_shape(target: Tensor, weight: Tensor, save: str) -> tuple[int, ...]:
    return (target.shape[0], weight.shape[0]) if save == "logits" else (0,)


@torch.library.custom_op("mopo_kernels::linear_logprob_backward", mutates_args=())
def linear_logprob_backward(
    grad_logp: Tensor,  # [N]
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    lse: Tensor,  # [N]
    logits: Tensor,  # [N, V] or [0]
    needs: list[bool],  # gradients of hidden, weight, bias
    scales: list[float],
    ignore_index: int,
    grad_filter: float | None,
    workspace_bytes: int,
    backend: str,
) -> Gradients:
    target = target.contiguous()
    rows = rows_that_count(target, ignore_index)
    keep, filtered = logits.ndim == 2, grad_filter is not None
    plan = plan_for(rows, weight, backend, workspace_bytes, "kept" if keep else "recompute", filtered=filtered)
    head = head_for(weight, bias, scales, backend, plan, grad_filter)
    parts = split(rows, plan.row_block)
    sums = GradientSum(head, hidden, needs=needs, blocks=len(parts))
    tile = logits if keep else head.tile(count(rows))
    out = logits.new_empty(count(rows), plan.column_block) if keep else None
    coefficient = grad_logp.double().contiguous()
    for part in parts:
        sums.add(part, gather(head, hidden, part), target[part], lse[part], coefficient[part], tile, out=out)
    return present(sums.finish(bias), weight)


@linear_logprob_backward.register_fake
def _(
    grad_logp: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    lse: Tensor,
    logits: Tensor,
    needs: list[bool],
    scales: list[float],
    ignore_index: int,
    grad_filter: float | None,
    workspace_bytes: int,
    backend: str,
) -> Gradients:
    return fake_gradients(hidden, weight, bias, needs)


def present(gradients: tuple[Tensor | None, Tensor | None, Tensor | None], like: Tensor) -> Gradients:
    """Operators return tensors: an empty one stands for a gradient that nobody needs."""
    hidden, weight, bias = (like.new_empty(0) if x is None else x for x in gradients)
    return hidden, weight, bias


def fake_gradients(hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: list[bool]) -> Gradients:
    inputs = (hidden, weight, bias)
    made_hidden, made_weight, made_bias = (
        torch.empty_like(x, memory_format=torch.contiguous_format) if need and x is not None else None
        for x, need in zip(inputs, needs, strict=True)
    )
    return present((made_hidden, made_weight, made_bias), weight)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden, weight, bias, target, *options = inputs
    _, lse, saved = output
    ctx.mark_non_differentiable(lse, saved)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, bias, target, lse, saved)
    ctx.options = options


def _backward(ctx: Any, grad_logp: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad_logp is None:
        return (None,) * 10
    hidden, weight, bias, target, lse, saved = ctx.saved_tensors
    scales, ignore_index, grad_filter, workspace_bytes, save, backend = ctx.options
    if save == "grad_hidden":
        return _scale_rows(saved, grad_logp, hidden), *(None,) * 9
    needs = list(ctx.needs_input_grad[:3])
    gradients = linear_logprob_backward(
        *(grad_logp, hidden, weight, bias, target, lse, saved, needs),
        *(scales, ignore_index, grad_filter, workspace_bytes, backend),
    )
    return *(x if need else None for x, need in zip(gradients, needs, strict=True)), *(None,) * 7


@torch.library.custom_op("mopo_kernels::scale_rows", mutates_args=())
def _scale_rows(gradient: Tensor, scale: Tensor, hidden: Tensor) -> Tensor:
    """gradient · scale per row: an operator, and one of hidden, so that a second differentiation is refused."""
    return gradient * scale.unsqueeze(-1).to(gradient.dtype)


@_scale_rows.register_fake
def _(gradient: Tensor, scale: Tensor, hidden: Tensor) -> Tensor:
    return torch.empty_like(gradient)


linear_logprob.register_autograd(_backward, setup_context=_save)
refuse_double_backward(linear_logprob_backward)
refuse_double_backward(_scale_rows)
