"""The multipliers: the exact solver of the dual over a data set, and `MOPODual`, which holds them during training.

For fixed multipliers the target policy is known in closed form (see `objective`), so the constrained problem

    maximise  E_pi[v_p] - tau KL(pi || pi_ref)   subject to   E_pi[v_k] >= b_k

is a convex one in the K-1 multipliers alone. With c_k the fraction of groups that objective k labels (1 when all are)

    g(lambda)            = tau mean_x log E_ref exp(s / tau) - sum_k lambda_k c_k b_k
    d g / d lambda_k     = c_k (G_k - b_k)
    d2 g / d lambda2     = mean_x Cov_w(v) / tau

With eps > 0 the constraint is on the robust bound, LB_k(rho_lambda) >= b_k, which no longer is a gradient: the
multipliers then solve the complementarity problem 0 <= lambda_k, LB_k - b_k >= 0, one of the two being zero.

Source: Agnihotri et al., Multi-Objective Preference Optimization, arXiv 2505.10892, Algorithm 1 and its barrier
variant; the exact solver is ours.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mopo_kernels.objective import (
    NEUTRAL,
    TargetPolicy,
    bound_and_chi,
    bound_at,
    check_batch,
    check_eps,
    check_group_ids,
    check_group_sizes,
    check_lag,
    check_probabilities,
    check_tau,
    increasing_root,
    mean_and_variance,
    target_bounds,
    target_policy,
    tilt,
)

UpdateRule = Literal["exact", "sgd", "barrier"]

TOLERANCE = 1e-8  # accepted violation of the optimality conditions, in win rate
TARGET_TOLERANCE = 1e-10  # where Newton stops: its last step costs little and gains several digits
MAX_MULTIPLIER = 1e4
PATH_TOLERANCE = 1e-6  # how closely the largest attainable thresholds are approached at eps > 0
MAX_STEPS = 200


class InfeasibleThresholds(ValueError):
    """No policy reaches the thresholds. Carries the objective to blame, its threshold and the best it can reach."""

    def __init__(self, objective: int | str, threshold: float, attainable: float) -> None:
        super().__init__(objective, threshold, attainable)
        self.objective = objective
        self.threshold = threshold
        self.attainable = attainable

    def __str__(self) -> str:
        return (
            f"thresholds cannot be met: objective {self.objective!r} must reach {self.threshold:.6g}, but at most "
            f"{self.attainable:.6g} is attainable beside the other thresholds; lower one of them"
        )


@dataclass(frozen=True)
class DualSolution:
    """Multipliers that solve the problem, and what the target policy achieves with them. Tensors are float64."""

    multipliers: Tensor  # [K], 1 at the primary
    win_rates: Tensor  # [K]
    lower_bounds: Tensor  # [K]; the win rates at eps = 0
    chi: Tensor  # [K]
    value: float  # mean over groups of v_p - tau KL
    iterations: int


def barrier_multipliers(
    slack: Tensor,  # [K-1] u = LB - b
    sigma: float,
    delta: float,
) -> Tensor:  # [K-1]
    """Multipliers of the log barrier: sigma / u for u >= delta, and sigma (2 - u / delta) / delta below.

    The second form is the derivative of the quadratic extension of -log: finite, and decreasing in u, where a threshold
    is violated. Raises ValueError unless sigma and delta are positive. Source: paper, MOPO-LB.
    """
    _check_positive(sigma=sigma, delta=delta)
    return torch.where(slack >= delta, sigma / slack.clamp(min=delta), sigma * (2 - slack / delta) / delta)


def solve_dual(
    win_rate: Tensor,  # [B, K] in [0, 1], NaN = unlabelled: the whole data set
    group: Tensor,  # [B] int64, any ids
    thresholds: Tensor | Sequence[float],  # [K-1], without the primary; -inf = no threshold
    *,
    tau: float,
    eps: float = 0.0,
    primary: int = 0,
    lag_log_ratio: Tensor | None = None,  # [B]
    max_multiplier: float = MAX_MULTIPLIER,
) -> DualSolution:
    """The multipliers under which the target policy meets the thresholds at the least cost to the primary objective.

    eps = 0: Newton with a line search on the convex dual, to 1e-8 in win rate. eps > 0: semismooth Newton on the
    complementarity problem, from the solution at eps = 0; as LB_k falls again once the target policy has concentrated
    on few responses, the solution with the smaller multipliers is the one returned, and a threshold above the best LB_k
    on the way is unattainable.

    Raises InfeasibleThresholds (its `objective` is a column of `win_rate`) where the thresholds cannot be met or would
    need a multiplier above `max_multiplier`, and ValueError for malformed labels, groups or settings.
    """
    labels = group_labels(win_rate, group, lag_log_ratio)
    check_tau(tau)
    check_eps(eps)
    _check_positive(max_multiplier=max_multiplier)
    bounds = full_thresholds(thresholds, win_rate.shape[1], primary).to(win_rate.device)
    return solve_grouped(labels, bounds, tau=tau, eps=float(eps), primary=primary, max_multiplier=max_multiplier)


def attainable_range(
    win_rate: Tensor,  # [B, K]
    group: Tensor,  # [B]
    *,
    tau: float,
    eps: float = 0.0,
    primary: int = 0,
    lag_log_ratio: Tensor | None = None,  # [B]
) -> tuple[Tensor, Tensor]:  # [K], [K]
    """What each objective gets without thresholds, and the best it could get if it alone had one.

    Win rates at eps = 0, lower bounds otherwise. A threshold between the two costs the primary something; several may
    be unattainable together. Raises ValueError as `solve_dual` does.
    """
    labels = group_labels(win_rate, group, lag_log_ratio)
    check_tau(tau)
    check_eps(eps)
    _check_primary(primary, win_rate.shape[1])
    unconstrained = _lower_bounds(labels, _one_hot(primary, labels), tau, float(eps))[0]
    return unconstrained, _best_alone(labels, tau, float(eps), primary)


def auto_eps(
    win_rate: Tensor,  # [B, K]
    group: Tensor,  # [B]
    *,
    beta: float,
    primary: int = 0,
    lag_log_ratio: Tensor | None = None,  # [B]
) -> float:
    """The KL radius whose cost at rho = 1 is the slack that the ratchet leaves there, (1 - beta) min_k G_k.

    The radius differs from objective to objective; the smallest is returned, so that none of the secondaries pays more.
    With it, thresholds beta G hold at rho = 1. The paper's eps = 0.15 violates them from the start: on hard-labelled
    pairs it costs 0.27 of a win rate of 0.5, a thousand times the slack of 2.5e-4 that beta = 0.9995 leaves.

    Raises ValueError for beta outside [0, 1] and for malformed labels.
    """
    labels = group_labels(win_rate, group, lag_log_ratio)
    _check_primary(primary, win_rate.shape[1])
    _check_beta(beta)
    secondaries = [k for k in range(win_rate.shape[1]) if k != primary]
    if not secondaries:
        return 0.0
    at_reference = _ratio_sample(labels, torch.zeros_like(labels.labelled_groups), tau=1.0)
    values, ref_weights = at_reference.ratio_values[secondaries], at_reference.ref_weights[secondaries]
    mean, variance = mean_and_variance(values, ref_weights)
    slack = (1 - beta) * float(mean.min())
    affordable = mean - torch.where(ref_weights > 0, values, math.inf).amin(-1) <= slack  # even the smallest value is
    if slack == 0 or affordable.all():
        return 0.0

    def excess_cost(t: Tensor) -> tuple[Tensor, Tensor]:
        tilted_mean, tilted_variance = mean_and_variance(values, tilt(values, ref_weights, t)[0])
        return mean - tilted_mean - slack, tilted_variance

    t = increasing_root(excess_cost, slack / variance.clamp(min=1e-30), tolerance=1e-9 * slack, skip=affordable)
    return float(tilt(values, ref_weights, t)[1][~affordable].min())


# ------------------------------------------------------------------------------------------------------ grouped labels


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
    check_lag(lag_log_ratio, win_rate.shape[0])
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


# --------------------------------------------------------------------------------- what the target policy achieves


class _Moments(NamedTuple):
    log_partition: Tensor  # [] mean over groups of log E_ref exp(s / tau)
    win_rates: Tensor  # [K] G_k
    covariance: Tensor  # [K, K] mean over groups of Cov_w(v)


class _RatioSample(NamedTuple):
    """The joint sample of all responses; M of them where identical groups are kept once."""

    ratio_values: Tensor  # [K, M] rho_i v_ik
    ref_weights: Tensor  # [K, M] r_i, over the groups that objective k labels; sums to 1
    centred: Tensor  # [K, M] v_ik - E_w[v_k], so that d rho_i / d lambda_k = rho_i centred_ik / tau


def _log_weights(bucket: Bucket, multipliers: Tensor, tau: float) -> tuple[Tensor, Tensor]:  # [n, N], [N]
    """log w_i and the log-partition function of each group."""
    logits = torch.tensordot(multipliers, bucket.values, 1) / tau + bucket.log_ref
    log_weight = logits.log_softmax(0)
    return log_weight, logits[0] - log_weight[0]


def _moments(labels: GroupedLabels, multipliers: Tensor, tau: float) -> _Moments:
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
    return _Moments(log_partition / labels.num_groups, total / labels.labelled_groups, covariance / labels.num_groups)


def _ratio_sample(labels: GroupedLabels, multipliers: Tensor, tau: float) -> _RatioSample:
    parts = []
    for bucket in labels.buckets:
        log_weight, _ = _log_weights(bucket, multipliers, tau)
        centred = bucket.values - (log_weight.exp() * bucket.values).sum(1, keepdim=True)
        ratio_values = (log_weight - bucket.log_ref).exp() * bucket.values
        share = bucket.labelled * bucket.copies / labels.labelled_groups[:, None]
        ref_weights = bucket.log_ref.exp() * share[:, None]
        parts.append((ratio_values.flatten(1), ref_weights.flatten(1), centred.flatten(1)))
    return _RatioSample(*(torch.cat(part, 1) for part in zip(*parts, strict=True)))


def _lower_bounds(labels: GroupedLabels, multipliers: Tensor, tau: float, eps: float) -> tuple[Tensor, Tensor]:
    """LB_k and chi_k, [K] both."""
    sample = _ratio_sample(labels, multipliers, tau)
    return bound_and_chi(sample.ratio_values, sample.ref_weights, eps)


def _best_alone(labels: GroupedLabels, tau: float, eps: float, primary: int) -> Tensor:  # [K]
    """The best value of each objective if it alone had a threshold."""
    highest = torch.stack([bucket.values.amax(1) @ bucket.copies for bucket in labels.buckets]).sum(0)
    if eps == 0:
        return highest / labels.labelled_groups
    return torch.stack([_best_bound(labels, tau, eps, primary, k) for k in range(highest.numel())])


def _best_bound(labels: GroupedLabels, tau: float, eps: float, primary: int, objective: int) -> Tensor:  # []
    """The largest LB_k over multipliers of k alone: a grid in the logarithm, then golden sections around its best."""

    def bound(log2: float) -> Tensor:
        multipliers = _one_hot(primary, labels) + tau * 2**log2 * _one_hot(objective, labels)
        return _lower_bounds(labels, multipliers, tau, eps)[0][objective]

    grid = range(-10, 18)
    centre = max(grid, key=lambda log2: float(bound(log2)))
    low, high = centre - 1.0, centre + 1.0
    golden = (math.sqrt(5) - 1) / 2
    for _ in range(40):
        left, right = high - golden * (high - low), low + golden * (high - low)
        low, high = (left, high) if bound(left) < bound(right) else (low, right)
    return torch.maximum(bound((low + high) / 2), bound(-math.inf))


# ----------------------------------------------------------------------------------------------------------- solver


class _Problem(NamedTuple):
    labels: GroupedLabels
    thresholds: Tensor  # [K]; -inf at the primary and wherever there is none
    tau: float
    eps: float
    primary: int
    max_multiplier: float

    @property
    def constrained(self) -> Tensor:  # [C] the objectives that have a threshold
        return self.thresholds.isfinite().nonzero()[:, 0]

    def multipliers(self, free: Tensor) -> Tensor:  # [C] -> [K]
        return _one_hot(self.primary, self.labels).index_copy(0, self.constrained, free)

    def without(self, objective: int) -> "_Problem":
        thresholds = self.thresholds.clone()
        thresholds[objective] = -math.inf
        return self._replace(thresholds=thresholds)


class _Point(NamedTuple):
    """The conditions 0 <= lambda, slack >= 0, complementary, at one value of the C free multipliers."""

    free: Tensor  # [C] lambda
    slack: Tensor  # [C] G - b, or LB - b
    jacobian: Tensor  # [C, C] d slack / d lambda
    merit: float  # falls along a Newton step that is short enough

    @property
    def residual(self) -> float:
        return float(torch.minimum(self.free, self.slack).abs().max()) if self.free.numel() else 0.0


def solve_grouped(
    labels: GroupedLabels,
    thresholds: Tensor,  # [K], -inf at the primary
    *,
    tau: float,
    eps: float,
    primary: int,
    max_multiplier: float = MAX_MULTIPLIER,
) -> DualSolution:
    """`solve_dual` on labels that are already laid out."""
    problem = _Problem(labels, thresholds, tau, eps, primary, max_multiplier)
    _check_each_alone(problem)
    free, iterations = _solve(problem)
    multipliers = problem.multipliers(free)
    moments = _moments(labels, multipliers, tau)
    lower_bounds, chi = _lower_bounds(labels, multipliers, tau, eps)
    secondaries = multipliers - _one_hot(primary, labels)
    coverage = labels.labelled_groups / labels.num_groups
    value = tau * moments.log_partition - (secondaries * coverage) @ moments.win_rates
    return DualSolution(multipliers, moments.win_rates, lower_bounds, chi, float(value), iterations)


def _solve(problem: _Problem) -> tuple[Tensor, int]:
    """The free multipliers [C] and the Newton steps taken."""
    free, steps = _solve_convex(problem._replace(eps=0.0))
    if problem.eps == 0:
        return free, steps
    free, robust_steps = _solve_robust(problem, free)
    return free, steps + robust_steps


def _solve_convex(problem: _Problem) -> tuple[Tensor, int]:
    """eps = 0: the minimum of the dual."""
    point, steps = _newton(problem, problem.thresholds.new_zeros(problem.constrained.numel()))
    if point.residual <= TOLERANCE:
        return point.free, steps
    if not _diverged(problem, point):
        raise ArithmeticError(f"the dual's Newton method stalled with a residual of {point.residual:.1e}")
    worst = int(problem.constrained[point.slack.argmin()])
    others = problem.without(worst)
    _solve_convex(others)  # where the others fail on their own, one of them is to blame
    raise InfeasibleThresholds(worst, float(problem.thresholds[worst]), _best_given(others, worst))


def _solve_robust(problem: _Problem, plain: Tensor) -> tuple[Tensor, int]:
    """eps > 0: Newton from the solution at eps = 0, or along the path on which the thresholds rise to their values.

    The bounds are not concave in the multipliers, and a solution may lie off the path: it did in 13 of 3,700 random
    problems. The farther starts found 9 of those; the others asked for at most 2.5% more than the path attains.
    """
    point, steps = _newton(problem, plain)
    if _solved(point):
        return point.free, steps
    free, reached, path_steps = _raise_thresholds(problem)
    steps += path_steps
    if torch.equal(reached, problem.thresholds):
        return free, steps
    for start in (3 * plain, plain + 0.5, plain + 1, plain + 2, plain + 2 * (plain > 0)):
        point, more_steps = _newton(problem, start)
        steps += more_steps
        if _solved(point):
            return point.free, steps
    worst = int(problem.constrained[_evaluate(problem, free).slack.argmin()])
    raise InfeasibleThresholds(worst, float(problem.thresholds[worst]), float(reached[worst]))


def _raise_thresholds(problem: _Problem) -> tuple[Tensor, Tensor, int]:
    """Follows the solution while the thresholds rise together from what lambda = 0 attains to their values.

    Returns the last solution [C], the thresholds [K] that it meets, and the Newton steps.
    """
    goal = problem.thresholds[problem.constrained]
    free = torch.zeros_like(goal)
    origin = goal + _evaluate(problem, free).slack.clamp(max=0)

    def between(fraction: float) -> _Problem:
        thresholds = torch.lerp(origin, goal, fraction)
        return problem._replace(thresholds=problem.thresholds.index_copy(0, problem.constrained, thresholds))

    fraction, stride, steps, in_a_row = 0.0, 1.0, 0, 0
    while fraction < 1 and stride > PATH_TOLERANCE:
        target = min(1.0, fraction + stride)
        point, newton_steps = _newton(between(target), free)
        steps += newton_steps
        if _solved(point):
            fraction, free, in_a_row = target, point.free, in_a_row + 1
            stride *= 2 if in_a_row > 2 else 1
        else:
            stride, in_a_row = stride / 2, 0
    return free, between(fraction).thresholds, steps


def _solved(point: _Point) -> bool:
    """Whether the conditions hold, on the branch where a larger multiplier still raises its bound."""
    if point.residual > TOLERANCE:
        return False
    active = point.free > 0
    slopes = torch.linalg.eigvals(point.jacobian[active][:, active])
    return bool((slopes.real >= -1e-9 * slopes.abs().sum()).all())  # 0 where two objectives have the same labels


def _newton(problem: _Problem, free: Tensor) -> tuple[_Point, int]:
    """Newton's method on the conditions, with an active set and a line search."""
    point = _evaluate(problem, free)
    for step in range(MAX_STEPS):
        if point.residual <= TARGET_TOLERANCE or _diverged(problem, point):
            return point, step
        trial = _line_search(problem, point)
        if trial is None or (point.residual <= TOLERANCE and trial.residual > point.residual / 2):
            return point, step
        point = trial
    return point, MAX_STEPS


