"""Pareto fronts: which combinations of win rates the ideal policies reach as the thresholds move.

Two kinds of problem: a finite one (K preference matrices over Y responses, solved exactly), and labelled data. The
front is that of the problem with its KL penalty: as tau falls it approaches the front of all policies.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import moocore
import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm.auto import tqdm

from mopo_kernels import InfeasibleThresholds
from mopo_kernels.objective.tabular import solve_tabular
from mopo_trainer.commands.solve import Problem, Solution
from mopo_trainer.files import write_json
from mopo_trainer.report import plots
from mopo_trainer.report.tables import new_table
from mopo_trainer.thresholds import parse_thresholds


@dataclass(frozen=True)
class TabularProblem(Problem):
    """K preference matrices over the Y responses of one prompt."""

    name: str
    objectives: tuple[str, ...]
    responses: tuple[str, ...]
    P: Tensor  # [K, Y, Y], P[k, i, j] = probability that i beats j
    mu: Tensor  # [Y], who a response is compared with
    pi_ref: Tensor  # [Y]
    tau: float
    thresholds: Mapping[str, float]

    @property
    def headline(self) -> str:
        return f"{self.name}: {len(self.responses)} responses, primary {self.primary}, τ = {self.tau:g}"

    @property
    def reference(self) -> Tensor:
        return self.pi_ref @ self.win_rate

    @property
    def best_alone(self) -> Tensor:
        return self.win_rate[self.pi_ref > 0].amax(0)

    def solve_bounds(self, bounds: Tensor) -> Solution:
        found = solve_tabular(self.P, self.mu, self.pi_ref, bounds, tau=self.tau)
        kl = (float(found.win_rates[0]) - found.value) / self.tau
        return Solution(found.multipliers, found.win_rates, found.win_rates, kl)

    @property
    def win_rate(self) -> Tensor:  # [Y, K]
        """v_k(y) of every response."""
        return (self.P @ self.mu).T


# ---------------------------------------------------------------------------------------------- tabular problems


def _from_scores(scores: Sequence[Sequence[float]]) -> list[list[list[float]]]:
    """Bradley-Terry preferences P = sigmoid(score_i - score_j), one matrix per objective."""
    return [[[1 / (1 + math.exp(b - a)) for b in row] for a in row] for row in scores]


EXAMPLES: dict[str, dict[str, Any]] = {
    # The usual conflict: what helps most is least safe. One answer is worse on both and never gets on the front.
    "conflict": {
        "objectives": ["helpful", "harmless"],
        "responses": ["full answer", "with a warning", "in part", "polite refusal", "rude refusal"],
        "P": _from_scores([[2.0, 1.5, 0.6, -1.0, -2.0], [-2.0, -0.2, 0.7, 1.6, 0.5]]),
        "mu": [0.3, 0.2, 0.2, 0.2, 0.1],
    },
    # Rock, paper, scissors on `taste`: no reward model orders the three, yet each has its win rate against mu, which
    # mostly plays scissors.
    "cycle": {
        "objectives": ["taste", "brevity"],
        "responses": ["rock", "paper", "scissors"],
        "P": [[[0.5, 0.1, 0.9], [0.9, 0.5, 0.1], [0.1, 0.9, 0.5]], *_from_scores([[-2.0, 0.0, 2.0]])],
        "mu": [0.1, 0.2, 0.7],
    },
}


def is_tabular(path: Path) -> bool:
    """Whether a file is a tabular problem (a JSON object with `P`) rather than label data."""
    if path.suffix != ".json" or not path.is_file():
        return False
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return isinstance(content, dict) and "P" in content


def tabular_problem(
    content: Mapping[str, Any], name: str, *, primary: str | None = None, tau: float | None = None
) -> TabularProblem:
    """A tabular problem from its JSON object (`mopo pareto --help` states the keys).

    Args:
        primary, tau: replace the object's own.

    Raises:
        ValueError: names the key at fault and what it should hold.
    """
    try:
        matrices = torch.tensor(content["P"], dtype=torch.float64)
        num_objectives, num_responses = matrices.shape[0], matrices.shape[-1]
        if matrices.shape != (num_objectives, num_responses, num_responses) or num_objectives < 2:
            raise ValueError
    except (TypeError, ValueError, IndexError):
        raise ValueError(f"{name}: P must hold K ≥ 2 matrices of Y × Y numbers") from None
    names = _names(content, "objectives", num_objectives, "objective", name)
    first = _primary_index(primary if primary is not None else content.get("primary", 0), names, name)
    order = [first, *(k for k in range(num_objectives) if k != first)]
    mu = _distribution(content.get("mu", [1 / num_responses] * num_responses), "mu", num_responses, name)
    thresholds = content.get("thresholds", {})
    if isinstance(thresholds, list):
        if len(thresholds) != num_objectives - 1:
            raise ValueError(f"{name}: thresholds must hold {num_objectives - 1} numbers, or {{objective: win rate}}")
        thresholds = dict(zip([names[k] for k in order[1:]], thresholds, strict=True))
    return TabularProblem(
        name=name,
        objectives=tuple(names[k] for k in order),
        responses=tuple(_names(content, "responses", num_responses, "response", name)),
        P=matrices[order],
        mu=mu,
        pi_ref=_distribution(content["pi_ref"], "pi_ref", num_responses, name) if "pi_ref" in content else mu,
        tau=_temperature(content.get("tau", 0.08), name) if tau is None else tau,
        thresholds=parse_thresholds(thresholds),
    )


def example(name: str, *, primary: str | None = None, tau: float | None = None) -> TabularProblem:
    """A built-in problem of `EXAMPLES`."""
    if name not in EXAMPLES:
        raise ValueError(f"no example {name!r}; choose one of {', '.join(EXAMPLES)}")
    return tabular_problem(EXAMPLES[name], f"example {name}", primary=primary, tau=tau)


def load_tabular(path: Path, *, primary: str | None = None, tau: float | None = None) -> TabularProblem:
    """Read a tabular problem from a JSON file."""
    return tabular_problem(json.loads(path.read_text(encoding="utf-8")), path.name, primary=primary, tau=tau)


def _names(content: Mapping[str, Any], key: str, count: int, stem: str, source: str) -> list[str]:
    names = [str(name) for name in content.get(key, [f"{stem} {i}" for i in range(count)])]
    if len(names) != count or len(set(names)) != count:
        raise ValueError(f"{source}: {key} must hold {count} different names; got {names}")
    return names


def _primary_index(primary: str | int, names: Sequence[str], source: str) -> int:
    if primary in names:
        return names.index(str(primary))
    if isinstance(primary, int) and 0 <= primary < len(names):
        return primary
    raise ValueError(f"{source}: primary {primary!r} is none of the objectives: {', '.join(names)}")


def _temperature(value: Any, source: str) -> float:
    if isinstance(value, int | float):
        return float(value)
    raise ValueError(f"{source}: tau must be a number; got {value!r}")


def _distribution(values: Any, key: str, count: int, source: str) -> Tensor:
    try:
        p = torch.tensor(values, dtype=torch.float64)
    except (TypeError, ValueError):
        p = torch.empty(0)
    if p.shape != (count,) or not bool((p >= 0).all()) or abs(p.sum().item() - 1) > 1e-6:
        raise ValueError(f"{source}: {key} must hold {count} probabilities that sum to 1")
    return p / p.sum()


# ---------------------------------------------------------------------------------------------------- the front


def front(problem: Problem, points: int) -> dict[str, Any]:
    """Solve for many thresholds and keep what no other solution dominates.

    Each secondary's threshold is swept alone, from what comes for free to nearly the best; with several secondaries,
    twice as many combinations as a sweep has points are drawn from a Sobol sequence over the range that each objective
    takes in the sweeps. Those that cannot hold together are counted and left out.

    Returns:
        objectives, points: {thresholds, win_rates, multipliers, on_front} per solution, infeasible: how many,
        hypervolume: of all objectives and of each pair shown, from the reference point 0.
    """
    free, best = problem.solve({}).held, problem.best_alone
    shares = np.linspace(0, 0.99, points)  # at the best itself the multiplier is infinite
    wanted = [
        {name: float(free[k] + share * (best[k] - free[k]))}
        for k, name in enumerate(problem.objectives[1:], start=1)
        for share in shares
    ]
    found, swept = _solve_all(problem, wanted), len(wanted)
    if len(problem.secondaries) > 1:
        low = torch.tensor([point["win_rates"] for point in found]).amin(0)
        draws = torch.quasirandom.SobolEngine(len(low) - 1, scramble=True, seed=0).draw(2 * points)
        bounds = low[1:] + (best - low)[1:] * draws
        wanted += [dict(zip(problem.secondaries, row, strict=True)) for row in bounds.tolist()]
        found += _solve_all(problem, wanted[swept:])
    win_rates = np.array([point["win_rates"] for point in found])
    on_front = moocore.is_nondominated(win_rates, maximise=True, keep_weakly=True)
    return {
        "objectives": list(problem.objectives),
        "points": [{**point, "on_front": bool(kept)} for point, kept in zip(found, on_front, strict=True)],
        "infeasible": len(wanted) - len(found),
        "hypervolume": {
            "all": hypervolume(win_rates),
            "pairs": [
                {"objectives": [problem.objectives[k] for k in pair], "value": hypervolume(win_rates[:, pair])}
                for pair in plots.panel_pairs(len(problem.objectives))
            ],
        },
    }


def _solve_all(problem: Problem, wanted: Sequence[Mapping[str, float]]) -> list[dict[str, Any]]:
    found = []
    for thresholds in tqdm(wanted, desc="Solving", leave=False, disable=None):
        with suppress(InfeasibleThresholds):
            found.append(_point(problem, thresholds))
    return found


def hypervolume(win_rates: NDArray[np.float64]) -> float:
    """Volume of what a set of points [M, K] dominates, from the reference point 0."""
    return float(moocore.hypervolume(win_rates, ref=0.0, maximise=True))


def _point(problem: Problem, thresholds: Mapping[str, float]) -> dict[str, Any]:
    solution = problem.solve(thresholds)
    return {
        "thresholds": dict(thresholds),
        "win_rates": solution.win_rates.tolist(),
        "multipliers": solution.multipliers.tolist(),
    }


# ---------------------------------------------------------------------------------------------------------- output


def run_pareto(problem: Problem, thresholds: Mapping[str, float], *, points: int, output: Path) -> int:
    """Print the front, write `pareto.json` and `pareto.png` into `output`."""
    if not problem.secondaries:
        raise ValueError(f"a front needs two objectives; {problem.primary!r} is the only one here")
    chosen = _point(problem, thresholds) if thresholds else None
    found = front(problem, points)
    if chosen:
        found["chosen"] = chosen
    console = Console()
    console.print(problem.headline, style="bold", soft_wrap=True)
    console.print(_front_table(problem, found))
    _print_hypervolume(found, console)
    figure = _figure(problem, found, thresholds)
    files = [write_json(output / "pareto.json", found), plots.save_figure(figure, output / "pareto.png")]
    console.print(f"Written: {', '.join(map(str, files))}", soft_wrap=True)
    return 0


def _front_table(problem: Problem, found: Mapping[str, Any]) -> Table:
    """Up to nine points of the front in order of the primary's win rate, and the chosen one."""
    kept = sorted((p for p in found["points"] if p["on_front"]), key=lambda p: -p["win_rates"][0])
    shown = [kept[round(i * (len(kept) - 1) / 8)] for i in range(9)] if len(kept) > 9 else kept
    brackets = len(problem.objectives) <= 4  # more columns than these need the room
    title = "Along the front: win rates" + ", and multipliers in brackets" * brackets
    table = new_table(title, *problem.objectives)
    for point in shown:
        table.add_row(*_cells(point, brackets))
    if "chosen" in found:
        table.add_section()
        table.add_row(*_cells(found["chosen"], brackets), style="bold")
    return table


