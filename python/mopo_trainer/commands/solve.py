"""What thresholds cost, from the labels alone: no model, seconds, before anyone pays for a GPU.

The weights that MOPO trains towards depend on labels and multipliers only. Solving the dual over the whole data set
therefore says which thresholds are attainable, the multipliers that attain them, and the primary's win rate that is
left. These are win rates of the target π* over the labelled responses; a trained model approaches them at best.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mopo_kernels import InfeasibleThresholds, robust_bound
from mopo_kernels.checks import check_eps, check_tau
from mopo_kernels.objective.dataset import GroupedLabels, group_labels
from mopo_kernels.objective.dual import attainable_range, auto_eps, full_thresholds, largest_eps, solve_grouped
from mopo_trainer import data
from mopo_trainer.commands import findings
from mopo_trainer.commands.findings import PAPER_EPS
from mopo_trainer.data.scorers import load_scorers
from mopo_trainer.files import write_json
from mopo_trainer.names import did_you_mean, it_has
from mopo_trainer.report import plots
from mopo_trainer.report.evaluate import Interval
from mopo_trainer.report.evidence import (
    are_sure,
    intervals_over_prompts,
    prompt_win_rates,
    rank_correlations,
    usual_size,
)
from mopo_trainer.report.tables import new_table

RATCHET_BETA = 0.9995  # the paper's, and the trainer's default: what eps="auto" is measured by
EPS_GRID = [float(f"{digits}e{exponent}") for exponent in range(-7, -1) for digits in range(10, 100)]  # 1e-6 .. 0.99
EPS_STRIDE = 45  # half a decade of it


@dataclass(frozen=True)
class Solution:
    """The ideal policy of a problem under some thresholds; all float64 [K]."""

    multipliers: Tensor  # 1 at the primary
    win_rates: Tensor
    held: Tensor  # what thresholds are compared with: the win rates, or robust lower bounds
    kl: float  # from the reference policy, mean over prompts


class Problem(ABC):
    """Objectives, the primary first, and the solution for any thresholds on the others."""

    objectives: tuple[str, ...]

    @property
    @abstractmethod
    def headline(self) -> str:
        """The problem in one line."""

    @property
    @abstractmethod
    def reference(self) -> Tensor:
        """Win rates of the reference policy, [K]."""

    @property
    @abstractmethod
    def best_alone(self) -> Tensor:
        """The best that each objective can reach if it alone has a threshold, [K]."""

    @abstractmethod
    def solve_bounds(self, bounds: Tensor) -> Solution:
        """Solution for thresholds [K-1] in column order, -inf = none."""

    @property
    def primary(self) -> str:
        return self.objectives[0]

    @property
    def secondaries(self) -> tuple[str, ...]:
        return self.objectives[1:]

    def solve(self, thresholds: Mapping[str, float]) -> Solution:
        """The ideal policy under `thresholds`; objectives without one are unconstrained.

        Raises:
            ValueError: a threshold on the primary or on an unknown objective.
            InfeasibleThresholds: by the objective's name.
        """
        for name in thresholds:
            if name == self.primary:
                raise ValueError(f"threshold on {name!r}: it is the primary, which is maximised, not held")
            if name not in self.objectives:
                known = ", ".join(self.secondaries) or "none"
                near = did_you_mean(name, self.secondaries)
                raise ValueError(f"threshold on unknown objective {name!r}; the secondaries here are: {known}{near}")
        try:
            return self.solve_bounds(self.bounds(thresholds))
        except InfeasibleThresholds as error:
            name = self.objectives[int(error.objective)]
            raise InfeasibleThresholds(name, error.threshold, error.attainable) from None

    def bounds(self, thresholds: Mapping[str, float]) -> Tensor:
        """Thresholds [K-1] in column order, -inf = none."""
        return torch.tensor([thresholds.get(name, -math.inf) for name in self.secondaries], dtype=torch.float64)

    def best(self, objective: str, others: Mapping[str, float]) -> float:
        """A threshold on `objective` that holds together with `others`, within 1% of the largest such one.

        `others` must be attainable.
        """
        k = self.objectives.index(objective)
        high = float(self.best_alone[k])
        if not others:
            return high
        low = float(self.solve(others).held[k])
        precision = 0.01 * (high - low)
        while high - low > precision:
            middle = (low + high) / 2
            try:
                self.solve({**others, objective: middle})
                low = middle
            except InfeasibleThresholds:
                high = middle
        return low


@dataclass(frozen=True)
class LabelProblem(Problem):
    """Labels of a data set."""

    source: str
    objectives: tuple[str, ...]
    win_rate: Tensor  # [M, K], NaN = unlabelled
    group: Tensor  # [M]
    tau: float
    eps: float

    @property
    def headline(self) -> str:
        groups, responses = self.group.unique().numel(), self.group.numel()
        radius = f", ε = {self.eps:g}" if self.eps else ""
        return (
            f"{Path(self.source).name}: {groups:,} groups, {responses:,} responses, "
            f"primary {self.primary}, τ = {self.tau:g}{radius}"
        )

    @cached_property
    def _grouped(self) -> GroupedLabels:
        return group_labels(self.win_rate, self.group, None)

    @property
    def reference(self) -> Tensor:
        free = torch.full((len(self.objectives),), -math.inf, dtype=torch.float64)
        return solve_grouped(self._grouped, free, tau=1e9, eps=0.0, primary=0).win_rates  # π* tends to π_ref as τ grows

    @cached_property
    def best_alone(self) -> Tensor:
        return attainable_range(self.win_rate, self.group, tau=self.tau, eps=self.eps)[1]

    def solve_bounds(self, bounds: Tensor) -> Solution:
        thresholds = full_thresholds(bounds, len(self.objectives), primary=0)
        found = solve_grouped(self._grouped, thresholds, tau=self.tau, eps=self.eps, primary=0)
        covered = float(self._grouped.labelled_groups[0]) / self._grouped.num_groups  # by the primary's labels
        kl = (covered * float(found.win_rates[0]) - found.value) / self.tau
        return Solution(found.multipliers, found.win_rates, found.lower_bounds, kl)

    @property
    def group_size(self) -> int:
        """The usual number of responses to a prompt."""
        return usual_size(self.group)

    def largest_eps(self, thresholds: Mapping[str, float]) -> Tensor:
        """The largest eps at which each threshold can be met if it alone is asked for, [K], inf where none is."""
        return largest_eps(self.win_rate, self.group, self.bounds(thresholds), tau=self.tau)

    def intervals(self, solution: Solution, objectives: Sequence[str]) -> dict[str, Interval]:
        """95% intervals over prompts of a solution's win rates."""
        rates = prompt_win_rates(self.win_rate, self.group, solution.multipliers, self.tau)
        columns = [self.objectives.index(name) for name in objectives]
        return dict(zip(objectives, intervals_over_prompts(rates[:, columns]), strict=True))


