"""A whole data set's labels, laid out for the dual solver, and what a target policy achieves on them.

The quantities that `target.TargetPolicy` yields for a batch, laid out for millions of groups: one dense bucket per
group size, identical groups kept once with the number of their copies. Everything is float64.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from mopo_kernels.checks import (
    check_group_ids,
    check_group_sizes,
    check_lag_finite,
    check_per_response,
    check_probabilities,
)
from mopo_kernels.objective.robust import bound_and_chi
from mopo_kernels.objective.target import NEUTRAL


class Bucket(NamedTuple):
    """Groups of one size n, identical ones kept once. All float64."""

    values: Tensor  # [K, n, N] v_ik; 0 in a group that objective k does not label
    labelled: Tensor  # [K, N] 1 where objective k labels the group, else 0
    log_ref: Tensor  # [n, N] log r_i
    copies: Tensor  # [N] how many groups each one stands for


class GroupedLabels(NamedTuple):
    """A data set's labels laid out densely, one bucket per group size."""

    buckets: list[Bucket]
    num_groups: float
    labelled_groups: Tensor  # [K] float64, groups that objective k labels


def group_labels(win_rate: Tensor, group: Tensor, lag_log_ratio: Tensor | None) -> GroupedLabels:
    """Checks the labels of a data set and lays them out."""
    check_probabilities("win_rate", win_rate)
    check_group_ids(group, win_rate.shape[0])
    check_per_response(win_rate.shape[0], lag_log_ratio=lag_log_ratio)
    check_lag_finite(lag_log_ratio)
    ids, order = group.sort(stable=True)
    ids, sizes = ids.unique_consecutive(return_counts=True)
    check_group_sizes(ids, sizes)

    labels = win_rate.detach().double()
    lag = None if lag_log_ratio is None else lag_log_ratio.detach().double()
    starts = sizes.cumsum(0) - sizes
    buckets = []
    for size in sizes.bincount().nonzero()[:, 0].tolist():
        rows = order[starts[sizes == size] + torch.arange(size, device=order.device)[:, None]]  # [n, N]
        log_ref = None if lag is None else lag[rows].log_softmax(0)
        buckets.append(_collapse(_bucket(labels.T[:, rows], log_ref)))
    labelled_groups = torch.stack([bucket.labelled @ bucket.copies for bucket in buckets]).sum(0)
    _check_labelled(labelled_groups)
    return GroupedLabels(buckets, float(sizes.numel()), labelled_groups)


def _bucket(labels: Tensor, log_ref: Tensor | None) -> Bucket:  # [K, n, N], [n, N]
    missing = labels.isnan()
    if missing.any():
        labelled = ~missing.all(1)
        labels = torch.where(labelled[:, None], labels.nan_to_num(nan=NEUTRAL), 0)
    else:
        labelled = missing.new_ones(()).expand(labels.shape[0], labels.shape[2])
    if log_ref is None:
        log_ref = labels.new_tensor(-math.log(labels.shape[1])).expand(labels.shape[1:])
    return Bucket(labels, labelled.double(), log_ref, torch.ones_like(labels[0, 0]))


def _collapse(bucket: Bucket) -> Bucket:
    """Keeps identical groups once: a million hard-labelled pairs with four objectives are sixteen different ones.

    Groups are told apart by a random projection, one number per group, and compared in full afterwards.
    """
    features = (bucket.values.flatten(0, 1), bucket.labelled, bucket.log_ref)  # [*, N] each
    generator = torch.Generator().manual_seed(0)
    keys = torch.zeros_like(bucket.copies)
    for feature in features:
        keys += torch.rand(feature.shape[0], generator=generator, dtype=keys.dtype).to(keys.device) @ feature
    probe = keys[:4096]
    if probe.unique().numel() > probe.numel() / 2:
        return bucket
    unique, inverse, copies = keys.unique(return_inverse=True, return_counts=True)
    representative = torch.empty_like(unique, dtype=torch.int64).scatter_(
        0, inverse, torch.arange(keys.numel(), device=keys.device)
    )
    if not all(torch.equal(feature, feature[:, representative][:, inverse]) for feature in features):
        return bucket
    return Bucket(
        bucket.values[..., representative],
        bucket.labelled[:, representative],
        bucket.log_ref[:, representative],
        copies.double(),
    )


