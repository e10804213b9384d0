"""The MOPO objective: labels and multipliers to weights, losses, win rates and robust bounds.

A batch is B responses in groups (the n >= 2 responses of one prompt). `win_rate[B, K]` holds, per objective, the
estimated probability that a response beats its prompt's other responses; NaN is "nobody labelled it". With multipliers
lambda (1 at the primary objective), temperature tau and lag weights omega:

    score       s_i = sum_k lambda_k v_ik
    reference   r_i = softmax_group(log omega_i)
    weight      w_i = softmax_group(s_i / tau + log omega_i)         rho_i = w_i / r_i

Weights depend on labels and multipliers only, never on the policy being trained, and carry no gradient. Scores reach
hundreds once divided by tau, so everything here is computed in float64 and cast to the caller's dtype at the end.

An objective that nobody labelled in a group adds nothing to that group's scores, and the group is left out of that
objective's averages. Where a group is labelled for some responses only, the others count the neutral 1/2, in scores and
averages alike, so that win rates remain the derivatives of the dual that `solve_dual` minimises (our choice).

Everything here is plain torch, differentiable any number of times; `mopo_objective` hands a batch to one kernel of the
backend (objective_ops.py) where there is one.

Source: Agnihotri et al., Multi-Objective Preference Optimization, arXiv 2505.10892: Eq. 3 (scores and ratio), Eq. 7
(clone), and Algorithm 1. `contrast` and `regress` are ours.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from mopo_kernels import backends
from mopo_kernels.backends.batch import ObjectiveValues
from mopo_kernels.checks import (
    check_choice,
    check_eps,
    check_group_ids,
    check_group_sizes,
    check_lag,
    check_probabilities,
    check_tau,
)
from mopo_kernels.objective_ops import run_objective
from mopo_kernels.robust import bound_and_chi

Normalize = Literal["group", "none"]
PolicyStep = Literal["clone", "contrast", "regress"]

NEUTRAL = 0.5  # what an unlabelled response counts in a group that is labelled for others


@dataclass(frozen=True)
class MOPOOutput:
    """One evaluation of the objective. Only `loss` and `logp` carry gradients."""

    loss: Tensor  # [] in the dtype of logp
    logp: Tensor  # [B]
    weights: Tensor  # [B] w_i
    win_rates: Tensor  # [K] G_k, the primary's too; NaN for an objective that the batch does not label
    lower_bounds: Tensor  # [K] LB_k
    chi: Tensor  # [K] temperature of the bound: inf at eps = 0, 0 where the KL ball reaches the smallest value
    ess: Tensor  # [] effective sample size (sum w)^2 / sum w^2, at most B
    kl: Tensor  # [] mean over groups of KL(w || r): how far the target policy lies from the reference on this batch
    dropped_mass: Tensor  # [] weight of the responses whose logp was not computed, mean over groups


pytree.register_dataclass(MOPOOutput)


# ------------------------------------------------------------------------------------------------------------- labels


def win_rate_from_pairs(
    preference: Tensor,  # [P, K] probability that the first response beats the second; NaN = unlabelled
) -> Tensor:  # [2P, K]
    """Win rates of P pairs laid out [first..., second...]: v = P for the first response, 1 - P for the second.

    Raises ValueError for a preference outside [0, 1] or not of shape [P, K].
    """
    check_probabilities("preference", preference)
    return torch.cat([preference, 1 - preference])


def win_rate_from_comparisons(
    first: Tensor,  # [C] int64, responses 0 .. num_responses - 1
    second: Tensor,  # [C] int64
    preference: Tensor,  # [C, K] probability that `first` beats `second`; NaN = unlabelled
    num_responses: int,
) -> Tensor:  # [num_responses, K]
    """Win rates from comparisons: v_ik is the mean of P_k(i beats j) over the opponents j that i was compared with.

    A response without a comparison for objective k is NaN there. A pair may stand in several rows (one per objective,
    say) as long as no objective labels it twice. Raises ValueError for that, for a response compared with itself, for
    an index out of range, and for a preference outside [0, 1].
    """
    check_probabilities("preference", preference)
    _check_comparisons(first, second, preference, num_responses)
    labelled = ~preference.isnan()
    wins = torch.where(labelled, preference, 0)
    losses = torch.where(labelled, 1 - preference, 0)
    total = (
        preference.new_zeros(num_responses, preference.shape[1]).index_add(0, first, wins).index_add(0, second, losses)
    )
    count = torch.zeros_like(total).index_add(0, torch.cat([first, second]), labelled.to(total.dtype).repeat(2, 1))
    return torch.where(count > 0, total / count.clamp(min=1), math.nan)


# ------------------------------------------------------------------------------------------------------------- groups


class Groups(NamedTuple):
    """Groups as dense segments, with B slots for them, the most there could be: so no shape depends on data."""

    slot: Tensor  # [B] int64, slot of each response's group: 0 .. num_groups - 1
    size: Tensor  # [B] float64, number of responses in each response's group
    num_groups: Tensor  # [] float64

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


def dense_groups(
    group: Tensor,  # [B] int64, any ids
) -> Groups:
    ids, order = group.sort()
    starts = torch.zeros_like(ids)
    starts[1:] = ids[1:] != ids[:-1]
    sorted_slot = starts.cumsum(0)
    slot = torch.empty_like(sorted_slot).scatter(0, order, sorted_slot)
    ones = torch.ones_like(slot, dtype=torch.float64)
    size = torch.zeros_like(ones).index_add(0, slot, ones)[slot]
    return Groups(slot, size, sorted_slot[-1].double() + 1)


# ------------------------------------------------------------------------------------------------------ target policy


class TargetPolicy(NamedTuple):
    """The optimal policy for fixed multipliers, on the responses of a batch (paper, Policy Extraction). All float64."""

    groups: Groups
    values: Tensor  # [B, K] v_ik; 0 in a group that objective k does not label
    labelled: Tensor  # [B, K] bool, whether objective k labels the response's group
    scores: Tensor  # [B] s_i
    log_ref: Tensor  # [B] log r_i
    log_weight: Tensor  # [B] log w_i

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

    def kl(self) -> Tensor:  # []
        return self.groups.mean_of_sums(self.weights * (self.log_weight - self.log_ref))

    def ess(self) -> Tensor:  # []
        return self.weights.sum() ** 2 / (self.weights**2).sum()

    def _labelled_groups(self) -> Tensor:  # [K]
        return (self.labelled / self.groups.size[:, None]).sum(0)


def target_policy(
    win_rate: Tensor,  # [B, K]
    group: Tensor,  # [B]
    multipliers: Tensor,  # [K]
    *,
    tau: float,
    lag_log_ratio: Tensor | None = None,  # [B]
    normalize: Normalize = "group",
) -> TargetPolicy:
    """Scores, reference measure and weights of a validated batch."""
    groups = dense_groups(group)
    labels = win_rate.detach().double()
    labelled = groups.sum((~labels.isnan()).double()) > 0
    values = torch.where(labelled, labels.nan_to_num(nan=NEUTRAL), 0)
    scores = values @ multipliers.detach().double()
    lag = torch.zeros_like(scores) if lag_log_ratio is None else lag_log_ratio.detach().double()
    log_ref = groups.log_softmax(lag)
    log_weight = groups.log_softmax(scores / tau + lag) if normalize == "group" else log_ref + scores / tau - 1
    return TargetPolicy(groups, values, labelled, scores, log_ref, log_weight)


def mopo_weights(
    win_rate: Tensor,  # [B, K] in [0, 1], NaN = unlabelled
    group: Tensor,  # [B] int64, any ids
    multipliers: Tensor,  # [K], 1 at the primary
    *,
    tau: float,
    lag_log_ratio: Tensor | None = None,  # [B] log pi_lag - log pi_ref0
    normalize: Normalize = "group",
) -> Tensor:  # [B]
    """Weight of each response, w_i = softmax_group(s_i / tau + log omega_i); sums to 1 in every group. No gradient.

    `normalize="none"` is the paper's printed form r_i exp(s_i / tau - 1), the stationary point before the policy is
    required to sum to one. Raises ValueError for malformed labels, groups, multipliers or tau. Source: paper, Eq. 3.
    """
    check_batch(win_rate, group, multipliers, tau, lag_log_ratio)
    check_choice("normalize", normalize, get_args(Normalize))
    target = target_policy(win_rate, group, multipliers, tau=tau, lag_log_ratio=lag_log_ratio, normalize=normalize)
    return target.weights.to(win_rate.dtype)


def target_bounds(target: TargetPolicy, eps: float) -> tuple[Tensor, Tensor]:  # [K], [K]
    """LB_k and chi_k of a target policy; NaN for an objective that the batch does not label."""
    values, ref_weights = target.ratio_sample()
    unlabelled = ~target.labelled.any(0)
    bound, chi = bound_and_chi(values, torch.where(unlabelled[:, None], 1 / values.shape[1], ref_weights), eps)
    return torch.where(unlabelled, math.nan, bound), torch.where(unlabelled, math.nan, chi)


# -------------------------------------------------------------------------------------------------------- policy step


def mopo_objective(
    logp: Tensor,  # [B] log pi(y_i | x), sums over the response's tokens
    win_rate: Tensor,  # [B, K] in [0, 1], NaN = unlabelled
    group: Tensor,  # [B] int64, any ids; every group has at least two responses
    multipliers: Tensor,  # [K], 1 at the primary
    *,
    tau: float,
    eps: float = 0.0,
    ref_logp: Tensor | None = None,  # [B] log pi_ref(y_i | x), for contrast and regress
    lag_log_ratio: Tensor | None = None,  # [B] log pi_lag - log pi_ref0
    policy_step: PolicyStep = "clone",
    primary: int = 0,
    normalize: Normalize = "group",
    kept: Tensor | None = None,  # [B] bool, responses whose logp was computed (clone only)
    backend: str | None = None,
) -> MOPOOutput:
    """The MOPO loss of a batch and the estimates that move the multipliers. With h_i = logp_i - ref_logp_i:

        clone     -mean_groups sum_i w_i logp_i
        contrast  -mean_groups sum_i w_i log softmax_group(h)_i
        regress   mean_groups mean_{i<j} (h_i - h_j - (n-1)/n (s_i - s_j) / tau)^2

    All three have the same optimum in the tabular limit. The factor (n-1)/n makes `regress` unbiased when labels are
    single draws; without it pairs would overshoot twofold, which is IPO's 1/(2 tau). `clone` and `contrast` see the exp
    of an estimated win rate, which is no estimate of the exp: with few opponents they aim sharper than the optimum.

    `kept` leaves responses out of the `clone` loss, those whose weight is too small to be worth a forward pass; their
    weight is reported as `dropped_mass`. `eps` is the radius of the bounds' KL ball, see `robust_bound`.

    The loss is in the dtype of `logp`, weights and estimates in that of `win_rate`. `backend` is a name in
    `mopo_kernels.backends.BACKENDS`, or None for the table's choice; only "reference" can be differentiated twice.
    Raises ValueError for malformed arguments, unless called under torch.compile, where values cannot be looked at.
    Source: paper, Eq. 7 (clone); contrast is DPO's and regress is IPO's loss with several objectives (ours).
    """
    tensors = (logp, win_rate, group, multipliers, ref_logp, lag_log_ratio, kept)
    check = partial(_check_objective, *tensors, tau, eps, policy_step, primary, normalize)
    _check_devices(*tensors)
    name = backends.choose("objective", logp.device.type, backend).backend
    check(values=name == "reference")
    if name == "reference":
        return _torch_objective(*tensors, tau, float(eps), policy_step, normalize)

    loss, buffer = run_objective(
        *tensors,
        tau=float(tau),
        eps=float(eps),
        policy_step=policy_step,
        normalize=normalize,
        primary=primary,
        backend=name,
    )
    if not torch.compiler.is_compiling() and not ObjectiveValues.unpack(buffer, *win_rate.shape).valid:
        check(values=True)
        raise RuntimeError(f"backend {name!r} refuses values in which nothing is wrong: please report this")
    values = ObjectiveValues.unpack(buffer.to(win_rate.dtype, copy=True), *win_rate.shape)
    return MOPOOutput(
        loss=loss.to(logp.dtype),
        logp=logp,
        weights=values.weights,
        win_rates=values.win_rates,
        lower_bounds=values.lower_bounds,
        chi=values.chi,
        ess=values.ess,
        kl=values.kl,
        dropped_mass=values.dropped_mass,
    )


def _torch_objective(
    logp: Tensor,
    win_rate: Tensor,
    group: Tensor,
    multipliers: Tensor,
    ref_logp: Tensor | None,
    lag_log_ratio: Tensor | None,
    kept: Tensor | None,
    tau: float,
    eps: float,
    policy_step: PolicyStep,
    normalize: Normalize,
) -> MOPOOutput:
    target = target_policy(win_rate, group, multipliers, tau=tau, lag_log_ratio=lag_log_ratio, normalize=normalize)
    loss, dropped_mass = _policy_loss(logp, ref_logp, target, tau, policy_step, kept)
    lower_bounds, chi = target_bounds(target, eps)
    dtype = win_rate.dtype
    return MOPOOutput(
        loss=loss.to(logp.dtype),
        logp=logp,
        weights=target.weights.to(dtype),
        win_rates=target.win_rates().to(dtype),
        lower_bounds=lower_bounds.to(dtype),
        chi=chi.to(dtype),
        ess=target.ess().to(dtype),
        kl=target.kl().to(dtype),
        dropped_mass=dropped_mass.to(dtype),
    )


def _policy_loss(
    logp: Tensor,
    ref_logp: Tensor | None,
    target: TargetPolicy,
    tau: float,
    policy_step: PolicyStep,
    kept: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The loss and the dropped weight, both []."""
    groups, weights = target.groups, target.weights
    logp = logp.double()
    nothing_dropped = torch.zeros_like(target.groups.num_groups)
    if policy_step == "clone":
        if kept is None:
            return -groups.mean_of_sums(weights * logp), nothing_dropped
        loss = -groups.mean_of_sums(torch.where(kept, weights * logp, 0))
        return loss, groups.mean_of_sums(torch.where(kept, 0, weights))

    assert ref_logp is not None
    log_ratio = logp - ref_logp.double()
    if policy_step == "contrast":
        return -groups.mean_of_sums(weights * groups.log_softmax(log_ratio)), nothing_dropped
    size = groups.size
    error = log_ratio - (size - 1) / size * target.scores / tau
    centred = error - groups.sum(error) / size
    # The mean over the n(n-1)/2 pairs of squared differences is 2/(n-1) times the sum of squared deviations.
    return groups.mean_of_sums(2 / (size - 1) * centred**2), nothing_dropped


