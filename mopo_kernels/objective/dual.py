"""The exact solver: the multipliers of a whole data set, what thresholds it allows, and which radius suits it.

For fixed multipliers the target policy is known in closed form (see target.py), so the constrained problem

    maximise  E_pi[v_p] - tau KL(pi || pi_ref)   subject to   E_pi[v_k] >= b_k

is a convex one in the K-1 multipliers alone. With c_k the fraction of groups that objective k labels (1 when all are)

    g(lambda)            = tau mean_x log E_ref exp(s / tau) - sum_k lambda_k c_k b_k
    d g / d lambda_k     = c_k (G_k - b_k)
    d2 g / d lambda2     = mean_x Cov_w(v) / tau

With eps > 0 the constraint is on the robust bound, LB_k(rho_lambda) >= b_k, which no longer is a gradient: the
multipliers then solve the complementarity problem 0 <= lambda_k, LB_k - b_k >= 0, one of the two being zero.

Source: Agnihotri et al., Multi-Objective Preference Optimization, arXiv 2505.10892, Algorithm 1; the exact solver is
ours.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mopo_kernels.checks import check_eps, check_positive, check_primary, check_tau
from mopo_kernels.objective.dataset import GroupedLabels, group_labels, policy_bounds, policy_moments, ratio_sample
from mopo_kernels.objective.robust import bound_and_chi, increasing_root, mean_and_variance, support_min, tilt

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
    check_positive(max_multiplier=max_multiplier)
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
    check_primary(primary, win_rate.shape[1])
    unconstrained = policy_bounds(labels, _one_hot(primary, labels), tau, float(eps))[0]
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
    check_primary(primary, win_rate.shape[1])
    check_beta(beta)
    return auto_eps_grouped(labels, beta=beta, primary=primary)


def auto_eps_grouped(labels: GroupedLabels, *, beta: float, primary: int) -> float:
    """`auto_eps` on labels that are already laid out."""
    secondaries = (1 - _one_hot(primary, labels)).nonzero()[:, 0]
    if secondaries.numel() == 0:
        return 0.0
    values, ref_weights, _ = ratio_sample(labels, torch.zeros_like(labels.labelled_groups), 1.0, secondaries)  # rho = 1
    mean = (values * ref_weights).sum(-1)
    slack = (1 - beta) * float(mean.min())
    radius = float(_radius_of_cost(values, ref_weights, slack).min()) if slack else 0.0
    return radius if radius < math.inf else 0.0


def largest_eps(
    win_rate: Tensor,  # [B, K]
    group: Tensor,  # [B]
    thresholds: Tensor | Sequence[float],  # [K-1], without the primary; -inf = no threshold
    *,
    tau: float,
    primary: int = 0,
) -> Tensor:  # [K]
    """The largest radius at which each threshold can be met if it alone is asked for.

    0 where the win rate itself does not reach the threshold, inf where every response does, and at objectives without
    one. Raises ValueError as `solve_dual` does.
    """
    labels = group_labels(win_rate, group, None)
    check_tau(tau)
    bounds = full_thresholds(thresholds, win_rate.shape[1], primary).to(win_rate.device)

    def largest(objective: int) -> float:
        def radius(values: Tensor, ref_weights: Tensor) -> float:
            cost = float((values * ref_weights).sum() - bounds[objective])
            return float(_radius_of_cost(values, ref_weights, cost)) if cost > 0 else 0.0

        return _largest_along(radius, labels, tau, primary, objective)

    asked = bounds.isfinite().tolist()
    return bounds.new_tensor([largest(k) if asked[k] else math.inf for k in range(bounds.numel())])


def _radius_of_cost(values: Tensor, ref_weights: Tensor, cost: float) -> Tensor:  # [C, M], [C, M] -> [C]
    """The radius at which the robust bound is `cost` > 0 below the mean; inf where even the smallest value is not."""
    mean, variance = mean_and_variance(values, ref_weights)
    affordable = mean - support_min(values, ref_weights) <= cost

    def excess_cost(t: Tensor) -> tuple[Tensor, Tensor]:
        tilted_mean, tilted_variance = mean_and_variance(values, tilt(values, ref_weights, t)[0])
        return mean - tilted_mean - cost, tilted_variance

    t = increasing_root(excess_cost, cost / variance.clamp(min=1e-30), tolerance=1e-9 * cost, skip=affordable)
    return tilt(values, ref_weights, t)[1].masked_fill(affordable, math.inf)


def _best_alone(labels: GroupedLabels, tau: float, eps: float, primary: int) -> Tensor:  # [K]
    """The best value of each objective if it alone had a threshold."""
    highest = torch.stack([bucket.values.amax(1) @ bucket.copies for bucket in labels.buckets]).sum(0)
    if eps == 0:
        return highest / labels.labelled_groups
    return highest.new_tensor([_best_bound(labels, tau, eps, primary, k) for k in range(highest.numel())])


def _best_bound(labels: GroupedLabels, tau: float, eps: float, primary: int, objective: int) -> float:
    """The largest LB_k over multipliers of k alone."""
    return _largest_along(
        lambda values, ref_weights: float(bound_and_chi(values, ref_weights, eps)[0]), labels, tau, primary, objective
    )


def _largest_along(
    measure: Callable[[Tensor, Tensor], float],  # of rho v[1, M] and their reference weights[1, M]
    labels: GroupedLabels,
    tau: float,
    primary: int,
    objective: int,
) -> float:
    """The largest `measure` over multipliers of one objective: a grid in the logarithm, golden sections at its best."""
    column = _one_hot(objective, labels).nonzero()[:, 0]

    def at(log2: float) -> float:
        multipliers = _one_hot(primary, labels) + tau * 2**log2 * _one_hot(objective, labels)
        values, ref_weights, _ = ratio_sample(labels, multipliers, tau, column)
        return measure(values, ref_weights)

    centre = max(range(-10, 18), key=at)
    low, high = centre - 1.0, centre + 1.0
    golden = (math.sqrt(5) - 1) / 2
    for _ in range(20):  # to 1e-4 in the logarithm, and the maximum is flat
        left, right = high - golden * (high - low), low + golden * (high - low)
        low, high = (left, high) if at(left) < at(right) else (low, right)
    return max(at((low + high) / 2), at(-math.inf))


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
    moments = policy_moments(labels, multipliers, tau)
    lower_bounds, chi = policy_bounds(labels, multipliers, tau, eps)
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
        moments = policy_moments(labels, problem.multipliers(free), tau)
        coverage = (labels.labelled_groups / labels.num_groups)[constrained]
        jacobian = moments.covariance[constrained][:, constrained] / tau / coverage[:, None]
        dual = tau * moments.log_partition - (free * coverage) @ thresholds
        return _Point(free, moments.win_rates[constrained] - thresholds, jacobian, float(dual))
    values, ref_weights, centred = ratio_sample(labels, problem.multipliers(free), tau, constrained)
    bound, chi = bound_and_chi(values, ref_weights, problem.eps)
    q, _ = tilt(values, ref_weights, (1 / chi).clamp(max=1e300))
    slack = bound - thresholds
    jacobian = (q * values) @ centred.T / tau  # q is the bound's derivative in rho v (envelope)
    return _Point(free, slack, jacobian, float(torch.minimum(free, slack).norm()))


def _line_search(problem: _Problem, point: _Point) -> _Point | None:
    direction = _direction(point)
    if not direction.any():  # the pivoting found no way out: a bound falls in its own multiplier
        return None
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
    return direction * (longest / max(longest, float(direction.abs().max())))


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
    return float(policy_moments(problem.labels, colder.multipliers(free), tau).win_rates[objective])


def _one_hot(objective: int, labels: GroupedLabels) -> Tensor:  # [K]
    one_hot = torch.zeros_like(labels.labelled_groups)
    one_hot[objective] = 1
    return one_hot


# --------------------------------------------------------------------------------------------------------- validators


def full_thresholds(thresholds: Tensor | Sequence[float], num_objectives: int, primary: int) -> Tensor:  # [K]
    """Thresholds with -inf inserted at the primary."""
    check_primary(primary, num_objectives)
    secondary = torch.as_tensor(thresholds, dtype=torch.float64).detach()
    if secondary.shape != (num_objectives - 1,):
        raise ValueError(
            f"thresholds must have one entry for each of the {num_objectives - 1} secondary objectives "
            f"(-inf = no threshold); got {tuple(secondary.shape)}"
        )
    if not (secondary < math.inf).all():
        raise ValueError(f"thresholds must be numbers below inf, or -inf for none; got {secondary.tolist()}")
    return torch.cat([secondary[:primary], secondary.new_full((1,), -math.inf), secondary[primary:]])


def _check_each_alone(problem: _Problem) -> None:
    """Raises InfeasibleThresholds for a threshold that no policy reaches even without the others."""
    excess = problem.thresholds - _best_alone(problem.labels, problem.tau, 0.0, problem.primary)
    if excess.max() <= TOLERANCE:
        return
    worst = int(excess.argmax())
    best = _best_alone(problem.labels, problem.tau, problem.eps, problem.primary)[worst]
    raise InfeasibleThresholds(worst, float(problem.thresholds[worst]), float(best))


def check_beta(beta: float) -> None:
    if not 0 <= beta <= 1:
        raise ValueError(f"the ratchet's beta must lie in [0, 1]; got {beta}")