def _evaluate(problem: _Problem, free: Tensor) -> _Point:
    labels, tau, constrained = problem.labels, problem.tau, problem.constrained
    thresholds = problem.thresholds[constrained]
    if problem.eps == 0:
        moments = _moments(labels, problem.multipliers(free), tau)
        coverage = (labels.labelled_groups / labels.num_groups)[constrained]
        jacobian = moments.covariance[constrained][:, constrained] / tau / coverage[:, None]
        dual = tau * moments.log_partition - (free * coverage) @ thresholds
        return _Point(free, moments.win_rates[constrained] - thresholds, jacobian, float(dual))
    sample = _ratio_sample(labels, problem.multipliers(free), tau)
    values, ref_weights = sample.ratio_values[constrained], sample.ref_weights[constrained]
    bound, chi = bound_and_chi(values, ref_weights, problem.eps)
    q, _ = tilt(values, ref_weights, (1 / chi).clamp(max=1e300))
    slack = bound - thresholds
    jacobian = (q * values) @ sample.centred[constrained].T / tau  # q is the bound's derivative in rho v (envelope)
    return _Point(free, slack, jacobian, float(torch.minimum(free, slack).norm()))


def _line_search(problem: _Problem, point: _Point) -> _Point | None:
    direction = _direction(point)
    rounding = 4e-15 * (1 + float(point.free.sum()))
    # A residual must fall by a good part of what Newton's model promises, lest the search creep where there is no root
    # (then the path takes over); the convex dual has its minimum however short the steps.
    required = 0.0 if problem.eps == 0 else point.merit / 4
    for halvings in range(20 if problem.eps == 0 else 6):
        length = 0.5**halvings
        trial = _evaluate(problem, (point.free + length * direction).clamp(min=0))
        if trial.merit < point.merit - length * required + rounding:
            return trial
    return None


