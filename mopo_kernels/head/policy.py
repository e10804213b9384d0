"""Gradients of the policy step in the pass that computes the log-probabilities: 6·N·H·V flops, nothing formed twice.

∂loss/∂log π(y_i|x), all that the tile engine needs of a loss, depends on the labels (clone) or on the log-probabilities
of one group as well (contrast, regress). So blocks hold whole groups, and each block's gradients are formed while its
logits are still there. With w the weights, G the number of groups, n a group's size and e = logp − shift:

    clone     −w / G
    contrast  (Σ_group w · softmax_group(e) − w) / G   shift = ref_logp
    regress   4 / ((n − 1) G) · (e − mean_group e)     shift = ref_logp + (n − 1)/n · s/τ

The operator's first output is the linearisation Σ_i ∂loss/∂logp_i · logp_i: it has the loss's gradient, not its value.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mopo_kernels.head_ops import fake_gradients, head_for, plan_for, present, scales_of
from mopo_kernels.objective import PolicyStep, TargetPolicy, dense_groups
from mopo_kernels.plan import accumulate_dtype, default_workspace
from mopo_kernels.tiles import GradientSum, Rows, count, fused_gradients, rows_that_count, split


class PolicyTarget(NamedTuple):
    """What a policy step needs of the labels, per sequence; float64."""

    slot: Tensor  # [S] int64, dense id of the sequence's group
    weights: Tensor  # [S] w
    shift: Tensor  # [S]
    num_groups: Tensor  # []

    @classmethod
    def of(cls, target: TargetPolicy, policy_step: PolicyStep, tau: float, ref_logp: Tensor | None) -> PolicyTarget:
        groups = target.groups
        shift = torch.zeros_like(target.scores) if ref_logp is None else ref_logp.detach().double()
        if policy_step == "regress":
            shift = shift + (groups.size - 1) / groups.size * target.scores / tau
        return cls(groups.slot, target.weights, shift, groups.num_groups)

    def take(self, index: Tensor) -> PolicyTarget:
        """The sequences at `index`, in a batch of as many groups."""
        return self._replace(slot=self.slot[index], weights=self.weights[index], shift=self.shift[index])


def policy_gradient(logp: Tensor, target: PolicyTarget, policy_step: str) -> Tensor:  # [S]
    """∂loss/∂logp of every sequence whose group is complete in `logp`, float64."""
    if policy_step == "clone":
        return -target.weights / target.num_groups
    groups = dense_groups(target.slot)
    error = logp - target.shift
    if policy_step == "contrast":
        return (groups.sum(target.weights) * groups.log_softmax(error).exp() - target.weights) / target.num_groups
    centred = error - groups.sum(error) / groups.size
    return 4 / ((groups.size - 1) * target.num_groups) * centred


def run_total_logprob(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    target: Tensor,  # [N]
    *,
    average: bool,
    bias: Tensor | None,  # [V]
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    grad_filter: float | None,
    workspace_bytes: int | None,
    backend: str,
) -> Tensor:  # []
    """Σ logp over the rows that count, or their mean: the clone loss of one sequence of weight −1."""
    one = torch.ones(1, dtype=torch.float64, device=hidden.device)
    return linear_policy_loss(
        *(hidden.unsqueeze(0), weight, bias, target.unsqueeze(0)),
        *(torch.zeros_like(one, dtype=torch.int64), -one, torch.zeros_like(one), one[0], "clone", average),
        [x is not None and x.requires_grad for x in (hidden, weight, bias)],
        scales_of(temperature, softcap, logit_scale),
        *(ignore_index, grad_filter),
        *(default_workspace(hidden.device) if workspace_bytes is None else workspace_bytes, backend),
        donated=True,
    )[0]


@torch.library.custom_op("mopo_kernels::linear_policy_loss", mutates_args=())
def linear_policy_loss(
    hidden: Tensor,  # [S, L, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    target: Tensor,  # [S, L]
    slot: Tensor,  # [S]
    weights: Tensor,  # [S]
    shift: Tensor,  # [S]
    num_groups: Tensor,  # []
    policy_step: str,
    average: bool,
    needs: list[bool],  # gradients of hidden, weight, bias
    scales: list[float],
    ignore_index: int,
    grad_filter: float | None,
    workspace_bytes: int,
    backend: str,
    donated: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The linearised loss [], logp[S], and the loss's gradients by hidden, weight and bias ([0] where not needed).

    `donated`: the caller drops these gradients, so the backward may scale them in place.
    """
    loss, logp, gradients = run_policy_loss(
        *(hidden, weight, bias, target, slot, weights, shift, num_groups, policy_step, average, needs),
        *(scales, ignore_index, grad_filter, workspace_bytes, backend),
    )
    return loss, logp, *present(gradients, weight)


