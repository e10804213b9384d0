"""What the best policy attains in the laboratory, and what labels of small groups say of it. Writes truth.json:

    python -m bench.studies.lab.truth bench/results/lab

Many notes of the base model a prompt give win rates close to those of the population, so the exact dual on them gives
the constrained optimum. The same notes dealt into groups of 2, 4 and 8 give the labels that training sees. What either
attains is scored against as many notes that were drawn anew.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor

from bench.studies.lab.contestants import BREVITY, RELEVANCE
from bench.studies.lab.data import asked_for, fresh_win_rate, win_rates, writer
from bench.studies.lab.language import OBJECTIVES, prompts, scores
from bench.studies.lab.model import sample
from mopo_kernels import mopo_weights, solve_dual
from mopo_trainer.files import write_json

PROMPTS, NOTES = 200, 32
TAU = 0.08
THRESHOLDS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="directory for truth.json")
    options = parser.parse_args()
    asked = prompts(999, PROMPTS, "train")
    values, others = (scores(asked, sample(writer("base")[0], asked, NOTES, seed=seed)) for seed in (5, 6))
    fresh = (1 + (values[:, :, None] - others[:, None]).sign().double().mean(2)).flatten(0, 1) / 2  # [prompts notes, K]
    found = {
        "correlations": {f"{a}, {b}": correlation(values, i, j) for i, j, a, b in pairs()},
        "optimum": [optimum(values, fresh, brevity) for brevity in THRESHOLDS],
        "groups": [of_groups(values, fresh, size, ask) for size in (2, 4, 8) for ask in asks(size)],
    }
    print(write_json(options.output / "truth.json", found).read_text())


def pairs() -> list[tuple[int, int, str, str]]:
    return [(i, j, OBJECTIVES[i], OBJECTIVES[j]) for i in range(3) for j in range(i + 1, 3)]


def asks(size: int) -> tuple[float, float]:
    return BREVITY, round(asked_for(BREVITY, size), 3)


def correlation(values: Tensor, i: int, j: int) -> float:
    """Rank correlation of two objectives' win rates over all notes."""
    rates = win_rates(values, 1.0, 0)
    return round(float(spearmanr(rates[:, i], rates[:, j]).statistic), 3)


def optimum(values: Tensor, fresh: Tensor, brevity: float) -> dict[str, Any]:
    """The constrained optimum on the population, thresholds on brevity and relevance."""
    rates, group = win_rates(values, 1.0, 0), torch.arange(PROMPTS).repeat_interleave(NOTES)
    solution = solve_dual(rates, group, [brevity, RELEVANCE], tau=TAU)
    weights = mopo_weights(rates, group, solution.multipliers, tau=TAU)
    return {
        "brevity": brevity,
        "multipliers": rounded(solution.multipliers),
        "win rates": rounded((weights[:, None] * fresh).sum(0) / PROMPTS),
        "kl": round((float(solution.win_rates[0]) - solution.value) / TAU, 4),
    }


def of_groups(values: Tensor, fresh: Tensor, size: int, brevity: float) -> dict[str, Any]:
    """The target of groups of a size: what the labels say it attains, and what it attains against fresh notes."""
    rates = win_rates(values.reshape(-1, size, 3), 1.0, 0)
    group = torch.arange(len(rates) // size).repeat_interleave(size)
    solution = solve_dual(rates, group, [brevity, RELEVANCE], tau=TAU)
    weights = mopo_weights(rates, group, solution.multipliers, tau=TAU)
    attained = (weights[:, None] * fresh).sum(0) / (len(rates) // size)
    return {
        "size": size,
        "brevity asked": brevity,
        "multipliers": rounded(solution.multipliers),
        "win rates on the labels": rounded(solution.win_rates),
        "win rates against fresh notes": rounded(attained),
        "brevity by the formula": round(fresh_win_rate(brevity, size), 4),
    }


def rounded(values: Tensor) -> list[float]:
    return [round(x, 4) for x in values.tolist()]


if __name__ == "__main__":
    main()