def _direction(point: _Point) -> Tensor:  # [C]
    """The Newton direction d: 0 <= lambda + d, slack + J d >= 0, complementary, by Murty's principal pivoting.

    Which multipliers rest at 0 is part of the answer: with conflicting objectives their signs now are a poor guess.
    """
    free, slack, jacobian = point.free, point.slack, point.jacobian
    moving = (free > 0) | (slack < 0)
    direction = -free
    for _ in range(2 ** min(free.numel(), 6)):
        direction = -free
        direction[moving] = _solve_scaled(
            jacobian[moving][:, moving], -slack[moving] + jacobian[moving][:, ~moving] @ free[~moving]
        )
        wrong = torch.where(moving, free + direction < 0, slack + jacobian @ direction < -1e-14)
        if not wrong.any():
            break
        moving[wrong.nonzero()[0]] ^= True
    longest = max(1.0, 3 * float(free.max()))
    return direction * min(1.0, longest / float(direction.abs().max()))


def _solve_scaled(matrix: Tensor, right: Tensor) -> Tensor:
    """Solves matrix x = right, regularised: saturated objectives have derivatives many orders of magnitude apart."""
    scale = matrix.diagonal().abs().clamp(min=1e-30).sqrt()
    identity = torch.eye(scale.numel(), dtype=scale.dtype, device=scale.device)
    return torch.linalg.solve(matrix / (scale[:, None] * scale) + 1e-13 * identity, right / scale) / scale


