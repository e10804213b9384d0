"""The batch contract as torch sees it: operators over a backend's `label_statistics` and `sequence_sums`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mopo_kernels import backends
from mopo_kernels.backends.batch import Labels, LabelValues


def run_label_statistics(labels: Labels, backend: str) -> tuple[Tensor, Tensor]:
    """slot[B] and the buffer of LabelValues."""
    tensors = labels.win_rate, labels.group, labels.multipliers, labels.lag_log_ratio
    return measure_labels(*tensors, [float(labels.tau), float(labels.eps)], labels.primary, backend)


@torch.library.custom_op("mopo_kernels::label_statistics", mutates_args=())
def measure_labels(
    win_rate: Tensor,  # [B, K]
    group: Tensor,  # [B]
    multipliers: Tensor,  # [K]
    lag_log_ratio: Tensor | None,  # [B]
    tau_and_eps: list[float],
    primary: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    tau, eps = tau_and_eps
    labels = Labels(win_rate, group, multipliers, lag_log_ratio, tau, eps, primary)
    return backends.batch(backend).label_statistics(labels)


@measure_labels.register_fake
def _(
    win_rate: Tensor,
    group: Tensor,
    multipliers: Tensor,
    lag_log_ratio: Tensor | None,
    tau_and_eps: list[float],
    primary: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(group), win_rate.new_empty(LabelValues.length(*win_rate.shape), dtype=torch.float64)


@torch.library.custom_op("mopo_kernels::sequence_sums", mutates_args=())
def sequence_sums(
    logp: Tensor,  # [B, L]
    target: Tensor,  # [B, L] int64
    ignore_index: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Sums[B] float64 of logp over the positions that count, differentiable, and counts[B] of those."""
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


def _rows_whole(x: Tensor) -> Tensor:
    """Rows may lie anywhere apart, but a row's elements side by side."""
    return x if x.stride(1) == 1 else x.contiguous()