def _cells(point: Mapping[str, Any], brackets: bool) -> list[str]:
    first, *others = point["win_rates"]
    multipliers = [f" ({multiplier:.2f})" * brackets for multiplier in point["multipliers"][1:]]
    return [f"{first:.3f}", *(f"{rate:.3f}{price}" for rate, price in zip(others, multipliers, strict=True))]


def _print_hypervolume(found: Mapping[str, Any], console: Console) -> None:
    kept = sum(point["on_front"] for point in found["points"])
    solved = f"{kept} of {len(found['points'])} solutions on the front"
    if found["infeasible"]:
        solved += f", {found['infeasible']} more combinations of thresholds are not attainable"
    console.print(f"Hypervolume (reference 0): {found['hypervolume']['all']:.4f}; {solved}.", soft_wrap=True)
    if len(found["hypervolume"]["pairs"]) > 1:
        for pair in found["hypervolume"]["pairs"]:
            console.print(f"  {' × '.join(pair['objectives'])}: {pair['value']:.4f}", style="dim")


def _figure(problem: Problem, found: Mapping[str, Any], thresholds: Mapping[str, float]) -> Figure:
    marked: dict[str, Any] = {"reference policy": (problem.reference, None)}
    if "chosen" in found:
        marked["under the thresholds"] = (found["chosen"]["win_rates"], None)
    candidates, names = (problem.win_rate, problem.responses) if isinstance(problem, TabularProblem) else (None, ())
    return plots.plot_front(
        [point["win_rates"] for point in found["points"]],
        problem.objectives,
        candidates=candidates,
        candidate_names=names,
        marked=marked,
        thresholds=thresholds,
        subtitle=f"{problem.headline}; hypervolume {found['hypervolume']['all']:.3f}",
    )
