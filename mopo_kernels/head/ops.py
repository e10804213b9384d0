"""linear_logprob as torch sees it: operators over an engine, with fake kernels and an autograd formula.

Arguments are validated and flattened at the door (logprob.py). What the operators of a head share stands here too.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from mopo_kernels.backends.fold import Statistics
from mopo_kernels.backends.memory import new_empty
from mopo_kernels.backends.reference import RowValues
from mopo_kernels.checks import check_result
from mopo_kernels.head.call import Gradients, HeadCall, HeadInputs, Outputs
from mopo_kernels.head.engines import can_keep, fused_gradients, make_engine, make_kept_engine
from mopo_kernels.head.plan import accumulate_dtype, compute_dtype
from mopo_kernels.head.rows import Rows, rows_that_count

Present = tuple[Tensor, Tensor, Tensor]  # gradients of hidden, weight and bias; [0] where not needed


def row_values(statistics: Statistics, outputs: Outputs) -> RowValues:
    """What is said of rows, in the arithmetic of their statistics."""
    logp, lse = statistics.logp, statistics.lse
    entropy = statistics.entropy if outputs.entropy else logp.new_empty(0)
    return RowValues(logp, lse, entropy, statistics.hit if outputs.hit else logp.new_empty(0, dtype=torch.bool))


def no_values(target: Tensor, outputs: Outputs) -> RowValues:
    """Zeros of all rows, before any is recorded."""
    logp, lse = (torch.zeros(target.shape, dtype=torch.float64, device=target.device) for _ in range(2))
    entropy = torch.zeros_like(logp) if outputs.entropy else logp.new_empty(0)
    return RowValues(logp, lse, entropy, torch.zeros_like(logp if outputs.hit else logp[:0], dtype=torch.bool))


def returned(values: RowValues, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As an operator returns them: lse keeps the precision that its backward needs."""
    return values.logp.to(dtype), values.lse, values.entropy.to(dtype), values.hit


def run_head_logprob(inputs: HeadInputs, call: HeadCall) -> RowValues:
    """What `reference.head_rows` computes, by an engine."""
    save = _what_to_save(inputs, call)
    forward = call if save == "grad_hidden" else call.on(call.backend)  # the gradients that the forward forms
    return RowValues(*head_logprob(*inputs, forward.flat(), save)[:4])


def _what_to_save(inputs: HeadInputs, call: HeadCall) -> str:
    """What the forward leaves for the backward.

    "grad_hidden": ∂logp/∂hidden, which upstream gradients only scale row by row: where nothing else is asked for (a
    frozen head, LoRA) it is formed in the forward's pass; lse has another one. "logits": where they fit the workspace.
    Else "nothing".
    """
    needs_hidden, needs_weight, needs_bias = call.needs
    if not (needs_weight or needs_bias or (needs_hidden and call.outputs.lse)):
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """logp[N], lse[N] (float64), entropy[N] and hit[N], which are [0] where nobody asks, and what is saved.

    That is grad_hidden[N, H], logits[N, V] (counted rows first) or [0].
    """
    inputs, options = HeadInputs(hidden, weight, bias, target.contiguous()), HeadCall.unflat(call)
    rows = rows_that_count(inputs.target, options.ignore_index)
    values, saved = no_values(target, options.outputs), weight.new_empty(0)

    def record(rows: Rows, statistics: Statistics) -> None:
        for whole, part in zip(values, row_values(statistics, options.outputs), strict=True):
            if len(whole) > 0:
                whole[rows] = part

    if save == "grad_hidden":
        engine, blocks = make_engine(inputs, options, rows, "fused")
        fused_gradients(engine, inputs.target, blocks, lambda _, logp: torch.ones_like(logp), record)
        saved = present(engine.finish(), weight)[0]
    else:
        if save == "logits":
            saved = new_empty(weight, _kept_shape(target, weight, save), compute_dtype(weight))
            engine, blocks = make_kept_engine(inputs, options, rows, saved, is_filled=False)
        else:
            engine, blocks = make_engine(inputs, options, rows, "recompute")
        for block in blocks:
            record(block, engine.statistics(block))
    check_result(values.logp, is_split=options.shard is not None, hidden=hidden, weight=weight, bias=bias)
    return *returned(values, accumulate_dtype(weight.dtype)), saved


@head_logprob.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, call: list[float], save: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows = returned(no_values(target, HeadCall.unflat(call).outputs), accumulate_dtype(weight.dtype))
    if save == "grad_hidden":
        return *rows, torch.empty_like(hidden, memory_format=torch.contiguous_format)
    dtype = compute_dtype(weight) if save == "logits" else weight.dtype
    return *rows, weight.new_empty(_kept_shape(target, weight, save), dtype=dtype)


def _kept_shape(target: Tensor, weight: Tensor, save: str) -> tuple[int, ...]:
    return (target.shape[0], weight.shape[0]) if save == "logits" else (0,)


@torch.library.custom_op("mopo_kernels::linear_logprob_backward", mutates_args=())
def head_logprob_backward(
    upstream: Tensor,  # [1, N] by logp, or [2, N] by logp and lse
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
    if logits.ndim == 2:
        engine, blocks = make_kept_engine(inputs, options, rows, logits, is_filled=True)
    else:
        engine, blocks = make_engine(inputs, options, rows, "recompute")
    coefficients = upstream.double().contiguous()
    for block in blocks:
        engine.add(block, lse[block], *(x[block] for x in coefficients))
    return present(engine.finish(), weight)


@head_logprob_backward.register_fake
def _(
    upstream: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    lse: Tensor,
    logits: Tensor,
    call: list[float],
) -> Present:
    return fake_gradients(HeadInputs(hidden, weight, bias, target), call)


def upstream_of(grad_logp: Tensor | None, grad_lse: Tensor | None) -> Tensor:  # [1 or 2, N]
    """By logp, and by lse where that has one: one tensor, which vmap can batch."""
    if grad_lse is None:
        return cast(Tensor, grad_logp).unsqueeze(0)
    return torch.stack([torch.zeros_like(grad_lse) if grad_logp is None else grad_logp.to(grad_lse.dtype), grad_lse])


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


def refuse_double_backward(operator: torch.library.CustomOpDef, mend: str = "use backend='reference'") -> None:
    """Make a second differentiation an error that says what to do."""

    def refuse(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError(f"the fused log-probabilities are differentiable once; for gradients of gradients {mend}")

    operator.register_autograd(refuse)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, target, ctx.call, ctx.save = inputs
    _, lse, entropy, hit, saved = output
    ctx.mark_non_differentiable(entropy, hit, saved, *([lse] if ctx.save == "grad_hidden" else []))
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, bias, target, lse, saved)


def _backward(ctx: Any, grad_logp: Tensor | None, grad_lse: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    hidden, weight, bias, target, lse, saved = ctx.saved_tensors
    grad_hidden = grad_weight = grad_bias = None
    if grad_logp is not None and ctx.save == "grad_hidden":
        grad_hidden = _scale_rows(saved, grad_logp, hidden)
    elif grad_logp is not None or grad_lse is not None:
        needs = ctx.needs_input_grad[:3]
        call = HeadCall.unflat(ctx.call)
        flat = call.on(call.backend, needs).flat()
        gradients = head_logprob_backward(
            upstream_of(grad_logp, grad_lse), hidden, weight, bias, target, lse, saved, flat
        )
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
