"""Does the policy hold what was asked, and by which policy step? Runs what is not in the results yet:

    python -m bench.studies.lab.study bench/results/lab/runs.jsonl [--part screen main …] [--minutes 60]

Every run is one JSON line, written when it is known; a killed study goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bench.studies.lab.contestants import BREVITY, RELEVANCE_PRICE, Method, train
from bench.studies.lab.data import PRETRAINING_STEPS, Condition, asked_for, labelled, writer
from bench.studies.lab.measure import OPPONENTS, PROMPTS, SAMPLES, measure
from mopo_kernels import InfeasibleThresholds

ASKED = round(asked_for(BREVITY, 2), 3)  # what pairs must be asked for it: 0.8
BREVITY_PRICE = 0.56  # of the population at this threshold (truth.json), for choosing learning rates
RATES = (5e-4, 1.5e-3, 1.5e-4)
SEEDS = range(5)
BY_HAND = {"scale": "weights"}

CONTESTANTS: dict[str, dict[str, Any]] = {
    "clone": {"step": "clone"},
    "contrast": {"step": "contrast"},
    "regress": {"step": "regress"},
    "contrast + 0.2 clone": {"step": "contrast", "mix": 0.2},
    "contrast + 1 clone": {"step": "contrast", "mix": 1.0},
    "contrast per token": {"step": "contrast", "average": True},
    "regress per token": {"step": "regress", "average": True},
    "regress + 1 clone": {"step": "regress", "mix": 1.0},
    "DPO, dual once": {"step": "dpo"},
    "DPO, weights": {"step": "dpo", **BY_HAND},
    "IPO, weights": {"step": "ipo", **BY_HAND},
    "MODPO": {"step": "modpo", **BY_HAND},
    "rewarded soup": {"step": "soup", **BY_HAND},
    "clone, sgd dual": {"step": "clone", "scale": "sgd"},
    "clone, barrier dual": {"step": "clone", "scale": "barrier"},
    "clone, shrunk labels": {"step": "clone", "shrink": True},  # asked for what is wanted
    "contrast, shrunk labels": {"step": "contrast", "shrink": True},
    "regress, shrunk labels": {"step": "regress", "shrink": True},
    "clone, measured": {"step": "clone", "measured": True},
    "contrast, measured": {"step": "contrast", "measured": True},
    "regress, measured": {"step": "regress", "measured": True},
    "clone, importance": {"step": "clone", "importance": True},  # where another model wrote
}
RATE_OF = {name: name.split(",")[0] for name in CONTESTANTS if name.startswith(("clone,", "contrast,", "regress,"))}
SCREENED = [name for name in CONTESTANTS if name not in RATE_OF]
STEPS = ["clone", "contrast", "regress"]
LEADING = [*STEPS, "contrast + 1 clone", "DPO, dual once"]
DIALS = {  # beside those of the main condition
    "clone": (0.7, 0.9),
    "contrast": (0.7, 0.9),
    "regress": (0.5, 0.7, 0.9),
    "contrast + 1 clone": (0.7, 0.9),
    "DPO, dual once": (0.7,),
    "DPO, weights": (0.3, 1.0),
    "IPO, weights": (0.8, 1.0),
    "MODPO": (1.0, 2.0),
    "rewarded soup": (0.56, 1.0, 2.0),
}
REST = ["contrast + 0.2 clone", "regress + 1 clone", "MODPO", "clone, sgd dual", "clone, barrier dual"]
ELSEWHERE = [*REST, "rewarded soup", "clone, importance", *(f"{name}, measured" for name in STEPS)]  # not under `main`
OWN_PAIRS = Condition()
CONDITIONS = {
    "another model": Condition(writer="other"),
    "noisy": Condition(accuracy=0.7),
    "groups of 4": Condition(size=4, groups=500),
    "few": Condition(groups=150),
    "sharper": Condition(writer="sharp"),
}


@dataclass(frozen=True)
class Run:
    """One model, trained and measured."""

    part: str  # of the study
    contestant: str
    method: Method
    condition: Condition = OWN_PAIRS
    seed: int = 0
    prompts: str = "test"  # or tune
    budget: int = 30_000  # tokens of notes through the policy
    held_out: int = PROMPTS
    pretraining: int = PRETRAINING_STEPS

    def result(self) -> dict[str, Any]:
        """Settings and what came of them."""
        data = labelled(self.condition, self.seed, self.pretraining)
        base = writer("base", self.pretraining)[0]
        try:
            trained = train(base, data, self.method, self.budget, self.seed)
        except InfeasibleThresholds as error:
            return asdict(self) | {"infeasible": str(error)}
        against = ["base"] if self.condition.writer == "base" else ["base", self.condition.writer]
        measured = measure(trained.model, against, self.prompts, self.seed, self.held_out, self.pretraining)
        done = {"tokens": trained.tokens, "steps": trained.steps, "cpu_seconds": round(trained.seconds, 2)}
        multipliers = [round(x, 4) for x in trained.multipliers]
        return asdict(self) | {"multipliers": multipliers} | done | measured


def known(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run_of(row: dict[str, Any]) -> Run:
    """The run of a line; what it does not name has its default."""
    named = {name: row[name] for name in Run.__dataclass_fields__ if name in row}
    return Run(**named | {"method": Method(**row["method"]), "condition": Condition(**row["condition"])})


def execute(runs: Iterable[Run], path: Path, until: float) -> None:
    """Runs what the file does not know, in order, until the clock says so."""
    done = {run_of(row) for row in known(path)}
    path.parent.mkdir(parents=True, exist_ok=True)
    for run in runs:
        if run in done or time.time() > until:
            continue
        start, row = time.time(), run.result()
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        where = f"{run.part} {run.contestant} lr {run.method.lr} aim {run.method.aim} seed {run.seed}"
        print(f"{where}: {summary(row)} {time.time() - start:.1f} s", flush=True)


def win_rate(row: dict[str, Any], against: str = "base") -> dict[str, float]:
    """Means over prompts."""
    half_wins = row[f"half_wins_{against}"]
    return {k: sum(x) / len(x) / (2 * SAMPLES * OPPONENTS) for k, x in half_wins.items()}


def summary(row: dict[str, Any]) -> str:
    if "infeasible" in row:
        return row["infeasible"]
    rest = {name: row[name] for name in ("kl", "words", "well_formed", "forgotten")}
    return " ".join(f"{name} {x:.3f}" for name, x in (win_rate(row) | rest).items())


# --------------------------------------------------------------------------------------------------------------- parts


def lagrangian(row: dict[str, Any], tau: float = 0.08) -> float:
    """The problem's own objective at the population's multipliers: what a learning rate is chosen by."""
    warmth, brevity, relevance = win_rate(row).values()
    return warmth + BREVITY_PRICE * (brevity - BREVITY) + RELEVANCE_PRICE * min(0.0, relevance - 0.5) - tau * row["kl"]


def screen(_: list[dict[str, Any]]) -> Iterator[Run]:
    """Learning rates on the tuning prompts, as many for everyone."""
    for rate in RATES:
        for name in SCREENED:
            yield Run("screen", name, at_the_aim(name, {name: rate}), seed=100, prompts="tune")


def main_condition(rows: list[dict[str, Any]]) -> Iterator[Run]:
    """Everyone at the aim that should hold brevity, and the leading ones asked for what is wanted, as labels stand."""
    rates = best_rates(rows)
    for seed in SEEDS:
        for name in (x for x in CONTESTANTS if x not in ELSEWHERE):
            yield Run("main", name, at_the_aim(name, rates), seed=seed)
        for name in LEADING:
            yield Run("main", name, tuned(name, rates, aim=BREVITY), seed=seed)


def sweep(rows: list[dict[str, Any]]) -> Iterator[Run]:
    """The front: the dial of each over its range."""
    rates = best_rates(rows)
    for seed in SEEDS:
        for name, aims in DIALS.items():
            for aim in aims:
                yield Run("sweep", name, tuned(name, rates, aim=aim), seed=seed)


def measured(rows: list[dict[str, Any]]) -> Iterator[Run]:
    """The threshold moved by what the policy writes on the tuning prompts, from what is wanted."""
    rates = best_rates(rows)
    for seed in SEEDS:
        for name in STEPS:
            yield Run("main", f"{name}, measured", tuned(f"{name}, measured", rates, aim=BREVITY), seed=seed)


def rest(rows: list[dict[str, Any]]) -> Iterator[Run]:
    """What is of less importance under the main condition."""
    rates = best_rates(rows)
    for seed in SEEDS:
        for name in REST:
            yield Run("main", name, at_the_aim(name, rates), seed=seed)


def conditions(rows: list[dict[str, Any]]) -> Iterator[Run]:
    """One factor of the data changed at a time; groups of 4 are asked what corresponds."""
    rates = best_rates(rows)
    for seed in SEEDS:
        for title, condition in CONDITIONS.items():
            more = {"another model": ["DPO, dual once", "clone, importance"], "noisy": ["DPO, dual once"]}
            for name in [*STEPS, *more.get(title, [])]:
                asked = round(asked_for(BREVITY, condition.size), 4)
                yield Run("conditions", name, tuned(name, rates, aim=asked), condition, seed)


def settings(rows: list[dict[str, Any]]) -> Iterator[Run]:
    """tau of each step, and min_weight of clone."""
    rates = best_rates(rows)
    for seed in SEEDS:
        for name in STEPS:
            yield Run("settings", name, tuned(name, rates, aim=ASKED, tau=0.3), seed=seed)
        yield Run("settings", "clone", tuned("clone", rates, aim=ASKED, min_weight=0.1), seed=seed)


def tuned(name: str, rates: dict[str, float], **changes: Any) -> Method:
    return replace(Method(lr=rates[RATE_OF.get(name, name)], **CONTESTANTS[name]), **changes)


def at_the_aim(name: str, rates: dict[str, float]) -> Method:
    settings = CONTESTANTS[name]
    if settings.get("scale") == "weights":
        return tuned(name, rates, aim=BREVITY_PRICE)
    return tuned(name, rates, aim=BREVITY if settings.get("shrink") else ASKED)


def best_rates(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Every contestant's learning rate of the highest Lagrangian in the screening."""
    best: dict[str, tuple[float, float]] = {}
    for row in rows:
        if row["part"] == "screen" and "infeasible" not in row:
            found = lagrangian(row), row["method"]["lr"]
            best[row["contestant"]] = max(best.get(row["contestant"], found), found)
    return {name: rate for name, (_, rate) in best.items()}


def longer(rows: list[dict[str, Any]]) -> Iterator[Run]:
    """Three times as many tokens: what the steps tend to."""
    rates = best_rates(rows)
    for seed in SEEDS:
        for name, aim in (("clone", ASKED), ("contrast", 0.7), ("regress", BREVITY)):  # those nearest to holding 0.6
            yield Run("longer", name, tuned(name, rates, aim=aim), seed=seed, budget=90_000)


PARTS: dict[str, Callable[[list[dict[str, Any]]], Iterator[Run]]] = {
    "screen": screen,
    "main": main_condition,
    "conditions": conditions,
    "sweep": sweep,
    "measured": measured,
    "settings": settings,
    "rest": rest,
    "longer": longer,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="the file of runs")
    parser.add_argument("--part", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run after this time")
    options = parser.parse_args()
    torch.set_num_threads(1)
    until = time.time() + 60 * options.minutes
    for part in options.part:
        execute(PARTS[part](known(options.results)), options.results, until)


if __name__ == "__main__":
    main()
