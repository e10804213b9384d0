"""The truth by a generic constrained solver that knows nothing of duals: SLSQP over the probabilities themselves.

    maximise  v_p . pi - tau KL(pi || pi_ref)   subject to   v_k . pi >= b_k,  or LB_k(pi) >= b_k in a KL ball

Both are convex: the objective is concave, and LB_k, a minimum over q of functions linear in pi, is concave too.
"""

from __future__ import annotations

from typing import Any

import moocore
import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq, minimize

from bench.studies.tabular.problems import TAU, Problem

FLOOR = 1e-14  # of a probability, so that its logarithm exists


def best_policy(
    problem: Problem, thresholds: ArrayLike, *, tau: float = TAU, eps: float = 0.0
) -> NDArray[np.float64] | None:  # [Y]
    """The optimal policy; None where SLSQP finds no feasible one. Under eps the thresholds are on robust bounds."""
    values, ref = problem.values.numpy(), problem.pi_ref.numpy()
    bounds = np.asarray(thresholds, dtype=np.float64)

    def loss(policy: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        ratio = np.log(np.maximum(policy, FLOOR) / ref)
        return tau * policy @ ratio - values[0] @ policy, tau * (ratio + 1) - values[0]

    def slack(policy: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.array([robust_mean(policy, ref, v, eps)[0] for v in values[1:]]) - bounds

    def slope(policy: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.array([robust_mean(policy, ref, v, eps)[1] for v in values[1:]])

    held = {"type": "ineq", "fun": slack, "jac": slope}
    total = {"type": "eq", "fun": lambda policy: policy.sum() - 1, "jac": np.ones_like}
    starts = [ref, np.maximum(_devoted(values, ref), FLOOR)]
    found = [_slsqp(loss, start, [held, total], len(ref)) for start in starts]
    kept = [r for r in found if r.x.min() >= 0 and abs(r.x.sum() - 1) < 1e-9 and slack(r.x).min() > -1e-8]
    return min(kept, key=lambda r: r.fun).x if kept else None


def best_bound(problem: Problem, eps: float) -> float:
    """The largest robust bound of the first secondary that any policy has."""
    values, ref = problem.values.numpy()[1], problem.pi_ref.numpy()

    def loss(policy: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        bound, slope = robust_mean(np.maximum(policy, 0), ref, values, eps)
        return -bound, -slope

    total = {"type": "eq", "fun": lambda policy: policy.sum() - 1, "jac": np.ones_like}
    return -min(_slsqp(loss, start, [total], len(ref)).fun for start in (ref, _devoted(values[None], ref)))


def robust_mean(
    policy: NDArray[np.float64], ref: NDArray[np.float64], values: NDArray[np.float64], eps: float
) -> tuple[float, NDArray[np.float64]]:
    """min {E_q[rho v] : KL(q || ref) <= eps} with rho = policy / ref, by bisection, and its slope in the policy."""
    if eps == 0:
        return float(values @ policy), values
    x = policy / ref * values

    def tilted(t: float) -> NDArray[np.float64]:
        unnormalised = ref * np.exp(-t * (x - x.min()))
        return unnormalised / unnormalised.sum()

    def radius(log_t: float) -> float:
        q = tilted(np.exp(log_t))
        kept = q > 0
        return float(q[kept] @ np.log(q[kept] / ref[kept])) - eps

    reaches_lowest = radius(25.0) < 0
    q = tilted(np.exp(25.0 if reaches_lowest else brentq(radius, -25.0, 25.0, xtol=1e-13)))
    return float(q @ x), q / ref * values


def _slsqp(loss: Any, start: NDArray[np.float64], constraints: list[dict[str, Any]], responses: int) -> Any:
    return minimize(
        loss, start, jac=True, method="SLSQP", bounds=[(0, 1)] * responses, constraints=constraints,
        options={"ftol": 1e-15, "maxiter": 1000},
    )  # fmt: skip


def _devoted(values: NDArray[np.float64], ref: NDArray[np.float64]) -> NDArray[np.float64]:
    """A policy that looks at the last objectives only."""
    score = np.log(ref) + 5 * values[-max(1, len(values) - 1) :].mean(0) / TAU
    policy = np.exp(score - score.max())
    return policy / policy.sum()


# ----------------------------------------------------------------------------------------------------------- indicators


def indicators(points: ArrayLike, truth: ArrayLike) -> dict[str, float]:
    """How much of the true front [M, K] a method's points [N, K] reach; all of them are to be maximised."""
    points, truth = np.asarray(points), np.asarray(truth)
    volume = moocore.hypervolume(truth, ref=0.0, maximise=True)
    return {
        "hypervolume": float(moocore.hypervolume(points, ref=0.0, maximise=True) / volume),
        "igd_plus": float(moocore.igd_plus(points, truth, maximise=True)),
        "epsilon": float(moocore.epsilon_additive(points, ref=truth, maximise=True)),
    }


def largest_gap(points: ArrayLike) -> float:
    """The longest stretch of the secondary's win rate, between the points of a front [N, 2], that has none."""
    return float(np.diff(np.sort(np.asarray(points)[:, 1])).max())
