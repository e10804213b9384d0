"""linear_logprob as torch sees it: operators over an engine, with fake kernels and an autograd formula.

Arguments are validated and flattened at the door (logprob.py). What the operators of a head share stands here too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mopo_kernels.backends.memory import new_empty
from mopo_kernels.checks import check_result
from mopo_kernels.head.call import Gradients, HeadCall, HeadInputs
from mopo_kernels.head.engines import Engine, can_keep, fused_gradients, make_engine
from mopo_kernels.head.plan import accumulate_dtype, compute_dtype, plan_for
from mopo_kernels.head.rows import Rows, count, rows_that_count
from mopo_kernels.head.tiles import TileEngine

Present = tuple[Tensor, Tensor, Tensor]  # gradients of hidden, weight and bias; [0] where not needed


def run_head_logprob(inputs: HeadInputs, call: HeadCall) -> Tensor:  # [N]
    """What `reference.head_logprob` computes, by an engine."""
    save = _what_to_save(inputs, call)
    forward = call if save == "grad_hidden" else call.on(call.backend)  # the gradients that the forward forms
    return head_logprob(*inputs, forward.flat(), save)[0]


def _what_to_save(inputs: HeadInputs, call: HeadCall) -> str:
    """What the forward leaves for the backward.

    "grad_hidden": ∂logp/∂hidden, which upstream gradients only scale row by row: where nothing else is asked for (a
    frozen head, LoRA) it is formed in the forward's pass. "logits": where they fit the workspace. Else "nothing".
    """
    needs_hidden, needs_weight, needs_bias = call.needs
    if not (needs_weight or needs_bias):
        return "grad_hidden" if needs_hidden else "nothing"
    return "logits" if can_keep(inputs, call) else "nothing"


@torch.library.custom_op("mopo_kernels::linear_logprob", mutates_args=())
def head_logprob(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    target: Tensor,  # [N]
    call: list[float],
    save: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """logp[N], lse[N] (float64) and what is saved: grad_hidden[N, H], logits[N, V] (counted rows first) or [0]."""
    inputs, options = HeadInputs(hidden, weight, bias, target.contiguous()), HeadCall.unflat(call)
    rows = rows_that_count(inputs.target, options.ignore_index)
    engine: Engine
    blocks: Sequence[Rows]
    logp = torch.zeros(target.shape, dtype=torch.float64, device=target.device)
    lse, saved = torch.zeros_like(logp), weight.new_empty(0)
    if save == "grad_hidden":
        engine, blocks = make_engine(inputs, options, rows, "fused")
        logp = fused_gradients(engine, inputs.target, blocks, lambda _, logp: torch.ones_like(logp))
        saved = present(engine.finish(), weight)[0]
    else:
        if save == "logits":
            saved = new_empty(weight, _kept_shape(target, weight, save), compute_dtype(weight))
            blocks = [rows] if count(rows) else []
            engine = TileEngine(inputs, options, plan_for(inputs, rows, options, "kept"), blocks=blocks, kept=saved)
        else:
            engine, blocks = make_engine(inputs, options, rows, "recompute")
        for block in blocks:
            statistics = engine.statistics(block)
            logp[block], lse[block] = statistics.logp, statistics.lse
    check_result(logp, hidden=hidden, weight=weight, bias=bias)
    return logp.to(accumulate_dtype(weight.dtype)), lse, saved


@head_logprob.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, call: list[float], save: str
) -> tuple[Tensor, Tensor, Tensor]:
    logp = hidden.new_empty(target.shape, dtype=accumulate_dtype(weight.dtype))
    lse = hidden.new_empty(target.shape, dtype=torch.float64)
    if save == "grad_hidden":
        return logp, lse, torch.empty_like(hidden, memory_format=torch.contiguous_format)
    dtype = compute_dtype(weight) if save == "logits" else weight.dtype
    return logp, lse, weight.new_empty(_kept_shape(target, weight, save), dtype=dtype)


def _kept_shape(target: Tensor, weight: Tensor, save: str) -> tuple[int, ...]:
    return (target.shape[0], weight.shape[0]) if save == "logits" else (0,)


@torch.library.custom_op("mopo_kernels::linear_logprob_backward", mutates_args=())
def head_logprob_backward(
    grad_logp: Tensor,  # [N]
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    lse: Tensor,  # [N]
    logits: Tensor,  # [N, V] or [0]
    call: list[float],
) -> Present:
    inputs, options = HeadInputs(hidden, weight, bias, target.contiguous()), HeadCall.unflat(call)
    rows = rows_that_count(inputs.target, options.ignore_index)
    engine: Engine
    blocks: Sequence[Rows]
    if logits.ndim == 2:
        plan, blocks = plan_for(inputs, rows, options, "kept"), [rows] if count(rows) else []
        engine = TileEngine(inputs, options, plan, blocks=blocks, kept=logits, holds=rows)
    else:
        engine, blocks = make_engine(inputs, options, rows, "recompute")
    coefficient = grad_logp.double().contiguous()
    for block in blocks:
        engine.add(block, lse[block], coefficient[block])
    return present(engine.finish(), weight)


@head_logprob_backward.register_fake
def _(
    grad_logp: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    lse: Tensor,
    logits: Tensor,
    call: list[float],
) -> Present:
    return fake_gradients(HeadInputs(hidden, weight, bias, target), call)


def present(gradients: Gradients, like: Tensor) -> Present:
    """Operators return tensors: an empty one stands for a gradient that nobody needs."""
    hidden, weight, bias = (like.new_empty(0) if x is None else x for x in gradients)
    return hidden, weight, bias


def fake_gradients(inputs: HeadInputs, call: list[float]) -> Present:
    hidden, weight, bias = (
        torch.empty_like(x, memory_format=torch.contiguous_format) if need and x is not None else None
        for x, need in zip(inputs[:3], HeadCall.unflat(call).needs, strict=True)
    )
    return present((hidden, weight, bias), inputs.weight)


def refuse_double_backward(operator: torch.library.CustomOpDef) -> None:
    """Make a second differentiation an error that says what to do."""

    def refuse(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError(
            "the fused log-probabilities are differentiable once; for gradients of gradients use backend='reference'"
        )

    operator.register_autograd(refuse)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden, weight, bias, target, ctx.call, ctx.save = inputs
    _, lse, saved = output
    ctx.mark_non_differentiable(lse, saved)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, bias, target, lse, saved)


def _backward(ctx: Any, grad_logp: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    hidden, weight, bias, target, lse, saved = ctx.saved_tensors
    grad_hidden = grad_weight = grad_bias = None
    if grad_logp is not None and ctx.save == "grad_hidden":
        grad_hidden = _scale_rows(saved, grad_logp, hidden)
    elif grad_logp is not None:
        needs = ctx.needs_input_grad[:3]
        call = HeadCall.unflat(ctx.call)
        flat = call.on(call.backend, needs).flat()
        gradients = head_logprob_backward(grad_logp, hidden, weight, bias, target, lse, saved, flat)
        grad_hidden, grad_weight, grad_bias = (x if need else None for x, need in zip(gradients, needs, strict=True))
    return grad_hidden, grad_weight, grad_bias, None, None, None


@torch.library.custom_op("mopo_kernels::scale_rows", mutates_args=())
def _scale_rows(gradient: Tensor, scale: Tensor, hidden: Tensor) -> Tensor:
    """gradient · scale per row: an operator, and one of hidden, so that a second differentiation is refused."""
    return gradient * scale.unsqueeze(-1).to(gradient.dtype)


@_scale_rows.register_fake
def _(gradient: Tensor, scale: Tensor, hidden: Tensor) -> Tensor:
    return torch.empty_like(gradient)


head_logprob.register_autograd(_backward, setup_context=_save)
refuse_double_backward(head_logprob_backward)
refuse_double_backward(_scale_rows)