class Moments(NamedTuple):
    log_partition: Tensor  # [] mean over groups of log E_ref exp(s / tau)
    win_rates: Tensor  # [K] G_k
    covariance: Tensor  # [K, K] mean over groups of Cov_w(v)


class RatioSample(NamedTuple):
    """The joint sample of all responses, M of them where identical groups are kept once, for C of the objectives."""

    ratio_values: Tensor  # [C, M] rho_i v_ik
    ref_weights: Tensor  # [C, M] r_i, over the groups that objective k labels; sums to 1
    centred: Tensor  # [C, M] v_ik - E_w[v_k], so that d rho_i / d lambda_k = rho_i centred_ik / tau


def _log_weights(bucket: Bucket, multipliers: Tensor, tau: float) -> tuple[Tensor, Tensor]:  # [n, N], [N]
    """log w_i and the log-partition function of each group."""
    logits = torch.tensordot(multipliers, bucket.values, 1) / tau + bucket.log_ref
    log_weight = logits.log_softmax(0)
    return log_weight, logits[0] - log_weight[0]


def policy_moments(labels: GroupedLabels, multipliers: Tensor, tau: float) -> Moments:
    """What the dual's value, gradient and curvature are made of, under multipliers [K]."""
    log_partition = multipliers.new_zeros(())
    total = torch.zeros_like(multipliers)
    covariance = multipliers.new_zeros(multipliers.numel(), multipliers.numel())
    for bucket in labels.buckets:
        log_weight, log_z = _log_weights(bucket, multipliers, tau)
        weight = log_weight.exp()
        mean = (weight * bucket.values).sum(1)
        centred = bucket.values - mean[:, None]
        log_partition += bucket.copies @ log_z
        total += mean @ bucket.copies
        covariance += (centred * (weight * bucket.copies)).flatten(1) @ centred.flatten(1).T
    return Moments(log_partition / labels.num_groups, total / labels.labelled_groups, covariance / labels.num_groups)


def ratio_sample(labels: GroupedLabels, multipliers: Tensor, tau: float, objectives: Tensor) -> RatioSample:
    """The sample for the objectives [C] asked for, under multipliers [K]."""
    parts = []
    for bucket in labels.buckets:
        values = bucket.values[objectives]
        log_weight, _ = _log_weights(bucket, multipliers, tau)
        centred = values - (log_weight.exp() * values).sum(1, keepdim=True)
        ratio_values = (log_weight - bucket.log_ref).exp() * values
        share = bucket.labelled[objectives] * bucket.copies / labels.labelled_groups[objectives, None]
        ref_weights = bucket.log_ref.exp() * share[:, None]
        parts.append((ratio_values.flatten(1), ref_weights.flatten(1), centred.flatten(1)))
    return RatioSample(*(torch.cat(part, 1) for part in zip(*parts, strict=True)))


def policy_bounds(labels: GroupedLabels, multipliers: Tensor, tau: float, eps: float) -> tuple[Tensor, Tensor]:
    """LB_k and chi_k, [K] both."""
    sample = ratio_sample(labels, multipliers, tau, torch.arange(multipliers.numel(), device=multipliers.device))
    return bound_and_chi(sample.ratio_values, sample.ref_weights, eps)


def _check_labelled(labelled_groups: Tensor) -> None:
    if (labelled_groups == 0).any():
        objective = int((labelled_groups == 0).nonzero()[0])
        raise ValueError(f"win_rate has no label for objective {objective}: every entry is NaN; drop the objective")
