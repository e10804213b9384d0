"""The loss of a policy step from hidden states: arguments checked, gradients formed by policy_ops.py in the forward.

On request weight's gradient is added straight to weight.grad, so that no second [V, H] tensor is made.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from mopo_kernels.head_ops import scales_of
from mopo_kernels.logprob import autocast, check_linear, check_result, filter_threshold
from mopo_kernels.objective import PolicyStep
from mopo_kernels.plan import accumulate_dtype, default_workspace
from mopo_kernels.policy_ops import PolicyTarget, linear_policy_loss, run_policy_loss


def fused_policy_loss(
    hidden: Tensor,  # [S, L, H]
    weight: Tensor,  # [V, H]
    target: Tensor,  # [S, L]
    labels: PolicyTarget,
    policy_step: PolicyStep,
    *,
    average: bool,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    grad_filter: float | Literal["auto"] | None,
    workspace_bytes: int | None,
    backend: str,
    weight_grad_scale: float | None,
) -> tuple[Tensor, Tensor]:
    """The linearised loss [], differentiable, and logp[S], which is not. The head's options are `linear_logprob`'s."""
    check_linear(
        *(hidden, weight, target, bias),
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        ignore_index=ignore_index,
        workspace_bytes=workspace_bytes,
    )
    weight_grad = None if weight_grad_scale is None else _own_gradient(weight, weight_grad_scale)
    hidden, weight, bias = autocast(hidden, weight, bias)
    arguments = (
        *(hidden, weight, bias, target, *labels, policy_step, average),
        [x is not None and x.requires_grad for x in (hidden, weight, bias)],
        scales_of(temperature, softcap, logit_scale),
        *(ignore_index, filter_threshold(grad_filter, weight.dtype)),
        *(default_workspace(hidden.device) if workspace_bytes is None else workspace_bytes, backend),
    )
    if weight_grad is None:
        loss, logp, *_ = linear_policy_loss(*arguments, True)
    else:
        loss, logp = _IntoWeightGrad.apply(weight_grad, weight_grad_scale, *arguments)
    check_result(logp, hidden=hidden, weight=weight, bias=bias)
    return loss, logp


# ------------------------------------------------------------------------------------- straight into weight.grad


def _own_gradient(weight: Tensor, scale: float) -> Tensor:
    """weight.grad, made if there is none, where sums of gradients can be added to it."""
    if not 0 < abs(scale) < float("inf"):
        raise ValueError(
            f"weight_grad_scale={scale} must be the finite number that reaches the loss, 1 if nothing does"
        )
    if not (weight.is_leaf and weight.requires_grad):
        raise ValueError("weight_grad_scale needs a weight that holds a gradient: a parameter that requires grad")
    if torch.compiler.is_compiling():
        raise RuntimeError("weight_grad_scale writes to weight.grad, which torch.compile cannot trace: leave it out")
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    if weight.grad.dtype != accumulate_dtype(weight.dtype):
        raise ValueError(
            f"weight.grad is {weight.grad.dtype}, and sums in 16 bits bias training: keep the head in float32, or "
            "leave weight_grad_scale out"
        )
    return weight.grad


class _IntoWeightGrad(torch.autograd.Function):
    """linear_policy_loss whose gradients are scaled in the forward, weight's added to its .grad there and then."""

    @staticmethod
    def forward(ctx: Any, weight_grad: Tensor, scale: float, *arguments: Any) -> tuple[Tensor, Tensor]:
        loss, logp, (hidden, _, bias) = run_policy_loss(*arguments, gradient_scale=scale, weight_sum=weight_grad)
        ctx.mark_non_differentiable(logp)
        ctx.save_for_backward(hidden, bias)
        ctx.scale = scale
        return loss, logp

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if not torch.isclose(grad_loss.double(), grad_loss.new_tensor(ctx.scale).double(), rtol=1e-6):
            raise RuntimeError(
                f"the gradient that reached the loss is {grad_loss.item():.6g}, and weight.grad holds what belongs to "
                f"weight_grad_scale={ctx.scale}: pass what the loss is multiplied by, or leave it out"
            )
        hidden, bias = ctx.saved_tensors
        return None, None, hidden, None, bias, *(None,) * 13