# --------------------------------------------------------------------------------------------------------- validators


def _check_objective(
    logp: Tensor,
    win_rate: Tensor,
    group: Tensor,
    multipliers: Tensor,
    ref_logp: Tensor | None,
    lag_log_ratio: Tensor | None,
    kept: Tensor | None,
    tau: float,
    eps: float,
    policy_step: PolicyStep,
    primary: int,
    normalize: Normalize,
    *,
    values: bool,
) -> None:
    """Raise unless these are arguments of `mopo_objective`; the values of tensors are looked at on demand."""
    check_batch(win_rate, group, multipliers, tau, lag_log_ratio, values=values)
    check_eps(eps)
    check_primary(multipliers, primary, values=values)
    check_choice("normalize", normalize, get_args(Normalize))
    check_choice("policy_step", policy_step, get_args(PolicyStep))
    _check_logp(logp, ref_logp, kept, policy_step, win_rate.shape[0], values=values)


def _check_devices(logp: Tensor, *others: Tensor | None) -> None:
    names = ("win_rate", "group", "multipliers", "ref_logp", "lag_log_ratio", "kept")
    for name, x in zip(names, others, strict=True):
        if x is not None and x.device != logp.device:
            raise ValueError(f"{name} is on {x.device} and logp on {logp.device}; move one of them")


