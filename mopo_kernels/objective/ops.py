"""The batch contract as torch sees it: operators over a backend's `objective` and `sequence_sums`.

Arguments are validated by objective.py and logprob.py; `backend` names a module of the contract (backends/batch.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mopo_kernels import backends
from mopo_kernels.backends.batch import ObjectiveValues


def run_objective(
    logp: Tensor,  # [B]
    win_rate: Tensor,  # [B, K]
    group: Tensor,  # [B]
    multipliers: Tensor,  # [K]
    ref_logp: Tensor | None,  # [B]
    lag_log_ratio: Tensor | None,  # [B]
    kept: Tensor | None,  # [B]
    *,
    tau: float,
    eps: float,
    policy_step: str,
    normalize: str,
    primary: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The loss [], differentiable in logp and ref_logp, and the contract's buffer, which is not."""
    return objective(
        *(_wide(logp), _wide(win_rate.detach()), group, _wide(multipliers.detach())),
        None if ref_logp is None else _wide(ref_logp),
        None if lag_log_ratio is None else _wide(lag_log_ratio.detach()),
        kept,
        *(tau, eps, policy_step, normalize, primary, backend),
    )


def run_sequence_sums(
    logp: Tensor,  # [B, L]
    target: Tensor,  # [B, L]
    ignore_index: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Sums[B] float64 of logp over the positions that count, differentiable, and counts[B] of those."""
    return sequence_sums(logp, target.long(), ignore_index, backend)


# --------------------------------------------------------------------------------------------------------- objective


@torch.library.custom_op("mopo_kernels::objective", mutates_args=())
def objective(
    logp: Tensor,  # [B]
    win_rate: Tensor,  # [B, K]
    group: Tensor,  # [B]
    multipliers: Tensor,  # [K]
    ref_logp: Tensor | None,  # [B]
    lag_log_ratio: Tensor | None,  # [B]
    kept: Tensor | None,  # [B]
    tau: float,
    eps: float,
    policy_step: str,
    normalize: str,
    primary: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The loss [] in logp's dtype, and the buffer of ObjectiveValues."""
    values = backends.batch(backend).objective(
        *(x.contiguous() for x in (logp, win_rate, group, multipliers)),
        *(None if x is None else x.contiguous() for x in (ref_logp, lag_log_ratio, kept)),
        tau=tau,
        eps=eps,
        policy_step=policy_step,
        normalize=normalize,
        primary=primary,
    )
    loss = ObjectiveValues.unpack(values, *win_rate.shape).loss
    return loss.to(logp.dtype, copy=True), values  # a copy: an operator's outputs must not share memory


@objective.register_fake
def _(
    logp: Tensor,
    win_rate: Tensor,
    group: Tensor,
    multipliers: Tensor,
    ref_logp: Tensor | None,
    lag_log_ratio: Tensor | None,
    kept: Tensor | None,
    tau: float,
    eps: float,
    policy_step: str,
    normalize: str,
    primary: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return logp.new_empty(()), logp.new_empty(ObjectiveValues.size(*win_rate.shape), dtype=torch.float64)


def _save_gradient(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logp, win_rate, _, _, ref_logp, *_ = inputs
    policy_step = inputs[9]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1])
    ctx.shape = win_rate.shape
    ctx.dtype = logp.dtype
    ctx.ref_dtype = None if ref_logp is None or policy_step == "clone" else ref_logp.dtype


def _objective_backward(ctx: Any, grad_loss: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "the fused objective is differentiable once (create_graph=True asks for more); "
            "for gradients of gradients use backend='reference'"
        )
    if grad_loss is None:
        return (None,) * 13
    (values,) = ctx.saved_tensors
    gradient = grad_loss * ObjectiveValues.unpack(values, *ctx.shape).gradient
    grad_ref_logp = -gradient.to(ctx.ref_dtype) if ctx.needs_input_grad[4] and ctx.ref_dtype else None
    return gradient.to(ctx.dtype), *(None,) * 3, grad_ref_logp, *(None,) * 8


objective.register_autograd(_objective_backward, setup_context=_save_gradient)


# ----------------------------------------------------------------------------------------------------- sequence sums


@torch.library.custom_op("mopo_kernels::sequence_sums", mutates_args=())
def sequence_sums(
    logp: Tensor,  # [B, L]
    target: Tensor,  # [B, L]
    ignore_index: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """sums[B] and counts[B]."""
    return backends.batch(backend).sequence_sums(_rows_whole(logp), _rows_whole(target), ignore_index)


@sequence_sums.register_fake
def _(logp: Tensor, target: Tensor, ignore_index: int, backend: str) -> tuple[Tensor, Tensor]:
    return logp.new_empty(logp.shape[0], dtype=torch.float64), target.new_empty(target.shape[0])


def _save_target(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logp, target, ctx.ignore_index, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(target)
    ctx.dtype = logp.dtype


def _sums_backward(ctx: Any, grad_sums: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad_sums is None:
        return None, None, None, None
    (target,) = ctx.saved_tensors
    grad = torch.where(target != ctx.ignore_index, grad_sums.to(ctx.dtype).unsqueeze(-1), 0)
    return grad, None, None, None


sequence_sums.register_autograd(_sums_backward, setup_context=_save_target)


def _wide(x: Tensor) -> Tensor:
    """float32 and float64 as they are, all else as float64."""
    return x if x.dtype in (torch.float32, torch.float64) else x.double()


def _rows_whole(x: Tensor) -> Tensor:
    """Rows may lie anywhere apart, but a row's elements side by side."""
    return x if x.stride(1) == 1 else x.contiguous()
