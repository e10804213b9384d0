"""MOPO by the library's own operators, and what it is compared with, all on a table of responses.

A data set is groups of responses drawn from mu, as a user's is. The policy is a softmax over the table, its log-prob of
a response is what a language model's would be; nothing but the library's losses shapes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import brentq, minimize
from torch import Tensor

from bench.studies.tabular.problems import TAU, Problem
from mopo_kernels import DualSolution, MOPODual, label_statistics, mopo_weights, solve_dual
from mopo_kernels.objective.multipliers import UpdateRule
from mopo_kernels.objective.steps import STEPS, PolicyStep, step_target

Scores = NDArray[np.float64]  # [Y] what a policy tilts its reference by


class Groups(NamedTuple):
    """A data set of G groups of n responses; all tensors have B = G n rows."""

    win_rate: Tensor  # [B, K]
    group: Tensor  # [B]
    response: Tensor  # [B] which of the table's responses
    omega: Tensor | None = None  # [B] log pi_ref / mu where it is known
    halves: Tensor | None = None  # [2, B, K] win rates of two halves of the comparisons

    @property
    def size(self) -> int:
        """n, of every group."""
        return len(self.group) // (int(self.group[-1]) + 1)

    def batch(self, groups: Tensor) -> Groups:
        """The groups of these numbers."""
        rows = (groups[:, None] * self.size + torch.arange(self.size)).flatten()
        omega = None if self.omega is None else self.omega[rows]
        return Groups(self.win_rate[rows], self.group[rows], self.response[rows], omega)


def draw_groups(
    problem: Problem,
    groups: int,
    size: int,
    generator: np.random.Generator,
    *,
    hard: bool,
    weighted: bool = False,
) -> Groups:
    """Groups of iid draws from mu; a win rate is the mean of P_k, or of one draw of it, over the others of the group.

    `weighted` gives log pi_ref / mu along, as importance weights for the target.
    """
    response = generator.choice(len(problem.mu), size=(groups, size), p=problem.mu.numpy())
    outcome = problem.preference.numpy()[:, response[:, :, None], response[:, None, :]]  # [K, G, n, n]
    if hard:
        upper = np.triu(generator.random(outcome.shape) < outcome, 1)
        outcome = upper + np.tril(1 - np.swapaxes(upper, 2, 3), -1)
    flat = torch.from_numpy(response.ravel())
    omega = (problem.pi_ref / problem.mu).log()[flat] if weighted else None
    odd = np.add.outer(np.arange(size), np.arange(size)) % 2
    halves = torch.stack([_means(outcome, odd), _means(outcome, 1 - odd - np.eye(size))]) if size > 2 else None
    whole = _means(outcome, 1 - np.eye(size))
    return Groups(whole, torch.arange(groups).repeat_interleave(size), flat, omega, halves)


def against_others(problem: Problem, data: Groups, opponents: int, generator: np.random.Generator) -> Groups:
    """The same groups, each response labelled by one draw of P_k against each of so many fresh draws of mu."""
    other = generator.choice(len(problem.mu), size=(len(data.response), opponents), p=problem.mu.numpy())
    chance = problem.preference.numpy()[:, data.response[:, None], other]  # [K, B, opponents]
    return data._replace(win_rate=_rows((generator.random(chance.shape) < chance).mean(2)))


def _means(outcome: NDArray[np.float64], counted: NDArray[np.float64]) -> Tensor:  # [K, G, n, n], [n, n] -> [B, K]
    return _rows((outcome * counted).sum(3) / counted.sum(1))


def _rows(win_rate: NDArray[np.float64]) -> Tensor:  # [K, ...] -> [B, K]
    return torch.from_numpy(win_rate.reshape(len(win_rate), -1).T.copy())


def whole(problem: Problem) -> Groups:
    """All responses of the table as one group under their true win rates and pi_ref: labels without end."""
    responses = torch.arange(len(problem.mu))
    return Groups(problem.values.T.contiguous(), torch.zeros_like(responses), responses, problem.pi_ref.log())


def pooled(problem: Problem, data: Groups) -> Groups:
    """All labels of a data set as if one prompt's: each response under the mean of its win rates, in one group."""
    count = torch.bincount(data.response, minlength=len(problem.mu)).double()
    total = data.win_rate.new_zeros(len(count), data.win_rate.shape[1]).index_add(0, data.response, data.win_rate)
    return whole(problem)._replace(win_rate=total / count[:, None])  # NaN where a response was never drawn