def _diverged(problem: _Problem, point: _Point) -> bool:
    """Whether the thresholds are proven unattainable, or the multipliers have grown out of bounds.

    Every policy that meets the thresholds has a value of at most g(lambda) (weak duality), and no policy at all has one
    below E[min v_p] - tau E[max log 1/r].
    """
    if point.free.numel() and float(point.free.max()) > problem.max_multiplier:
        return True
    if problem.eps > 0:
        return False
    lowest = sum(
        (bucket.values[problem.primary].amin(0) + problem.tau * bucket.log_ref.amin(0)) @ bucket.copies
        for bucket in problem.labels.buckets
    )
    return point.merit < float(lowest) / problem.labels.num_groups - TOLERANCE


def _best_given(problem: _Problem, objective: int) -> float:
    """The best win rate of `objective` under the problem's thresholds: the dual with it as primary, as tau falls."""
    free = problem.thresholds.new_zeros(problem.constrained.numel())
    for tau in (0.1, 0.01, 1e-3, 1e-4):
        colder = problem._replace(primary=objective, tau=tau)
        free = _newton(colder, free)[0].free
    return float(_moments(problem.labels, colder.multipliers(free), tau).win_rates[objective])


def _one_hot(objective: int, labels: GroupedLabels) -> Tensor:  # [K]
    one_hot = torch.zeros_like(labels.labelled_groups)
    one_hot[objective] = 1
    return one_hot


