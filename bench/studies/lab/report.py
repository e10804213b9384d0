"""Tables and pictures of the runs, all of them from the JSON lines:

    python -m bench.studies.lab.report bench/results/lab docs/results.md

Writes tables.md, front.png and conditions.png to the directory, and the tables into the page, between its marks.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import moocore
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from bench.studies.lab.contestants import BREVITY
from bench.studies.lab.data import Condition
from bench.studies.lab.language import OBJECTIVES
from bench.studies.lab.measure import OPPONENTS, SAMPLES, at_equal_threshold, bootstrap
from bench.studies.lab.study import CONDITIONS, CONTESTANTS, RATES, best_rates, known, lagrangian
from mopo_trainer.files import atomic_path

Row = dict[str, Any]
BEGIN, END = "<!-- lab: written by bench/studies/lab/report.py -->", "<!-- /lab -->"
RESAMPLES = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="directory with runs.jsonl and truth.json")
    parser.add_argument("page", type=Path, nargs="?", help="a page with the marks of the laboratory's tables")
    options = parser.parse_args()
    rows = [row for row in known(options.results / "runs.jsonl") if "infeasible" not in row]
    truth = json.loads((options.results / "truth.json").read_text())
    text = "\n\n".join(section(rows, truth) for section in SECTIONS)
    write(options.results / "tables.md", text + "\n")
    draw_front(rows, truth, options.results / "front.png")
    draw_conditions(rows, options.results / "conditions.png")
    if options.page:
        page = options.page.read_text()
        head, rest = page.split(BEGIN)
        write(options.page, f"{head}{BEGIN}\n\n{text}\n\n{END}{rest.split(END)[1]}")


def write(path: Path, text: str) -> None:
    with atomic_path(path) as whole:
        whole.write_text(text)


# ------------------------------------------------------------------------------------------------------------- figures


def rates(rows: list[Row], objective: str, against: str = "base") -> NDArray[np.float64]:  # [seeds, prompts]
    """Win rates of runs that differ in their seed only."""
    by_seed = sorted(rows, key=lambda row: row["seed"])
    return np.array([row[f"half_wins_{against}"][objective] for row in by_seed]) / (2 * SAMPLES * OPPONENTS)


def interval(values: NDArray[np.float64]) -> str:
    mean, low, high = bootstrap(values)
    return f"{mean:.3f} [{low:.3f}, {high:.3f}]"


def mean(rows: list[Row], name: str, digits: int = 2) -> str:
    return f"{np.mean([row[name] for row in rows]):.{digits}f}"


def held(rows: list[Row], against: str = "base") -> str:
    """How many seeds hold both thresholds, and by how much brevity falls short, mean over seeds."""
    brevity, relevance = (rates(rows, name, against).mean(1) for name in OBJECTIVES[1:])
    short = np.maximum(BREVITY - brevity, 0).mean()
    return f"{(brevity >= BREVITY).sum()}/{len(rows)} | {(relevance >= 0.5).sum()}/{len(rows)} | {short:.3f}"


def cells(rows: list[Row], against: str = "base") -> str:
    rest = [mean(rows, "kl"), mean(rows, "forgotten", 3), mean(rows, "well_formed"), mean(rows, "cpu_seconds", 1)]
    return " | ".join([*(interval(rates(rows, k, against)) for k in OBJECTIVES), held(rows, against), *rest])


HEAD = (
    "warmth | brevity | relevance | seeds with brevity ≥ 0.6 | with relevance ≥ 0.5 | shortfall of brevity | KL | "
    "forgotten | well formed | CPU s"
)


def table(head: str, lines: Iterable[str]) -> str:
    return "\n".join([f"| {head} |", "|" + "---|" * (head.count("|") + 1), *(f"| {line} |" for line in lines)])


def grouped(rows: Iterable[Row], key: Callable[[Row], Any]) -> dict[Any, list[Row]]:
    found: dict[Any, list[Row]] = defaultdict(list)
    for row in rows:
        found[key(row)].append(row)
    return found


def in_order(found: dict[Any, list[Row]]) -> list[tuple[Any, list[Row]]]:
    names = list(CONTESTANTS)
    return sorted(found.items(), key=lambda item: (names.index(item[0][0]), item[0][1] or 0))


# ------------------------------------------------------------------------------------------------------------ sections


def conflict(rows: list[Row], truth: Row) -> str:
    found = ", ".join(f"{pair}: {x:+.2f}" for pair, x in truth["correlations"].items())
    best = truth["optimum"]
    lines = [
        " | ".join(
            [f"{x['brevity']:.1f}", *(f"{v:.3f}" for v in x["win rates"]), *(f"{m:.2f}" for m in x["multipliers"][1:])]
        )
        for x in best
    ]
    head = "threshold of brevity | warmth | brevity | relevance | multiplier of brevity | of relevance"
    return (
        f"**The objectives conflict.** Rank correlations of their win rates on the base model's notes: {found}. The "
        f"constrained optimum at τ = 0.08, by the exact dual on 32 notes a prompt:\n\n{table(head, lines)}"
    )


def groups(rows: list[Row], truth: Row) -> str:
    lines = [
        " | ".join(
            [
                f"{x['size']} | {x['brevity asked']:.3f}",
                *(f"{v:.3f}" for v in x["win rates on the labels"][:2]),
                *(f"{v:.3f}" for v in x["win rates against fresh notes"][:2]),
                f"{x['brevity by the formula']:.3f}",
            ]
        )
        for x in truth["groups"]
    ]
    head = (
        "group size | brevity asked | warmth on labels | brevity on labels | warmth, fresh opponents | "
        "brevity, fresh opponents | ((n − 1) v + 1)/(n + 1)"
    )
    title = "**What the labels of small groups promise**, no model trained: win rates of the target."
    return f"{title}\n\n{table(head, lines)}"


def screening(rows: list[Row], truth: Row) -> str:
    screen = grouped((r for r in rows if r["part"] == "screen"), lambda r: r["contestant"])
    best = best_rates(rows)
    ordered = sorted(RATES)
    lines = []
    for name in (name for name in CONTESTANTS if name in screen):
        values = {row["method"]["lr"]: f"{lagrangian(row):+.3f}" for row in screen[name]}
        lines.append(
            " | ".join([name, *(f"**{values[x]}**" if x == best[name] else values.get(x, "–") for x in ordered)])
        )
    head = " | ".join(["contestant", *(f"{x:g}" for x in ordered)])
    return (
        "**Learning rates**, on the tuning prompts, one seed: warmth + λ·(slack of the thresholds) − τ·KL, λ being "
        f"the optimum's.\n\n{table(head, lines)}"
    )


def main_table(rows: list[Row], truth: Row) -> str:
    found = grouped((r for r in rows if r["part"] == "main"), lambda r: (r["contestant"], r["method"]["aim"]))
    lines = [f"{name} | {aim} | {cells(some)}" for (name, aim), some in in_order(found)]
    title = "**Main condition**: 1,000 pairs of the policy's own notes, exact labels, 30,000 tokens."
    return f"{title}\n\n{table(f'contestant | asked or weight | {HEAD}', lines)}"


def fronts(rows: list[Row]) -> dict[str, dict[Any, list[Row]]]:
    """Contestant → dial → runs, of those whose dial was turned."""
    used = grouped((r for r in rows if r["part"] in ("main", "sweep")), lambda r: r["contestant"])
    turned = {name: grouped(some, lambda r: r["method"]["aim"]) for name, some in used.items()}
    return {name: turned[name] for name in CONTESTANTS if name in turned and len(turned[name]) > 1}


def complete(front: dict[Any, list[Row]]) -> dict[Any, list[Row]]:
    """The points of a front that have the most seeds."""
    most = max(len(some) for some in front.values())
    return {aim: some for aim, some in front.items() if len(some) == most}


def warmth_at_threshold(front: dict[Any, list[Row]], name: str = "warmth") -> tuple[NDArray[np.float64], float]:
    """Warmth (or what is named) where brevity is 0.6: bootstrap draws over seeds and prompts, and the estimate."""
    front = complete(front)
    brevity = np.array([rates(some, "brevity") for some in front.values()])  # [aims, seeds, prompts]
    if name == "warmth":
        other = np.array([rates(some, "warmth") for some in front.values()])
    else:
        each = [[row[name] for row in sorted(some, key=lambda r: r["seed"])] for some in front.values()]
        other = np.broadcast_to(np.array(each)[:, :, None], brevity.shape)
    _, seeds, prompts = brevity.shape
    rng = np.random.default_rng(0)
    draws = []
    for _ in range(RESAMPLES):
        s, p = rng.integers(seeds, size=seeds), rng.integers(prompts, size=prompts)
        x, y = (values[:, s][:, :, p].mean((1, 2)) for values in (brevity, other))
        draws.append(at_equal_threshold(dict(zip(x.tolist(), y.tolist(), strict=True)), BREVITY))
    x, y = brevity.mean((1, 2)), other.mean((1, 2))
    centre = at_equal_threshold(dict(zip(x.tolist(), y.tolist(), strict=True)), BREVITY)
    return np.array([np.nan if d is None else d for d in draws]), np.nan if centre is None else centre


def span(draws: NDArray[np.float64], centre: float) -> str:
    if np.isnan(centre):
        return "not reached"
    low, high = np.nanpercentile(draws, [2.5, 97.5])
    return f"{centre:.3f} [{low:.3f}, {high:.3f}]"


def equal_threshold(rows: list[Row], truth: Row) -> str:
    found, ideal = fronts(rows), points_of(truth)
    base_draws, base_centre = warmth_at_threshold(found["clone"]) if "clone" in found else (np.array([]), np.nan)
    lines = []
    for name, front in found.items():
        draws, centre = warmth_at_threshold(front)
        _, kl = warmth_at_threshold(front, "kl")
        _, forgotten = warmth_at_threshold(front, "forgotten")
        points = np.array([[rates(some, k).mean() for k in OBJECTIVES[:2]] for some in complete(front).values()])
        same = len(draws) == len(base_draws) and name != "clone"
        lines.append(
            " | ".join(
                [
                    name,
                    span(draws, centre),
                    span(draws - base_draws, centre - base_centre) if same else "–",
                    f"{kl:.2f}",
                    f"{forgotten:.3f}",
                    f"{moocore.hypervolume(points, ref=[0, 0], maximise=True):.3f}",
                    f"{moocore.igd_plus(points, ref=ideal, maximise=True):.3f}",
                    f"{moocore.epsilon_additive(points, ref=ideal, maximise=True):.3f}",
                    str(len(next(iter(complete(front).values())))),
                ]
            )
        )
    best = next(x for x in truth["optimum"] if x["brevity"] == BREVITY)["win rates"][0]
    head = (
        "contestant | warmth at brevity 0.6 | more than clone | KL there | forgotten there | hypervolume | IGD+ | ε | "
        "seeds"
    )
    return (
        f"**Warmth at equal brevity (0.6)**, on the line through the points of the sweep; intervals over seeds and "
        f"prompts, differences paired. The optimum has {best:.3f}. Hypervolume from (0, 0), IGD+ and additive ε to "
        f"the optimum's front (smaller is better).\n\n{table(head, lines)}"
    )


def points_of(truth: Row) -> NDArray[np.float64]:
    return np.array([x["win rates"][:2] for x in truth["optimum"]])


def condition_table(rows: list[Row], truth: Row) -> str:
    parts = []
    for title, condition in CONDITIONS.items():
        some = [r for r in rows if r["part"] == "conditions" and Condition(**r["condition"]) == condition]
        found = grouped(some, lambda r: (r["contestant"], r["method"]["aim"]))
        for against in ["base"] if condition.writer == "base" else ["base", condition.writer]:
            lines = [f"{name} | {aim} | {cells(runs, against)}" for (name, aim), runs in in_order(found)]
            opponent = "the base" if against == "base" else f"the writer ({title})"
            parts.append(f"*{title}*, win rates against {opponent}:\n\n{table(f'contestant | asked | {HEAD}', lines)}")
    return "**One factor changed**\n\n" + "\n\n".join(parts)


def settings_table(rows: list[Row], truth: Row) -> str:
    def key(r: Row) -> tuple[str, float, float]:
        return r["contestant"], r["method"]["tau"], r["method"]["min_weight"]

    names = ("clone", "contrast", "regress")
    at_default = [r for r in rows if r["part"] == "main" and r["contestant"] in names and r["method"]["aim"] == 0.8]
    found = grouped([*at_default, *(r for r in rows if r["part"] == "settings")], key)
    lines = [
        f"{name} | {tau} | {min_weight:g} | {mean(some, 'steps', 0)} | {cells(some)}"
        for (name, tau, min_weight), some in sorted(found.items())
    ]
    title = "**Settings**, main condition, brevity asked at 0.8."
    return f"{title}\n\n{table(f'contestant | τ | min_weight | steps | {HEAD}', lines)}"


def longer_table(rows: list[Row], truth: Row) -> str:
    found = grouped((r for r in rows if r["part"] == "longer"), lambda r: (r["contestant"], r["method"]["aim"]))
    lines = [f"{name} | {aim} | {cells(some)}" for (name, aim), some in in_order(found)]
    return f"**Three times as long**: 90,000 tokens.\n\n{table(f'contestant | asked | {HEAD}', lines)}"


SECTIONS = (conflict, groups, screening, main_table, equal_threshold, longer_table, condition_table, settings_table)


# ------------------------------------------------------------------------------------------------------------ pictures


def draw_front(rows: list[Row], truth: Row, path: Path) -> None:
    """Warmth against brevity over each contestant's dial."""
    figure = Figure(figsize=(7.5, 5.5), layout="constrained")
    axes = figure.subplots()
    ideal = points_of(truth)
    axes.plot(ideal[:, 1], ideal[:, 0], "k--", label="optimum at τ = 0.08")
    for name, front in fronts(rows).items():
        points = np.array(
            sorted((rates(some, "brevity").mean(), rates(some, "warmth").mean()) for some in front.values())
        )
        axes.plot(*points.T, "o-", label=name, markersize=4)
    axes.axvline(BREVITY, color="grey", linewidth=0.8)
    axes.set(xlabel="brevity: win rate against the base model", ylabel="warmth: win rate against the base model")
    axes.legend(fontsize=8)
    save(figure, path)