def load_problem(
    source: str,
    *,
    primary: str | None = None,
    objectives: Sequence[str] = (),
    split: str = "train",
    scorers: Sequence[str] = (),
    tau: float = 0.08,
    eps: float | Literal["auto"] = 0.0,
    on_bad_row: Literal["error", "skip"] = "error",
    **reading: Any,
) -> LabelProblem:
    """Read label data (`mopo_trainer.data.to_groups`) and put the primary first.

    Args:
        primary: the objective to maximise; None takes the first that the data names.
        eps: radius of the robust bounds, "auto" as `mopo_kernels.objective.dual.auto_eps` finds it.
        objectives: the secondaries to keep; all of them if empty.
        on_bad_row: "skip" leaves out rows that cannot be read and counts them.
        reading: further options of `to_groups`.

    Raises:
        DataError: data that cannot be read.
        ValueError: tau or eps out of range, a primary or an objective that the data does not carry.
    """
    check_tau(tau)
    if eps != "auto":
        check_eps(eps)
    rows = data.load_rows(source, split=split, on_bad_row=on_bad_row)
    groups = data.to_groups(rows, scorers=load_scorers(scorers), on_bad_row=on_bad_row, **reading)
    names = data.objectives(groups)
    for wanted in filter(None, (primary, *objectives)):
        if wanted not in names:
            raise ValueError(f"{source} has no objective {wanted!r}; {it_has(wanted, names)}")
    first = primary or (objectives or names)[0]
    order = (first, *(name for name in names if name != first and (not objectives or name in objectives)))
    win_rate, group = data.labels(groups, order)
    radius = auto_eps(win_rate, group, beta=RATCHET_BETA) if eps == "auto" else eps
    return LabelProblem(source, order, win_rate, group, tau, radius)