def run_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    slot: Tensor,
    weights: Tensor,
    shift: Tensor,
    num_groups: Tensor,
    policy_step: str,
    average: bool,
    needs: list[bool],
    scales: list[float],
    ignore_index: int,
    grad_filter: float | None,
    workspace_bytes: int,
    backend: str,
    *,
    gradient_scale: float = 1.0,
    weight_sum: Tensor | None = None,
) -> tuple[Tensor, Tensor, tuple[Tensor | None, Tensor | None, Tensor | None]]:
    """The loss, logp, and the gradients times `gradient_scale`, weight's added to `weight_sum` where that is given."""
    labels = PolicyTarget(slot, weights, shift, num_groups)
    length = target.shape[1]
    flat_target = target.reshape(-1).contiguous()
    rows = rows_that_count(flat_target, ignore_index)
    places = torch.arange(len(flat_target), device=target.device)
    sequence_of = places // length
    divisor = (target != ignore_index).sum(1).clamp(min=1) if average else torch.ones_like(slot)
    blocks: Sequence[Rows]
    if policy_step == "clone":
        plan = plan_for(rows, weight, backend, workspace_bytes, "fused", filtered=grad_filter is not None)
        blocks = split(rows, plan.row_block)
    else:
        places = places[rows]
        plan = plan_for(places, weight, backend, workspace_bytes, "fused", filtered=grad_filter is not None)
        blocks = _whole_groups(places, slot[sequence_of[places]], plan.row_block)

    head = head_for(weight, bias, scales, backend, plan, grad_filter)
    inputs = hidden.reshape(-1, hidden.shape[-1])
    parts = sum(-(-count(block) // plan.row_block) for block in blocks)
    sums = GradientSum(head, inputs, needs=needs, blocks=parts, weight_sum=weight_sum)
    logp = torch.zeros(slot.shape, dtype=torch.float64, device=slot.device)

    def coefficient(block: Rows, block_logp: Tensor) -> Tensor:
        sequence = sequence_of[block]
        logp.index_add_(0, sequence, block_logp / divisor[sequence])
        return (policy_gradient(logp, labels, policy_step) * gradient_scale / divisor)[sequence]

    fused_gradients(head, inputs, flat_target, blocks, coefficient, sums)
    grad_hidden, grad_weight, grad_bias = sums.finish(bias)
    dtype = accumulate_dtype(weight.dtype)
    loss = (policy_gradient(logp, labels, policy_step) * logp).sum()
    shaped = None if grad_hidden is None else grad_hidden.reshape(hidden.shape)
    return loss.to(dtype), logp.to(dtype), (shaped, grad_weight, grad_bias)


@linear_policy_loss.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    slot: Tensor,
    weights: Tensor,
    shift: Tensor,
    num_groups: Tensor,
    policy_step: str,
    average: bool,
    needs: list[bool],
    scales: list[float],
    ignore_index: int,
    grad_filter: float | None,
    workspace_bytes: int,
    backend: str,
    donated: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = accumulate_dtype(weight.dtype)
    loss, logp = hidden.new_empty((), dtype=dtype), hidden.new_empty(slot.shape, dtype=dtype)
    return loss, logp, *fake_gradients(hidden, weight, bias, needs)


def _whole_groups(rows: Tensor, slot: Tensor, row_block: int) -> Sequence[Tensor]:
    """Deal rows to blocks of whole groups: at most `row_block` rows, or one group."""
    order = slot.argsort(stable=True)
    sizes, total = [], 0
    for size in slot.bincount().tolist():
        if total and total + size > row_block:
            sizes.append(total)
            total = 0
        total += size
    return rows[order].split([*sizes, total]) if len(rows) else ()


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, logp, *gradients = output
    ctx.mark_non_differentiable(logp, *gradients)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*gradients)
    ctx.needs, ctx.donated = inputs[10], inputs[16]


def _backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "the fused loss is differentiable once (create_graph=True asks for more); "
            "for gradients of gradients use backend='reference'"
        )
    if grad_loss is None:
        return (None,) * 17
    gradients = (
        _scale(x, grad_loss, ctx.donated) if need else None
        for x, need in zip(ctx.saved_tensors, ctx.needs, strict=True)
    )
    return *gradients, *(None,) * 14


def _scale(gradient: Tensor, scale: Tensor, donated: bool) -> Tensor:
    """gradient · scale, in place where the gradient is ours and the graph is about to be freed: no second copy."""
    is_last_use = donated and not torch._C._autograd._get_current_graph_task_keep_graph()
    if not is_last_use or type(gradient) is not Tensor:  # a subclass is being traced
        return gradient * scale.to(gradient.dtype)
    is_whole = scale.device.type == "cpu" and scale == 1  # a GPU would have to be waited for
    return gradient if is_whole else gradient.mul_(scale)


linear_policy_loss.register_autograd(_backward, setup_context=_save)
