"""A policy step as torch sees it: its loss from hidden states, gradients formed in the pass that forms the logits.

∂loss/∂log π(y_i|x), all that an engine needs of a loss, depends on the labels (clone) or on the log-probabilities of
one group as well (contrast, regress): objective/steps.py. So blocks hold whole groups, and each block's gradients are
formed while its logits are still there: 6·N·H·V flops, nothing formed twice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mopo_kernels.backends import transforms
from mopo_kernels.checks import check_result
from mopo_kernels.head.call import HeadCall, HeadInputs
from mopo_kernels.head.engines import fused_gradients, make_engine
from mopo_kernels.head.ops import fake_gradients, present
from mopo_kernels.head.plan import accumulate_dtype
from mopo_kernels.head.products import multiply
from mopo_kernels.head.rows import Rows, rows_that_count, split, whole_groups
from mopo_kernels.objective.steps import STEPS, StepTarget


def run_total_logprob(inputs: HeadInputs, call: HeadCall) -> Tensor:  # []
    """Σ logp over the rows that count, or their mean: the clone loss of one sequence of weight −1."""
    hidden, weight, bias, target = inputs
    one = HeadInputs(hidden.unsqueeze(0), weight, bias, target.unsqueeze(0))
    return linear_policy_loss(*one, StepTarget.packed_one(-1.0, hidden.device), "clone", call.flat())[0]


@torch.library.custom_op("mopo_kernels::linear_policy_loss", mutates_args=())
def linear_policy_loss(
    hidden: Tensor,  # [S, L, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    target: Tensor,  # [S, L]
    step_target: Tensor,  # StepTarget, packed
    step: str,
    call: list[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss [], logp[S], and the loss's gradients by hidden, weight and bias ([0] where not needed)."""
    options, labels, policy_step = HeadCall.unflat(call), StepTarget.unpacked(step_target), STEPS[step]
    inputs = HeadInputs(hidden, weight, bias, target.contiguous()).flattened()
    sequences, length = target.shape
    sequence_of = torch.arange(sequences, device=target.device).repeat_interleave(length)
    divisor = (target != options.ignore_index).sum(1).clamp(min=1) if options.average else None
    logp = torch.zeros(sequences, dtype=torch.float64, device=target.device)

    def coefficient(rows: Rows, row_logp: Tensor) -> Tensor:
        sequence = sequence_of[rows]
        logp.index_add_(0, sequence, row_logp if divisor is None else row_logp / divisor[sequence])
        gradient = policy_step.gradient(logp, labels)
        return (gradient if divisor is None else gradient / divisor)[sequence]

    rows = rows_that_count(inputs.target, options.ignore_index)
    if policy_step.NEEDS_GROUP:
        rows = torch.arange(len(inputs.target), device=target.device)[rows]

    def deal(rows: Any, row_block: int) -> Any:
        if not policy_step.NEEDS_GROUP:
            return split(rows, row_block)
        return whole_groups(rows, labels.slot[sequence_of[rows]], row_block)

    engine, blocks = make_engine(inputs, options, rows, "fused", deal)
    fused_gradients(engine, inputs.target, blocks, coefficient)
    check_result(logp, is_split=options.shard is not None, hidden=hidden, weight=weight, bias=bias)
    grad_hidden, grad_weight, grad_bias = engine.finish()
    grad_hidden = None if grad_hidden is None else grad_hidden.reshape(hidden.shape)
    dtype = accumulate_dtype(weight.dtype)
    loss = policy_step.loss(logp, labels)
    return loss.to(dtype), logp.to(dtype), *present((grad_hidden, grad_weight, grad_bias), weight)


@linear_policy_loss.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    step_target: Tensor,
    step: str,
    call: list[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = accumulate_dtype(weight.dtype)
    loss, logp = hidden.new_empty((), dtype=dtype), hidden.new_empty(target.shape[:1], dtype=dtype)
    return loss, logp, *fake_gradients(HeadInputs(hidden, weight, bias, target), call)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, logp, *gradients = output
    ctx.mark_non_differentiable(logp, *gradients)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*gradients)
    ctx.needs = HeadCall.unflat(inputs[-1]).needs


def _backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "the fused loss is differentiable once (create_graph=True asks for more); "
            "for gradients of gradients use backend='reference'"
        )
    hidden, weight, bias = (
        _scale(x, grad_loss) if need and grad_loss is not None else None
        for x, need in zip(ctx.saved_tensors, ctx.needs, strict=True)
    )
    return hidden, weight, bias, None, None, None, None


def _scale(gradient: Tensor, scale: Tensor) -> Tensor:
    """gradient · scale; in place, without a second copy, where the graph that alone holds the gradient is freed."""
    if type(gradient) is not Tensor or transforms.is_batched(scale):  # a subclass is being traced, or scale is many
        return gradient * scale
    is_kept = torch._C._autograd._get_current_graph_task_keep_graph()
    return multiply(gradient.clone() if is_kept else gradient, scale)


linear_policy_loss.register_autograd(_backward, setup_context=_save)
