"""The target policy of a batch: what labels and multipliers alone say, before any model has run.

A batch is B responses in groups (the n >= 2 responses of one prompt). With multipliers lambda (1 at the primary
objective), temperature tau and lag weights omega:

    score       s_i = sum_k lambda_k v_ik
    reference   r_i = softmax_group(log omega_i)
    weight      w_i = softmax_group(s_i / tau + log omega_i)         rho_i = w_i / r_i

Weights depend on labels and multipliers only, never on the policy being trained, and carry no gradient. Scores reach
hundreds once divided by tau, so everything here is float64.

An objective that nobody labelled in a group adds nothing to that group's scores, and the group is left out of that
objective's averages. Where a group is labelled for some responses only, the others count the neutral 1/2, in scores and
averages alike, so that win rates remain the derivatives of the dual that `solve_dual` minimises (our choice).

Source: Agnihotri et al., Multi-Objective Preference Optimization, arXiv 2505.10892: Eq. 3 (scores and ratio).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mopo_kernels import backends
from mopo_kernels.backends.batch import Labels, LabelValues
from mopo_kernels.checks import check_label_shapes, check_label_values, is_true
from mopo_kernels.objective import ops
from mopo_kernels.objective.robust import bound_and_chi

NEUTRAL = 0.5  # what an unlabelled response counts in a group that is labelled for others


class Groups(NamedTuple):
    """Groups as dense segments, with B slots for them, the most there could be: so no shape depends on data."""

    slot: Tensor  # [B] int64, slot of each response's group: 0 .. num_groups - 1
    size: Tensor  # [B] float64, number of responses in each response's group
    num_groups: Tensor  # [] float64

    @classmethod
    def of(cls, group: Tensor) -> Groups:  # [B] int64, any ids
        ids, order = group.sort()
        starts = torch.zeros_like(ids)
        starts[1:] = ids[1:] != ids[:-1]
        sorted_slot = starts.cumsum(0)
        slot = torch.empty_like(sorted_slot).scatter(0, order, sorted_slot)
        ones = torch.ones_like(slot, dtype=torch.float64)
        size = torch.zeros_like(ones).index_add(0, slot, ones)[slot]
        return cls(slot, size, sorted_slot[-1].double() + 1)

    def sum(self, x: Tensor) -> Tensor:
        """Sum of x[B, ...] over the group of each response: [B, ...]."""
        return torch.zeros_like(x).index_add(0, self.slot, x)[self.slot]

    def log_softmax(self, x: Tensor) -> Tensor:
        """log_softmax of x[B] within each group."""
        lowest = x.detach().new_full(x.shape, -math.inf)
        shifted = x - lowest.scatter_reduce(0, self.slot, x.detach(), "amax")[self.slot]
        return shifted - self.sum(shifted.exp()).log()

    def mean_of_sums(self, x: Tensor) -> Tensor:
        """Mean over groups of the sum of x[B] within the group: []."""
        return x.sum() / self.num_groups


# --------------------------------------------------------------------------------------------------------- statistics


@dataclass(frozen=True)
class LabelStatistics:
    """What labels and multipliers say of a batch; loss, dual and trainer read it, nobody computes it again."""

    slot: Tensor  # [B] int64, groups numbered 0 .. num_groups - 1
    buffer: Tensor  # float64
    values: LabelValues  # every statistic in float64, views of the buffer: weights[B], win_rates[K], ...
    dtype: torch.dtype  # the caller's, of what is reported

    @classmethod
    def of(cls, slot: Tensor, buffer: Tensor, num_objectives: int, dtype: torch.dtype) -> LabelStatistics:
        return cls(slot, buffer, LabelValues.unpack(buffer, slot.shape[0], num_objectives), dtype)

    @property
    def groups(self) -> Groups:
        return Groups(self.slot, self.values.size, self.values.num_groups)

    @property
    def weights(self) -> Tensor:  # [B] float64
        return self.values.weights

    def reported(self) -> LabelValues:
        """Every statistic in the caller's dtype, copied."""
        copied = self.buffer.to(self.dtype, copy=True)
        return LabelValues.unpack(copied, self.slot.shape[0], self.values.chi.shape[0])

    def to(self, device: torch.device | str) -> LabelStatistics:
        return self.of(self.slot.to(device), self.buffer.to(device), self.values.chi.shape[0], self.dtype)


def label_statistics(
    win_rate: Tensor,  # [B, K] in [0, 1], NaN = unlabelled
    group: Tensor,  # [B] int64, any ids; every group has at least two responses
    multipliers: Tensor,  # [K], 1 at the primary
    *,
    tau: float,
    eps: float = 0.0,
    lag_log_ratio: Tensor | None = None,  # [B] log pi_lag - log pi_ref0
    primary: int = 0,
    backend: str | None = None,
) -> LabelStatistics:
    """Weights, win rates, robust bounds, effective sample size and KL of a batch, without any model.

    Raises ValueError for malformed labels, groups, multipliers or settings.
    """
    labels = Labels(win_rate, group, multipliers, lag_log_ratio, tau, eps, primary)
    check_label_shapes(labels)
    statistics = measure(labels, backend)
    if not is_true(statistics.values.valid):
        check_label_values(labels)
    return statistics