# ---------------------------------------------------------------------------------------------------------- analysis


def analyse(problem: LabelProblem, thresholds: Mapping[str, float], *, points: int = 21) -> dict[str, Any]:
    """All that `mopo solve` reports, as plain numbers (its JSON file holds exactly this).

    Raises:
        InfeasibleThresholds: names the objective, its threshold and the best attainable value.
    """
    sweeps = [sweep(problem, thresholds, name, points) for name in problem.secondaries]
    return summary(problem, thresholds) | {"sweeps": sweeps}


def summary(problem: LabelProblem, thresholds: Mapping[str, float]) -> dict[str, Any]:
    """`analyse` without the sweeps."""
    chosen = problem.solve(thresholds)
    largest = problem.largest_eps(thresholds).tolist()
    return {
        "source": problem.source,
        "groups": problem.group.unique().numel(),
        "responses": problem.group.numel(),
        "group_size": problem.group_size,
        "tau": problem.tau,
        "eps": problem.eps,
        "primary": problem.primary,
        "objectives": objective_rows(problem, thresholds, chosen, largest),
        "rank_correlations": rank_correlations(problem.win_rate),
        "kl": chosen.kl,
        "safe": safe_solution(problem, thresholds, chosen, min(largest)),
        "bound_of_one": bound_of_one(problem.group_size, PAPER_EPS),
    }


def objective_rows(
    problem: LabelProblem, thresholds: Mapping[str, float], chosen: Solution, largest: Sequence[float]
) -> list[dict[str, Any]]:
    """Per objective: what comes for free, the best attainable, and under the thresholds win rate, multiplier, cost."""
    free = problem.solve({}) if thresholds else chosen
    reference = problem.reference
    free_intervals, intervals = (problem.intervals(x, problem.objectives) for x in (free, chosen))
    rows = []
    for k, name in enumerate(problem.objectives):
        asked = name in thresholds
        others = {other: bound for other, bound in thresholds.items() if other != name}
        rows.append(
            {
                "objective": name,
                "labelled_groups": problem.group[~problem.win_rate[:, k].isnan()].unique().numel(),
                "reference": float(reference[k]),
                "free": float(free.held[k]),
                "free_win_rate": float(free.win_rates[k]),
                "free_interval": [*free_intervals[name][1:]],
                "best": None if k == 0 else float(problem.best_alone[k]),
                "threshold": thresholds.get(name),
                "win_rate": float(chosen.win_rates[k]),
                "interval": [*intervals[name][1:]],
                "lower_bound": float(chosen.held[k]),
                "multiplier": float(chosen.multipliers[k]),
                "cost": float(problem.solve(others).win_rates[0] - chosen.win_rates[0]) if asked else None,
                "largest_eps": largest[k] if asked and math.isfinite(largest[k]) else None,
                "sure": are_sure(problem.win_rate[:, k], problem.group),
            }
        )
    return rows


