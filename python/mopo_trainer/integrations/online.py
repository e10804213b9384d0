"""Thresholds where responses are sampled from the policy itself: what is measured, and what it moves.

Section 1 of the method asks for the policy that maximises E_π[v_p] − τ KL(π ‖ π_ref) subject to E_π[v_k] ≥ b_k, with

    v_k(x, y) = E_{y' ~ μ}[P_k(y beats y' | x)],     P_k = 1, ½ or 0 as reward k of y is above, at or below that of y'

Offline the responses are μ's, and the target policy that the multipliers imply is estimated by weighting them. Online
the responses are the policy's own, so nothing is implied: E_π[v_k] is the plain mean over samples, with ρ = 1, and the
Lagrangian's two gradients are

    by the policy      E_π[∇log π(y|x) (s(x, y) − s̄(x))],     s = v_p + Σ_k λ_k v_k,   s̄ any baseline of the prompt
    by λ_k             E_π[v_k] − b_k,                        so λ_k ← max(0, λ_k − η (mean of v_k − b_k))

The opponents y' ~ μ must not be the policy's own samples: against itself every policy wins exactly ½ (P_k(y beats y') +
P_k(y' beats y) = 1), whatever it says, so that no threshold below ½ could ever bind, none above could ever be met, and
the multipliers would learn nothing. μ stays what it is while the policy moves: samples of the initial policy (at the
start every E_π[v_k] is then ½), or answers that the data hold.

Against scalarised rewards, Σ_k c_k r_k: a monotone change of a reward changes nothing here, since only its order counts
(with `rating_scale`, its differences); thresholds are shares of comparisons won, which can be said before training; and
the weights are found and move with what is measured, where the c_k must be guessed and stay.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mopo_kernels import InfeasibleThresholds, MOPODual


def measured_win_rates(
    rewards: Tensor,  # [N, K] of samples, the samples of a prompt side by side; NaN = not scored
    opponents: Tensor,  # [N, K] of opponents, as many of each prompt, in any order among them
    samples: int,  # of each prompt
    rating_scale: float | None = None,
) -> Tensor:  # [N, K] float64
    """v_ik: how often each sample beats its prompt's opponents; NaN where its reward or all of theirs are.

    P(i beats j) = sigmoid((r_i − r_j) / rating_scale); None: 1, ½ (equal) or 0.
    """
    ours, theirs = (x.double().unflatten(0, (-1, samples)) for x in (rewards, opponents))  # [G, n, K]
    difference = ours[:, :, None] - theirs[:, None]  # [G, n, n, K]
    if rating_scale is None:
        wins = torch.where(difference.isnan(), difference, (difference.sign() + 1) / 2)
    else:
        wins = (difference / rating_scale).sigmoid()
    return wins.nanmean(2).flatten(0, 1)


def wins(reward: float, opponents: Sequence[float], rating_scale: float | None = None) -> float:
    """`measured_win_rates` of one sample, where opponents are scored beside it."""
    ours, theirs = torch.full((len(opponents), 1), reward), torch.tensor(opponents)[:, None]
    return measured_win_rates(ours, theirs, len(opponents), rating_scale)[0].item()


def without_gaps(win_rate: Tensor, group: Tensor) -> Tensor:  # [N, K], [N] -> [N, K]
    """A sample that an objective does not score takes the mean of its prompt's others there, and so no side.

    NaN stays where no sample of the prompt is scored.
    """
    _, slot = group.unique(return_inverse=True)
    scored = ~win_rate.isnan()
    total, count = (
        torch.zeros_like(win_rate).index_add(0, slot, x) for x in (win_rate.nan_to_num(0), scored.to(win_rate.dtype))
    )
    return torch.where(scored, win_rate, (total / count)[slot])


def mean_win_rates(win_rate: Tensor, group: Tensor) -> Tensor:  # [N, K], [N] -> [K]
    """E_π[v_k]: the mean over samples of the prompts that objective k scores; NaN where there is none."""
    return without_gaps(win_rate, group).nanmean(0)


def scored_groups(win_rate: Tensor, group: Tensor) -> list[int]:  # [N, K], [N] -> K
    """Of how many prompts each objective scores a sample: what its averages weigh beside those of other batches."""
    return [len(group[~column.isnan()].unique()) for column in win_rate.T]


class MeasuredDual(MOPODual):
    """Multipliers that move by win rates measured on the policy's own samples, not by those that its target implies.

    Args:
        multiplier_lr: η, how far a multiplier moves in a step for each unit of slack.

    Raises:
        ValueError: names that are none of the objectives.
        InfeasibleThresholds: a threshold above 1. What else is out of reach shows as slack that stays negative while
            the multiplier grows: what a policy can learn is not known before.
    """

    def __init__(
        self, objectives: Sequence[str], primary: str, thresholds: Mapping[str, float], multiplier_lr: float
    ) -> None:
        super().__init__(objectives, primary=primary, thresholds=thresholds, update="sgd", multiplier_lr=multiplier_lr)
        for name, threshold in thresholds.items():
            if threshold > 1:
                raise InfeasibleThresholds(name, threshold, 1.0)

    @torch.no_grad()
    def measure(self, mean: Tensor) -> None:  # [K] measured win rates of a batch; NaN = not scored
        """One step of λ_k ← max(0, λ_k − η (mean of v_k − b_k)); what is not scored stays as it is."""
        mean = mean.to(self.multipliers)
        self._record(mean, mean, torch.full_like(mean, math.inf))
        self._move_multipliers(mean)
        self.step += 1

    def metrics(self, mean: Tensor) -> dict[str, float]:  # [K]
        """Measured win rates beside what is in force, under MOPOTrainer's names; nothing of what is not scored."""
        found: dict[str, float] = {}
        thresholds = dict(zip(self.secondaries, self.thresholds.tolist(), strict=True))
        for name, win_rate, multiplier in zip(self.objectives, mean.tolist(), self.multipliers.tolist(), strict=True):
            found |= {f"win_rate/{name}": win_rate, f"multiplier/{name}": multiplier}
            if thresholds.get(name, -math.inf) > -math.inf:
                found |= {f"threshold/{name}": thresholds[name], f"slack/{name}": win_rate - thresholds[name]}
        return {key: value for key, value in found.items() if not math.isnan(value)}