# ---------------------------------------------------------------------------------------------------------- multipliers


def exact(data: Groups, thresholds: Tensor, *, eps: float = 0.0) -> DualSolution:
    return solve_dual(data.win_rate, data.group, thresholds, tau=TAU, eps=eps, lag_log_ratio=data.omega)


def crossed_multipliers(data: Groups, threshold: float) -> Tensor:  # [2]
    """The multiplier at which the secondary holds by comparisons that the weights have not seen.

    Weights of one half of the comparisons are judged by the win rates of the other half, and the other way round, so
    that luck is not counted twice. Raises ValueError where no multiplier holds.
    """
    assert data.halves is not None
    first, second = data.halves

    def slack(multiplier: float) -> float:
        multipliers = torch.tensor([1.0, multiplier], dtype=torch.float64)
        judged = [
            (mopo_weights(made, data.group, multipliers, tau=TAU) @ unseen[:, 1]) / (data.group[-1] + 1)
            for made, unseen in ((first, second), (second, first))
        ]
        return float(sum(judged)) / 2 - threshold

    found = 0.0 if slack(0.0) >= 0 else float(brentq(slack, 0.0, 100.0, xtol=1e-8))
    return torch.tensor([1.0, found], dtype=torch.float64)


def stepped_multipliers(
    data: Groups, thresholds: Tensor, rule: UpdateRule, *, steps: int, batch: int, seed: int = 0
) -> Iterator[Tensor]:  # [K] each
    """The multipliers after every update on a batch of so many groups, with the library's default rates."""
    dual = make_dual(thresholds, update=rule)
    for chosen in _batches(int(data.group[-1]) + 1, batch, steps, seed):
        part = data.batch(chosen)
        dual.update(part.win_rate, part.group, part.omega)
        yield dual.multipliers.clone()


def make_dual(thresholds: Tensor, **options: object) -> MOPODual:
    names = [f"objective {k}" for k in range(len(thresholds) + 1)]
    bounds = dict(zip(names[1:], thresholds.tolist(), strict=True))
    return MOPODual(names, primary=names[0], thresholds=bounds, tau=TAU, **options)  # type: ignore[arg-type]