# ------------------------------------------------------------------------------------------------------------ module


class MOPODual(nn.Module):
    """The multipliers of a training run and all that moves them, as float64 buffers that save and load with the model.

    Call `refresh` with the whole data set's labels before training and at every lag, and `update` with the batch's
    labels once a step; pass `multipliers` and `eps` to `mopo_loss`. Update rules:

        exact    `refresh` solves the dual over the data set; `update` only records the batch's estimates
        sgd      chi_k <- max(chi_min, chi_k - chi_lr (eps - KL(q_chi || r))), then
                 lambda_k <- max(0, lambda_k - multiplier_lr (LB_k - b_k))                        paper, Algorithm 1
        barrier  lambda_k <- lambda_k + multiplier_lr (barrier(LB_k - b_k) - lambda_k), where multiplier_lr = 1 is the
                 paper's MOPO-LB and a smaller one damps the noise of a batch (ours)

    An objective that the batch does not label keeps its multiplier and its estimates. Under torch.distributed `update`
    gathers the labels of all ranks, so that every rank takes the same step.

    Attributes: objectives, primary, secondaries (names), tau, rule, lag_steps.
    Buffers: multipliers[K], chi[K], win_rates[K], lower_bounds[K], thresholds[K-1] (in force), floors[K-1] (the
    user's), eps[] (NaN for "auto" until the first refresh), step[] int64.
    """

    multipliers: Tensor
    chi: Tensor
    win_rates: Tensor
    lower_bounds: Tensor
    thresholds: Tensor
    floors: Tensor
    eps: Tensor
    step: Tensor

    def __init__(
        self,
        objectives: Sequence[str],
        *,
        primary: str,
        thresholds: Mapping[str, float],  # of secondaries; one that is missing is unconstrained
        tau: float = 0.08,
        eps: float | Literal["auto"] = 0.0,  # KL radius of the robust bounds; the paper's 0.15 rarely is feasible
        update: UpdateRule = "exact",
        lag_steps: int | None = None,  # t0: steps between two refreshes; None = never
        ratchet_beta: float = 0.9995,  # beta
        chi_lr: float = 0.1,  # eta_chi
        chi_min: float = 1e-3,
        multiplier_lr: float = 0.02,  # eta_lambda; barrier: weight of the newest estimate
        sigma: float = 0.01,  # strength of the barrier: a binding threshold keeps a slack of about sigma / lambda
        delta: float = 0.02,  # slack below which the barrier is linear
        max_multiplier: float = MAX_MULTIPLIER,
    ) -> None:
        super().__init__()
        _check_names(objectives, primary, thresholds)
        _check_rule(update)
        check_tau(tau)
        if eps != "auto":
            check_eps(eps)
        _check_beta(ratchet_beta)
        _check_positive(
            chi_lr=chi_lr, chi_min=chi_min, multiplier_lr=multiplier_lr, sigma=sigma, delta=delta,
            max_multiplier=max_multiplier, lag_steps=1 if lag_steps is None else lag_steps,
        )  # fmt: skip
        self.objectives = list(objectives)
        self.primary = primary
        self.secondaries = [name for name in objectives if name != primary]
        self.tau = tau
        self.rule = update
        self.lag_steps = lag_steps
        self.ratchet_beta = ratchet_beta
        self.chi_lr, self.chi_min = chi_lr, chi_min
        self.multiplier_lr = multiplier_lr
        self.sigma, self.delta = sigma, delta
        self.max_multiplier = max_multiplier
        self._auto_eps = eps == "auto"

        count = len(self.objectives)
        floors = torch.tensor([thresholds.get(name, -math.inf) for name in self.secondaries], dtype=torch.float64)
        multipliers = torch.zeros(count, dtype=torch.float64)
        multipliers[self._primary_index] = 1
        self.register_buffer("multipliers", multipliers)
        self.register_buffer("chi", torch.full_like(multipliers, math.inf if eps == 0 else 1))
        self.register_buffer("win_rates", torch.full_like(multipliers, math.nan))
        self.register_buffer("lower_bounds", torch.full_like(multipliers, math.nan))
        self.register_buffer("thresholds", floors.clone())
        self.register_buffer("floors", floors)
        self.register_buffer("eps", torch.tensor(math.nan if eps == "auto" else eps, dtype=torch.float64))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    @property
    def slack(self) -> Tensor:  # [K-1]
        """LB_k - b_k of the last estimates; negative where a threshold is violated."""
        return self.lower_bounds[self._secondary_index] - self.thresholds

    @property
    def lag_due(self) -> bool:
        """Whether `lag_steps` more steps have been taken, and `refresh` is due with the new lag ratios."""
        return self.lag_steps is not None and int(self.step) > 0 and int(self.step) % self.lag_steps == 0

    @torch.no_grad()
    def refresh(
        self,
        win_rate: Tensor,  # [M, K] the whole data set
        group: Tensor,  # [M]
        lag_log_ratio: Tensor | None = None,  # [M] log pi_lag - log pi_ref0
        *,
        ratchet: bool = False,
    ) -> None:
        """Looks at the whole data set: resolves eps="auto", checks the thresholds, solves the dual under "exact".

        `ratchet=True` first sets every threshold to b = max(floor, beta G), G being what the policy of one lag ago, the
        new reference, attains on the data (rho = 1). Estimates and chi are those of the data set, under every rule.

        Raises InfeasibleThresholds, with the objective's name, where no policy can meet the thresholds.
        """
        self._check_columns(win_rate)
        win_rate, group = self._own(win_rate), self._own(group)
        lag_log_ratio = None if lag_log_ratio is None else self._own(lag_log_ratio)
        primary = self._primary_index
        if self._auto_eps:
            radius = auto_eps(win_rate, group, beta=self.ratchet_beta, primary=primary, lag_log_ratio=lag_log_ratio)
            self.eps.fill_(radius)
        if ratchet:
            at_reference = target_policy(
                win_rate, group, torch.zeros_like(self.multipliers), tau=self.tau, lag_log_ratio=lag_log_ratio
            )
            attained = at_reference.win_rates()[self._secondary_index]
            self.thresholds.copy_(torch.maximum(self.floors, self.ratchet_beta * attained))
        try:
            solution = solve_dual(
                win_rate, group, self.thresholds, tau=self.tau, eps=float(self.eps), primary=primary,
                lag_log_ratio=lag_log_ratio, max_multiplier=self.max_multiplier,
            )  # fmt: skip
        except InfeasibleThresholds as error:
            raise InfeasibleThresholds(
                self.objectives[int(error.objective)], error.threshold, error.attainable
            ) from None
        if self.rule == "exact":
            self.multipliers.copy_(solution.multipliers)
        target = target_policy(win_rate, group, self.multipliers, tau=self.tau, lag_log_ratio=lag_log_ratio)
        self._record(target.win_rates(), *target_bounds(target, float(self.eps)))

    @torch.no_grad()
    def update(
        self,
        win_rate: Tensor,  # [B, K] the batch of this rank
        group: Tensor,  # [B]
        lag_log_ratio: Tensor | None = None,  # [B]
    ) -> None:
        """One step of the update rule on a batch's labels.

        Raises InfeasibleThresholds where a multiplier outgrows `max_multiplier`, and RuntimeError where eps="auto" has
        not been resolved by a `refresh`.
        """
        if self.eps.isnan():
            raise RuntimeError('eps="auto" is resolved on the whole data set: call refresh before update')
        self._check_columns(win_rate)
        win_rate, group, lag_log_ratio = _gather_ranks(win_rate, group, lag_log_ratio)
        win_rate, group = self._own(win_rate), self._own(group)
        lag_log_ratio = None if lag_log_ratio is None else self._own(lag_log_ratio)
        check_batch(win_rate, group, self.multipliers, self.tau, lag_log_ratio)
        target = target_policy(win_rate, group, self.multipliers, tau=self.tau, lag_log_ratio=lag_log_ratio)
        if self.rule == "sgd":
            lower_bounds, chi = self._descend_chi(target)
        else:
            lower_bounds, chi = target_bounds(target, float(self.eps))
        self._record(target.win_rates(), lower_bounds, chi)
        self._move_multipliers(lower_bounds)
        self._check_multipliers(win_rate, group, lag_log_ratio)
        self.step += 1

    def _descend_chi(self, target: TargetPolicy) -> tuple[Tensor, Tensor]:  # [K], [K]
        """One gradient step on chi, and the bounds there."""
        values, ref_weights = target.ratio_sample()
        eps = float(self.eps)
        if eps == 0:
            return bound_and_chi(values, ref_weights, eps)
        _, kl = tilt(values, ref_weights, 1 / self.chi.clamp(min=self.chi_min))
        chi = (self.chi - self.chi_lr * (eps - kl)).clamp(min=self.chi_min)
        return bound_at(values, ref_weights, chi, eps), chi

    def _record(self, win_rates: Tensor, lower_bounds: Tensor, chi: Tensor) -> None:
        """Keeps the newest estimates; NaN is an objective that the batch does not label."""
        for buffer, new in ((self.win_rates, win_rates), (self.lower_bounds, lower_bounds), (self.chi, chi)):
            buffer.copy_(torch.where(new.isnan(), buffer, new))

    def _move_multipliers(self, lower_bounds: Tensor) -> None:
        if self.rule == "exact":
            return
        slack = lower_bounds[self._secondary_index] - self.thresholds
        old = self.multipliers[self._secondary_index]
        if self.rule == "sgd":
            new = (old - self.multiplier_lr * slack).clamp(min=0)
        else:
            new = old + self.multiplier_lr * (barrier_multipliers(slack, self.sigma, self.delta) - old)
        self.multipliers[self._secondary_index] = torch.where(slack.isnan(), old, new)

    def _check_multipliers(self, win_rate: Tensor, group: Tensor, lag_log_ratio: Tensor | None) -> None:
        """Raises InfeasibleThresholds where a multiplier has outgrown `max_multiplier`."""
        largest = int(self.multipliers.argmax())
        if self.multipliers[largest] <= self.max_multiplier or largest == self._primary_index:
            return
        labels = group_labels(win_rate, group, lag_log_ratio)
        best = _best_alone(labels, self.tau, float(self.eps), self._primary_index)[largest]
        name = self.objectives[largest]
        raise InfeasibleThresholds(name, float(self.thresholds[self.secondaries.index(name)]), float(best))

    @property
    def _primary_index(self) -> int:
        return self.objectives.index(self.primary)

    @property
    def _secondary_index(self) -> list[int]:
        return [index for index, name in enumerate(self.objectives) if name != self.primary]

    def _own(self, x: Tensor) -> Tensor:
        return x.to(self.multipliers.device)

    def _check_columns(self, win_rate: Tensor) -> None:
        if win_rate.dim() != 2 or win_rate.shape[1] != len(self.objectives):
            raise ValueError(
                f"win_rate must have one column for each of the objectives {', '.join(self.objectives)}; "
                f"got {tuple(win_rate.shape)}"
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "MOPODual":
        """Follows the model to its device but never to its dtype: multipliers in float16 would not resume exactly."""
        exact = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            if not buffer.is_meta:
                setattr(self, name, buffer.to(getattr(self, name).device))
        return self


def _gather_ranks(
    win_rate: Tensor, group: Tensor, lag_log_ratio: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The batches of all ranks as one; groups of different ranks stay different whatever their ids."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return win_rate, group, lag_log_ratio
    lag = None if lag_log_ratio is None else lag_log_ratio.cpu()
    batches: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(batches, (win_rate.cpu(), group.unique(return_inverse=True)[1].cpu(), lag))
    win_rates, groups, lags = zip(*batches, strict=True)
    offset = max(rows.shape[0] for rows in win_rates)
    distinct = torch.cat([ids + rank * offset for rank, ids in enumerate(groups)])
    return torch.cat(win_rates), distinct, None if lag is None else torch.cat(lags)


# --------------------------------------------------------------------------------------------------------- validators


def full_thresholds(thresholds: Tensor | Sequence[float], num_objectives: int, primary: int) -> Tensor:  # [K]
    """Thresholds with -inf inserted at the primary."""
    _check_primary(primary, num_objectives)
    secondary = torch.as_tensor(thresholds, dtype=torch.float64).detach()
    if secondary.shape != (num_objectives - 1,):
        raise ValueError(
            f"thresholds must have one entry for each of the {num_objectives - 1} secondary objectives "
            f"(-inf = no threshold); got {tuple(secondary.shape)}"
        )
    if not (secondary < math.inf).all():
        raise ValueError(f"thresholds must be numbers below inf, or -inf for none; got {secondary.tolist()}")
    return torch.cat([secondary[:primary], secondary.new_full((1,), -math.inf), secondary[primary:]])


def _check_primary(primary: int, num_objectives: int) -> None:
    if not 0 <= primary < num_objectives:
        raise ValueError(f"primary must be an objective 0 .. {num_objectives - 1}; got {primary}")


def _check_labelled(labelled_groups: Tensor) -> None:
    if (labelled_groups == 0).any():
        objective = int((labelled_groups == 0).nonzero()[0])
        raise ValueError(f"win_rate has no label for objective {objective}: every entry is NaN; drop the objective")


def _check_each_alone(problem: _Problem) -> None:
    """Raises InfeasibleThresholds for a threshold that no policy reaches even without the others."""
    excess = problem.thresholds - _best_alone(problem.labels, problem.tau, 0.0, problem.primary)
    if excess.max() <= TOLERANCE:
        return
    worst = int(excess.argmax())
    best = _best_alone(problem.labels, problem.tau, problem.eps, problem.primary)[worst]
    raise InfeasibleThresholds(worst, float(problem.thresholds[worst]), float(best))


def _check_positive(**settings: float) -> None:
    for name, value in settings.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be a positive number; got {value}")


def _check_beta(beta: float) -> None:
    if not 0 <= beta <= 1:
        raise ValueError(f"the ratchet's beta must lie in [0, 1]; got {beta}")


def _check_rule(rule: str) -> None:
    if rule not in get_args(UpdateRule):
        raise ValueError(f"update must be one of {', '.join(get_args(UpdateRule))}; got {rule!r}")


def _check_names(objectives: Sequence[str], primary: str, thresholds: Mapping[str, float]) -> None:
    repeated = {name for name in objectives if list(objectives).count(name) > 1}
    if repeated:
        raise ValueError(f"objectives must have different names; {', '.join(sorted(repeated))} stands there twice")
    if primary not in objectives:
        raise ValueError(f"primary must be one of the objectives {', '.join(objectives)}; got {primary!r}")
    for name, threshold in thresholds.items():
        if name == primary:
            raise ValueError(f"thresholds: {name!r} is the primary objective, which is maximised; drop its threshold")
        if name not in objectives:
            raise ValueError(f"thresholds: {name!r} is not one of the objectives {', '.join(objectives)}")
        if not threshold < math.inf:
            raise ValueError(f"thresholds: {name!r} must have a number below inf; got {threshold}")