def safe_solution(
    problem: LabelProblem, thresholds: Mapping[str, float], chosen: Solution, largest: float
) -> dict[str, Any] | None:
    """The smallest eps of two digits whose solution is safe, and that solution; None if none is, or none is asked for.

    Safe: every threshold lies below the interval over prompts of the win rate that holds it. A radius makes win rates
    exceed their thresholds, this one by as much as other prompts of the kind may take away.

    Args:
        chosen: the solution at the problem's own eps.
        largest: no larger eps is tried; where there is no solution, the solver needs seconds to find that out.
    """
    solutions: dict[float, Solution | None] = {problem.eps: chosen}

    def settled(eps: float) -> bool:  # safe, or unattainable
        if eps not in solutions:
            solutions[eps] = _solution_or_none(replace(problem, eps=eps), thresholds) if eps <= largest else None
        solution = solutions[eps]
        return solution is None or _is_safe(problem, thresholds, solution)

    grid = [problem.eps, *EPS_GRID[bisect_right(EPS_GRID, problem.eps) :]]
    top = next((i for i in range(0, len(grid), EPS_STRIDE) if settled(grid[i])), len(grid) - 1)
    eps = grid[bisect_left(grid, True, lo=max(0, top - EPS_STRIDE), hi=top, key=settled)]
    solution = solutions[eps]
    if not thresholds or solution is None:
        return None
    return {"eps": eps, "multipliers": solution.multipliers.tolist(), "win_rates": solution.win_rates.tolist()}


def _is_safe(problem: LabelProblem, thresholds: Mapping[str, float], solution: Solution) -> bool:
    intervals = problem.intervals(solution, tuple(thresholds))
    return all(intervals[name].low >= bound for name, bound in thresholds.items())


def _solution_or_none(problem: LabelProblem, thresholds: Mapping[str, float]) -> Solution | None:
    try:
        return problem.solve(thresholds)
    except InfeasibleThresholds:
        return None


def bound_of_one(group_size: int, eps: float) -> float:
    """The robust bound of a target that settles on one of a group's n responses, each of which wins always.

    The sample then holds n once in n responses and 0 otherwise, and a ball of radius eps moves mass to the zeros.
    """
    values = torch.tensor([group_size, 0.0], dtype=torch.float64)
    return float(robust_bound(values, torch.tensor([1.0, group_size - 1.0]).double() / group_size, eps)[0])


@contextmanager
def infeasibility_explained(problem: LabelProblem, thresholds: Mapping[str, float]) -> Iterator[None]:
    """Turns InfeasibleThresholds into a ValueError that says what eps has to do with it."""
    try:
        yield
    except InfeasibleThresholds as error:
        raise ValueError(why_infeasible(problem, thresholds, error)) from error


def why_infeasible(problem: LabelProblem, thresholds: Mapping[str, float], error: InfeasibleThresholds) -> str:
    """The error's text; where eps is to blame, how it comes to that and which eps is not too large."""
    plain = replace(problem, eps=0.0)
    chosen = _solution_or_none(plain, thresholds)
    if chosen is None or not problem.eps:
        return str(error)
    largest = float(problem.largest_eps(thresholds).min())
    safe = safe_solution(plain, thresholds, chosen, largest)
    reason = findings.why_bounds_are_low(problem.group_size, problem.eps, bound_of_one(problem.group_size, problem.eps))
    enough = f", and {safe['eps']:g} holds them on other prompts of the kind" if safe else ""
    return (
        f"{error}, or eps: without it they are met. What must reach the threshold is the robust bound: {reason}. "
        f"Each alone, they allow eps = {findings.two_digits(largest)} at most{enough}"
    )


def sweep(problem: Problem, thresholds: Mapping[str, float], objective: str, points: int) -> dict[str, Any]:
    """Move one threshold from what comes for free to nearly the best attainable, the others staying as they are."""
    others = {name: bound for name, bound in thresholds.items() if name != objective}
    k = problem.objectives.index(objective)
    low, high = float(problem.solve(others).held[k]), problem.best(objective, others)
    found: dict[str, Any] = {"objective": objective, "thresholds": [], "primary": [], "multipliers": [], "kl": []}
    for i in range(points):
        bound = low + 0.99 * (high - low) * i / (points - 1)  # at the best itself the multiplier is infinite
        try:
            solution = problem.solve({**others, objective: bound})
        except InfeasibleThresholds:  # robust bounds fall again before their best is proven
            break
        found["thresholds"].append(bound)
        found["primary"].append(float(solution.win_rates[0]))
        found["multipliers"].append(float(solution.multipliers[k]))
        found["kl"].append(solution.kl)
    return found


# ---------------------------------------------------------------------------------------------------------- output