def _batches(groups: int, batch: int, steps: int, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        yield torch.arange(groups) if batch >= groups else torch.randperm(groups, generator=generator)[:batch]


# ----------------------------------------------------------------------------------------------------------- the policy


def reference_logp(problem: Problem, step: PolicyStep, weighted: bool) -> Tensor:  # [Y]
    """What h is relative to. Where the weights carry pi_ref / mu, contrast compares with mu, whom the group is from."""
    return (problem.mu if weighted and step == "contrast" else problem.pi_ref).log()


def fit(problem: Problem, data: Groups, multipliers: Tensor, step: PolicyStep) -> Scores:  # [Y] a policy
    """The minimum of a policy step's loss over all policies of the table, from pi_ref on."""
    labels = label_statistics(data.win_rate, data.group, multipliers, tau=TAU, lag_log_ratio=data.omega)
    ref_logp = reference_logp(problem, step, data.omega is not None)[data.response]
    target = step_target(step, labels, ref_logp)

    def loss(logits: Scores) -> tuple[float, Scores]:
        leaf = torch.from_numpy(logits).requires_grad_()
        value = STEPS[step].loss(leaf.log_softmax(0)[data.response], target)
        (gradient,) = torch.autograd.grad(value, leaf)
        return value.item(), gradient.numpy()

    found = minimize(loss, problem.pi_ref.log().numpy(), jac=True, method="BFGS", options={"gtol": 1e-8})
    return softmax(found.x)


def target_win_rates(problem: Problem, data: Groups, multipliers: Tensor) -> Scores:  # [K]
    """What the target's weights truly win, whatever the labels said that the weights were made of."""
    weights = mopo_weights(data.win_rate, data.group, multipliers, tau=TAU, lag_log_ratio=data.omega)
    return (problem.values[:, data.response] @ weights / (data.group[-1] + 1)).numpy()


def softmax(logits: Scores) -> Scores:
    unnormalised = np.exp(logits - logits.max())
    return unnormalised / unnormalised.sum()


def tilt(problem: Problem, scores: Scores, scale: float = 1 / TAU) -> Scores:  # [Y] a policy
    """pi_ref exp(scale * scores), normalised."""
    return softmax(problem.pi_ref.log().numpy() + scale * scores)


def tilt_to(problem: Problem, scores: Scores, kl: float) -> Scores:  # [Y] a policy
    """The tilt by these scores that is so far from pi_ref, or as far as it gets."""

    def excess(log_scale: float) -> float:
        return problem.kl(tilt(problem, scores, np.exp(log_scale))) - kl

    if excess(12.0) <= 0:
        return tilt(problem, scores, np.exp(12.0))
    return tilt(problem, scores, np.exp(brentq(excess, -12.0, 12.0, xtol=1e-12)))


# ------------------------------------------------------------------------------------------------------------ baselines


def dpo_scores(preference: Scores, count: Scores) -> Scores:  # [Y, Y] both -> [Y]
    """What DPO (a Bradley-Terry fit) tilts by: argmin of -sum count P log sigmoid(r_y - r_y'), r of mean 0.

    A ridge of 1e-4 of the mean loss keeps it finite where few labels agree; it stands for stopping in time.
    """
    share = count / count.sum()

    def loss(r: Scores) -> tuple[float, Scores]:
        margin = r[:, None] - r[None]
        slope = -share * preference / (1 + np.exp(np.clip(margin, -500, 500)))  # in r_y; in r_y' its opposite
        value = (share * preference * np.logaddexp(0, -margin)).sum() + 0.5e-4 * (r @ r)
        return float(value), slope.sum(1) - slope.sum(0) + 1e-4 * r

    return minimize(loss, np.zeros(len(preference)), jac=True, method="BFGS", options={"gtol": 1e-10}).x


def pair_counts(data: Groups, responses: int) -> tuple[Scores, Scores]:  # [K, Y, Y], [Y, Y]
    """Mean labels of a data set of pairs, and how many there are, by which response met which."""
    first, second = data.response.reshape(-1, 2).T
    label = data.win_rate.T.reshape(data.win_rate.shape[1], -1, 2)[:, :, 0]  # [K, G]
    count = torch.zeros(responses, responses, dtype=torch.float64)
    count.index_put_((first, second), torch.ones(len(first), dtype=torch.float64), accumulate=True)
    wins = torch.zeros(len(label), responses, responses, dtype=torch.float64)
    for k, outcome in enumerate(label):
        wins[k].index_put_((first, second), outcome, accumulate=True)
        wins[k].index_put_((second, first), 1 - outcome, accumulate=True)
    count = count + count.T
    return (wins / count.clamp(min=1)).numpy(), count.numpy()


Family = Callable[[float], Scores]  # the secondary's share of the weight in [0, 1) -> what the policy is tilted by


def families(preference: Scores, values: Scores, count: Scores) -> dict[str, Callable[[NDArray[np.float64]], Scores]]:
    """Methods as what they tilt pi_ref by, given weights [K] that sum to 1."""
    rewards = np.array([dpo_scores(p, count) for p in preference])
    return {
        "weighted win rates": lambda weights: weights @ values,
        "DPO on weighted labels": lambda weights: dpo_scores(np.tensordot(weights, preference, 1), count),
        "one-shot dual + DPO": lambda weights: weights @ rewards,
    }


def at_threshold(problem: Problem, family: Family, threshold: float, kl: float) -> Scores:  # [Y] a policy
    """The member of a family that is so far from pi_ref and holds the secondary at its threshold.

    Raises ValueError where none does.
    """

    def slack(share: float) -> float:
        return float(problem.win_rates(tilt_to(problem, family(share), kl))[1]) - threshold

    if slack(0.0) >= 0:
        return tilt_to(problem, family(0.0), kl)
    return tilt_to(problem, family(float(brentq(slack, 0.0, 1.0, xtol=1e-10))), kl)
