"""The exact finite solver: MOPO on one prompt with Y responses, all probabilities known.

Used to check the theory and to draw exact Pareto fronts. With v_k(y) = sum_y' mu(y') P_k(y beats y'), the policy is
pi(y) ~ pi_ref(y) exp(sum_k lambda_k v_k(y) / tau), and its multipliers are those of one group whose reference weights
are pi_ref.

Source: Agnihotri et al., Multi-Objective Preference Optimization, arXiv 2505.10892, Eq. 3.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mopo_kernels.checks import check_tau
from mopo_kernels.objective.dataset import Bucket, GroupedLabels
from mopo_kernels.objective.dual import full_thresholds, solve_grouped


@dataclass(frozen=True)
class TabularSolution:
    """Tensors are float64."""

    policy: Tensor  # [Y]
    multipliers: Tensor  # [K], 1 at the primary
    win_rates: Tensor  # [K] E_policy[v_k]
    value: float  # v_p - tau KL(policy || pi_ref)


def solve_tabular(
    preference: Tensor,  # [K, Y, Y] P_k(y beats y'), with P(y, y') + P(y', y) = 1
    mu: Tensor,  # [Y] behaviour policy, which the opponents are drawn from
    pi_ref: Tensor,  # [Y]
    thresholds: Tensor | Sequence[float],  # [K-1], without the primary; -inf = no threshold
    *,
    tau: float,
    primary: int = 0,
) -> TabularSolution:
    """The policy that maximises v_p - tau KL(pi || pi_ref) subject to the thresholds, to about 1e-8 in win rate.

    Raises InfeasibleThresholds where no policy meets the thresholds, and ValueError for probabilities that are none.
    """
    preference, mu, pi_ref = preference.detach().double(), mu.detach().double(), pi_ref.detach().double()
    _check_preference(preference, mu.numel())
    _check_distribution("mu", mu)
    _check_distribution("pi_ref", pi_ref)
    check_tau(tau)
    bounds = full_thresholds(thresholds, preference.shape[0], primary).to(mu.device)

    support = pi_ref > 0  # elsewhere the policy is 0 as well
    values = (preference @ mu)[:, support]  # [K, Y]
    log_ref = (pi_ref[support] / pi_ref.sum()).log()
    one = torch.ones_like(mu[:1])
    labels = GroupedLabels(
        [Bucket(values[..., None], one.expand(len(values), 1), log_ref[:, None], one)], 1.0, one.expand(len(values))
    )
    solution = solve_grouped(labels, bounds, tau=tau, eps=0.0, primary=primary)
    policy = torch.zeros_like(pi_ref)
    policy[support] = (solution.multipliers @ values / tau + log_ref).softmax(0)
    return TabularSolution(policy, solution.multipliers, solution.win_rates, solution.value)


def _check_preference(preference: Tensor, num_responses: int) -> None:
    if preference.dim() != 3 or preference.shape[1:] != (num_responses, num_responses):
        raise ValueError(
            f"preference must be [objectives, responses, responses] for mu's {num_responses} responses; "
            f"got {tuple(preference.shape)}"
        )
    if not ((preference >= 0) & (preference <= 1)).all():
        raise ValueError("preference must lie in [0, 1]")
    if not torch.allclose(preference + preference.mT, torch.ones_like(preference), atol=1e-6):
        raise ValueError("preference[k, y, y'] + preference[k, y', y] must be 1")


def _check_distribution(name: str, probabilities: Tensor) -> None:
    if probabilities.dim() != 1 or (probabilities < 0).any() or abs(float(probabilities.sum()) - 1) > 1e-6:
        raise ValueError(f"{name} must be a distribution over responses: non-negative, summing to 1")