def run_solve(problem: LabelProblem, thresholds: Mapping[str, float], *, points: int, output: Path) -> int:
    """Analyse, print tables and findings, write `solve.json` and `solve.png` into `output`."""
    with infeasibility_explained(problem, thresholds):
        found = analyse(problem, thresholds, points=points)
    console = Console()
    console.print(problem.headline, style="bold", soft_wrap=True)
    print_report(found, console)
    console.print()
    files = [write_json(output / "solve.json", found)]
    if found["sweeps"]:
        files.append(plots.save_figure(plot_report(found, problem.headline), output / "solve.png"))
    console.print(f"Written: {', '.join(map(str, files))}", soft_wrap=True)
    return 0


def plot_report(found: Mapping[str, Any], headline: str) -> Figure:
    """Figure of `analyse`'s sweeps with the chosen thresholds marked."""
    primary = found["objectives"][0]
    rows = {row["objective"]: row for row in found["objectives"]}
    sweeps = []
    for line in found["sweeps"]:
        row = rows[line["objective"]]
        chosen = row["threshold"] is not None and (row["threshold"], primary["win_rate"], row["multiplier"])
        sweeps.append({**line, "chosen": chosen or None})
    return plots.plot_costs(sweeps, found["primary"], subtitle=headline)


def print_report(found: Mapping[str, Any], console: Console) -> None:
    """`analyse` as tables, the objectives and the price list of the thresholds, and what that means."""
    console.print(objectives_table(found))
    console.print()
    sweeps = findings.shown_sweeps(found)
    if sweeps:
        kept = ", the others kept" if len(sweeps) > 1 and any(row["threshold"] for row in found["objectives"]) else ""
        console.print(_price_table(sweeps, found["primary"], title=f"Price list: one threshold moved{kept}"))
        console.print()
    console.print(findings.table(found))


def objectives_table(found: Mapping[str, Any]) -> Table:
    """The objectives of `analyse`; the primary stands first, in bold."""
    rows = found["objectives"]
    partly = any(row["labelled_groups"] < found["groups"] for row in rows)
    constrained = any(row["threshold"] is not None for row in rows)
    robust = constrained and any(row["win_rate"] - row["lower_bound"] > 1e-6 for row in rows)
    headings = ["groups"] * partly + ["corr.", "free", "best"]
    headings += ["threshold", "gets", *["bound"] * robust, "multiplier", "cost"] * constrained
    table = new_table("Win rates of the ideal policy", "objective", *headings)
    for row, correlation in zip(rows, found["rank_correlations"][0], strict=True):
        cells = [str(row["labelled_groups"])] * partly
        cells += [_number(correlation, "+.2f"), _number(row["free"]), _number(row["best"])]
        if constrained:
            asked = row["threshold"] is not None
            cells += [_number(row["threshold"]), _number(row["win_rate"])]
            cells += [_number(row["lower_bound"] if asked else None)] * robust
            cells += [_number(row["multiplier"] if asked else None), _cost(row["cost"])]
        table.add_row(row["objective"], *cells, style="bold" if row is rows[0] else None)
    return table


def _price_table(sweeps: Sequence[Mapping[str, Any]], primary: str, *, title: str) -> Table:
    table = new_table(title, "objective", "threshold", primary, "cost", "multiplier")
    for line in sweeps:
        last = len(line["thresholds"]) - 1
        for i in dict.fromkeys(round(last * share) for share in (0, 0.25, 0.5, 0.75, 1)):
            cost = _cost(line["primary"][0] - line["primary"][i])
            bound, rate, multiplier = (_number(line[key][i]) for key in ("thresholds", "primary", "multipliers"))
            name = line["objective"] if i == 0 else ""
            table.add_row(name, bound, rate, cost, multiplier, end_section=i == last)
    return table


def _cost(value: float | None) -> str:
    """Win rate given up; where the primary gains it is no cost, and the findings say why."""
    return findings.GAIN if value is not None and findings.is_gain(value) else _number(value)


def _number(value: float | None, spec: str = ".3f") -> str:
    return "–" if value is None else f"{round(value, 3) + 0.0:{spec}}"  # + 0.0: a rounding error is no −0.000