def check_primary(multipliers: Tensor, primary: int, *, values: bool = True) -> None:
    if not 0 <= primary < multipliers.numel():
        raise ValueError(f"primary must be an objective 0 .. {multipliers.numel() - 1}; got {primary}")
    if values and not torch.compiler.is_compiling() and multipliers[primary] != 1:
        raise ValueError(
            f"multipliers must be 1 at the primary objective {primary}; got {multipliers[primary].item():g}: "
            "divide all of them by it, or change tau"
        )


def check_batch(
    win_rate: Tensor,
    group: Tensor,
    multipliers: Tensor,
    tau: float,
    lag_log_ratio: Tensor | None,
    *,
    values: bool = True,
) -> None:
    check_probabilities("win_rate", win_rate, values=values)
    check_group_ids(group, win_rate.shape[0])
    if values and not torch.compiler.is_compiling():
        check_group_sizes(group, dense_groups(group).size)
    check_lag(lag_log_ratio, win_rate.shape[0], values=values)
    check_tau(tau)
    _check_multipliers(multipliers, win_rate.shape[1], values=values)


def _check_multipliers(multipliers: Tensor, num_objectives: int, *, values: bool) -> None:
    if multipliers.shape != (num_objectives,):
        raise ValueError(
            f"multipliers must have one entry for each of win_rate's {num_objectives} objectives, the primary's too; "
            f"got {tuple(multipliers.shape)}"
        )
    if not values or torch.compiler.is_compiling():
        return
    if not ((multipliers >= 0) & multipliers.isfinite()).all():
        raise ValueError(f"multipliers must be finite and >= 0; got {multipliers.tolist()}")