def measure(labels: Labels, backend: str | None = None) -> LabelStatistics:
    """`label_statistics` of labels whose shapes are checked, by one launch where there is a kernel; `valid` unread."""
    name = backends.choose("label_statistics", labels.win_rate.device.type, backend).backend
    dtype = labels.win_rate.dtype
    labels = labels._replace(
        win_rate=_wide(labels.win_rate),
        group=labels.group.contiguous(),
        multipliers=_wide(labels.multipliers),
        lag_log_ratio=None if labels.lag_log_ratio is None else _wide(labels.lag_log_ratio),
    )
    run = torch_statistics if name == "reference" else ops.run_label_statistics
    slot, buffer = run(labels, name)
    return LabelStatistics.of(slot, buffer, labels.win_rate.shape[1], dtype)


def _wide(x: Tensor) -> Tensor:
    """Detached and contiguous; float32 and float64 as they are, all else as float64."""
    x = x.detach()
    return (x if x.dtype in (torch.float32, torch.float64) else x.double()).contiguous()


# -------------------------------------------------------------------------------------------------------- plain torch


class TargetPolicy(NamedTuple):
    """The optimal policy for fixed multipliers, on the responses of a batch (paper, Policy Extraction). All float64."""

    groups: Groups
    values: Tensor  # [B, K] v_ik; 0 in a group that objective k does not label
    labelled: Tensor  # [B, K] bool, whether objective k labels the response's group
    scores: Tensor  # [B] s_i / tau
    log_ref: Tensor  # [B] log r_i
    log_weight: Tensor  # [B] log w_i

    @classmethod
    def of(cls, labels: Labels) -> TargetPolicy:
        """Scores, reference measure and weights."""
        groups, win_rate = Groups.of(labels.group), labels.win_rate.detach().double()
        labelled = groups.sum((~win_rate.isnan()).double()) > 0
        values = torch.where(labelled, win_rate.nan_to_num(nan=NEUTRAL), 0)
        scores = values @ labels.multipliers.detach().double() / labels.tau
        lag = torch.zeros_like(scores) if labels.lag_log_ratio is None else labels.lag_log_ratio.detach().double()
        return cls(groups, values, labelled, scores, groups.log_softmax(lag), groups.log_softmax(scores + lag))

    @property
    def weights(self) -> Tensor:  # [B]
        return self.log_weight.exp()

    def win_rates(self) -> Tensor:  # [K]
        """G_k = mean over the groups labelled for k of sum_i w_i v_ik; NaN where there is none."""
        return (self.weights[:, None] * self.values).sum(0) / self._labelled_groups()

    def ratio_sample(self) -> tuple[Tensor, Tensor]:  # [K, B], [K, B]
        """The joint (prompt, response) sample of rho_i v_ik and its reference weights, per objective."""
        ratio = (self.log_weight - self.log_ref).exp()
        ref_weights = self.labelled * self.log_ref.exp()[:, None] / self._labelled_groups()
        return (ratio[:, None] * self.values).T, ref_weights.T

    def bounds(self, eps: float) -> tuple[Tensor, Tensor]:  # [K], [K]
        """LB_k and chi_k; NaN for an objective that the batch does not label."""
        values, ref_weights = self.ratio_sample()
        unlabelled = ~self.labelled.any(0)
        bound, chi = bound_and_chi(values, torch.where(unlabelled[:, None], 1 / values.shape[1], ref_weights), eps)
        return torch.where(unlabelled, math.nan, bound), torch.where(unlabelled, math.nan, chi)

    def kl(self) -> Tensor:  # []
        return self.groups.mean_of_sums(self.weights * (self.log_weight - self.log_ref))

    def ess(self) -> Tensor:  # []
        return self.weights.sum() ** 2 / (self.weights**2).sum()

    def _labelled_groups(self) -> Tensor:  # [K]
        return (self.labelled / self.groups.size[:, None]).sum(0)


def torch_statistics(labels: Labels, _: str = "reference") -> tuple[Tensor, Tensor]:
    """The batch contract's `label_statistics` in plain torch: the truth."""
    target = TargetPolicy.of(labels)
    lower_bounds, chi = target.bounds(float(labels.eps))
    multipliers, lag = labels.multipliers, labels.lag_log_ratio
    wrong = (
        ((labels.win_rate < 0) | (labels.win_rate > 1)).any()
        | (target.groups.size < 2).any()
        | ~((multipliers >= 0) & multipliers.isfinite()).all()
        | (multipliers[labels.primary] != 1)
    )
    if lag is not None:
        wrong = wrong | ~lag.isfinite().all()
    scalars = torch.stack([(~wrong).double(), target.groups.num_groups, target.ess(), target.kl()])
    per_response = (target.groups.size, target.scores, target.weights)
    return target.groups.slot, torch.cat([scalars, *per_response, target.win_rates(), lower_bounds, chi])
