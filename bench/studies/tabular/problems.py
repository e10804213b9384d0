"""Canonical preference structures over a handful of responses to one prompt.

Objective 0 is the primary. v_k(y) = E_{y' ~ mu} P_k(y beats y') is all that the optimum sees of P_k and mu.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

TAU = 0.08  # the library's default


@dataclass(frozen=True)
class Problem:
    """Preferences of one prompt. Everything is float64."""

    name: str
    preference: Tensor  # [K, Y, Y] P_k(y beats y')
    mu: Tensor  # [Y] who wrote the responses, and whom a response is compared with
    pi_ref: Tensor  # [Y]

    @property
    def values(self) -> Tensor:  # [K, Y]
        """v_k(y)."""
        return self.preference @ self.mu

    def win_rates(self, policy: ArrayLike) -> NDArray[np.float64]:  # [K]
        return self.values.numpy() @ np.asarray(policy)

    def kl(self, policy: ArrayLike) -> float:
        """KL(policy || pi_ref)."""
        p = np.asarray(policy)
        kept = p > 0
        return float(p[kept] @ np.log(p[kept] / self.pi_ref.numpy()[kept]))

    def worth(self, policy: ArrayLike, tau: float = TAU) -> float:
        """v_p - tau KL, what the optimum maximises."""
        return float(self.win_rates(policy)[0]) - tau * self.kl(policy)

    def thresholds(self, share: float) -> Tensor:  # [K-1]
        """Thresholds on the way from what is free to what a policy gets that looks at the secondaries only."""
        values = self.values
        free = values @ (self.pi_ref.log() + values[0] / TAU).softmax(0)
        devoted = values @ (self.pi_ref.log() + 10 * values[1:].mean(0) / TAU).softmax(0)
        return torch.lerp(free, devoted, share)[1:]


def bradley_terry(scores: ArrayLike) -> Tensor:  # [K, Y] -> [K, Y, Y]
    """P_k(y beats y') = sigmoid(score_y - score_y')."""
    s = torch.as_tensor(np.asarray(scores, dtype=np.float64))
    return (s[:, :, None] - s[:, None, :]).sigmoid()


CYCLE = torch.tensor([[0.5, 0.1, 0.9], [0.9, 0.5, 0.1], [0.1, 0.9, 0.5]], dtype=torch.float64)


def _problems() -> dict[str, Problem]:
    generator = np.random.default_rng(7)

    def distribution(concentration: float, responses: int) -> Tensor:
        return torch.from_numpy(generator.dirichlet(np.full(responses, concentration)))

    uniform = torch.full((6,), 1 / 6, dtype=torch.float64)
    helpful = np.array([2.0, 1.3, 0.4, -0.4, -1.1, -2.0])
    harmless = np.array([-2.0, -0.7, 0.6, 1.2, 1.5, 1.7])
    unrelated = np.array([0.3, -1.0, 1.6, -1.5, 1.2, -0.6])
    skewed = torch.tensor([0.40, 0.28, 0.16, 0.10, 0.04, 0.02], dtype=torch.float64)
    cycle_mu = torch.tensor([0.1, 0.2, 0.7], dtype=torch.float64)
    many_mu = distribution(2.0, 10)
    found = [
        Problem("aligned", bradley_terry([helpful, [1.4, 1.8, 0.7, -0.8, -0.7, -2.2]]), uniform, uniform),
        Problem("independent", bradley_terry([helpful, unrelated]), uniform, uniform),
        Problem("opposed", bradley_terry([helpful, harmless]), uniform, uniform),
        # A scorer decides: the higher score wins, always; labels have no noise but who the opponent happens to be.
        Problem("by a scorer", bradley_terry(1e6 * np.array([helpful, unrelated])), uniform, uniform),
        Problem("rock-paper-scissors", torch.stack([CYCLE, bradley_terry([[-2.0, 0.0, 2.0]])[0]]), cycle_mu, cycle_mu),
        # Four middling responses below the line that joins the two extremes.
        Problem(
            "concave", bradley_terry([[3, 0.2, -0.9, -1.4, -1.8, -3], [-3, -1.8, -1.4, -0.9, 0.2, 3]]), uniform, uniform
        ),
        Problem("skewed mu and pi_ref", bradley_terry([helpful, harmless]), skewed, skewed.flip(0)),
        Problem("three objectives", bradley_terry(_conflicting(generator, 3, 8)), *(distribution(3.0, 8),) * 2),
        Problem("five objectives", bradley_terry(_conflicting(generator, 5, 10)), many_mu, many_mu),
    ]
    return {problem.name: problem for problem in found}


def _conflicting(generator: np.random.Generator, objectives: int, responses: int) -> NDArray[np.float64]:
    """Scores of which a common part is taken out, so that no response is good at everything."""
    scores = generator.normal(size=(objectives, responses))
    return 1.8 * (scores - scores.mean(0))


PROBLEMS = _problems()