def _check_comparisons(first: Tensor, second: Tensor, preference: Tensor, num_responses: int) -> None:
    shape = (preference.shape[0],)
    if first.shape != shape or second.shape != shape:
        raise ValueError(
            f"first and second must have one index for each of preference's {shape[0]} rows; "
            f"got {tuple(first.shape)} and {tuple(second.shape)}"
        )
    if torch.compiler.is_compiling() or shape[0] == 0:
        return
    for name, index in (("first", first), ("second", second)):
        if not ((index >= 0) & (index < num_responses)).all():
            raise ValueError(f"{name} must hold responses 0 .. {num_responses - 1}; got {index.min()} .. {index.max()}")
    if (first == second).any():
        row = int((first == second).nonzero()[0])
        raise ValueError(f"comparison {row} compares response {first[row]} with itself: drop it")
    pair = torch.minimum(first, second) * num_responses + torch.maximum(first, second)
    for objective in range(preference.shape[1]):
        pairs, labels = pair[~preference[:, objective].isnan()].unique(return_counts=True)
        if (labels > 1).any():
            low, high = divmod(int(pairs[labels > 1][0]), num_responses)
            raise ValueError(
                f"responses {low} and {high} are compared twice for objective {objective}: average their labels first"
            )


def check_ref_logp(ref_logp: Tensor | None, policy_step: PolicyStep, num_responses: int) -> None:
    if policy_step != "clone" and ref_logp is None:
        raise ValueError(f"policy_step={policy_step!r} needs ref_logp, the reference policy's log-probabilities")
    if ref_logp is not None and ref_logp.shape != (num_responses,):
        raise ValueError(
            f"ref_logp must have one entry for each of the {num_responses} responses; got {tuple(ref_logp.shape)}"
        )


def _check_logp(
    logp: Tensor,
    ref_logp: Tensor | None,
    kept: Tensor | None,
    policy_step: PolicyStep,
    num_responses: int,
    *,
    values: bool,
) -> None:
    for name, x in (("logp", logp), ("kept", kept)):
        if x is not None and x.shape != (num_responses,):
            raise ValueError(
                f"{name} must have one entry for each of the {num_responses} responses; got {tuple(x.shape)}"
            )
    check_ref_logp(ref_logp, policy_step, num_responses)
    if policy_step != "clone" and kept is not None:
        raise ValueError(f"policy_step={policy_step!r} needs every response's logp: kept works with 'clone' only")
    if not values or torch.compiler.is_compiling():
        return
    for name, x in (("logp", logp), ("ref_logp", ref_logp)):
        if x is None:
            continue
        bad = ~x.isfinite() if kept is None else kept & ~x.isfinite()
        if bad.any():
            row = int(bad.nonzero()[0])
            raise ValueError(
                f"{name} of response {row} is {x[row].item()}: the policy's hidden states or logits are not finite, "
                "or the response is empty"
            )