def draw_conditions(rows: list[Row], path: Path) -> None:
    """Warmth and brevity under each condition."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    for axes, objective in zip(figure.subplots(1, 2), OBJECTIVES[:2], strict=True):
        runs = grouped((r for r in rows if r["part"] == "conditions"), lambda r: r["contestant"])
        names = [name for name in CONTESTANTS if name in runs]
        for place, name in enumerate(names):
            by_condition = grouped(runs[name], lambda r: Condition(**r["condition"]))
            for x, condition in enumerate(CONDITIONS.values()):
                if condition in by_condition:
                    centre, low, high = bootstrap(rates(by_condition[condition], objective))
                    error = [[centre - low], [high - centre]]
                    label = name if x == 0 else None
                    where = x + 0.12 * (place - len(names) / 2)
                    axes.errorbar(where, centre, error, fmt="o", color=f"C{place}", markersize=4, label=label)
        if objective == "brevity":
            axes.axhline(BREVITY, color="grey", linewidth=0.8)
        axes.set_xticks(range(len(CONDITIONS)), list(CONDITIONS), fontsize=8)
        axes.set_ylabel(f"{objective}: win rate against the base")
        axes.legend(fontsize=7)
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    with atomic_path(path) as whole:
        figure.savefig(whole, dpi=110, format="png")


if __name__ == "__main__":
    main()
