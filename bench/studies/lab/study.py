"""Does the policy hold what was asked, and by which policy step? Runs what is not in the results yet:

    python -m bench.studies.lab.study bench/results/lab/runs.jsonl [--part screen main …] [--minutes 60]

Every run is one JSON line, written when it is known; a killed study goes on where it was.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bench.studies.lab.contestants import BREVITY, RELEVANCE_PRICE, Method, brevity_of, train
from bench.studies.lab.data import Condition, asked_for, labelled, writer
from bench.studies.lab.measure import OPPONENTS, PROMPTS, SAMPLES, at_equal_threshold, measure
from bench.studies.lab.model import LARGE, SMALL, Origin
from mopo_kernels import InfeasibleThresholds

ASKED = round(asked_for(BREVITY, 2), 3)  # what pairs must be asked for it: 0.8
HIGHEST = 0.92  # threshold of brevity that is asked of pairs
MARGIN = 0.02  # a standard error of what is measured
SLACK = 0.2  # a threshold that warmth alone exceeds
WITHOUT_REFERENCE = 22_500  # tokens left of 30,000 when a forward pass over 2,000 notes is paid for
BREVITY_PRICE = 0.56  # near the population's multiplier at this threshold (truth.json), for choosing learning rates
RATES = (5e-4, 1.5e-3, 1.5e-4, 5e-5)
SEEDS = range(5)
BY_HAND = {"scale": "weights"}

CONTESTANTS: dict[str, dict[str, Any]] = {
    "clone": {"step": "clone"},
    "clone per token": {"step": "clone", "average": True},
    "contrast": {"step": "contrast"},
    "regress": {"step": "regress"},
    "contrast + 0.2 clone": {"step": "contrast", "mix": 0.2},
    "contrast + 1 clone": {"step": "contrast", "mix": 1.0},
    "contrast per token": {"step": "contrast", "average": True},
    "regress per token": {"step": "regress", "average": True},
    "regress + 1 clone": {"step": "regress", "mix": 1.0},
    "DPO, dual once": {"step": "dpo"},
    "DPO, primary": {"step": "dpo", **BY_HAND},
    "IPO, primary": {"step": "ipo", **BY_HAND},
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
    "clone, asked again": {"step": "clone"},
    "contrast, asked again": {"step": "contrast"},
    "regress, asked again": {"step": "regress"},
    "clone, importance": {"step": "clone", "importance": True},  # where another model wrote
}
RATE_OF = {name: name.split(",")[0] for name in CONTESTANTS if name.startswith(("clone,", "contrast,", "regress,"))}
SCREENED = [name for name in CONTESTANTS if name not in RATE_OF]
STEPS = ["clone", "contrast", "regress"]
PRIMARY_ALONE = ["DPO, primary", "IPO, primary"]
PAIRWISE = ["DPO, dual once", "DPO, weights", "IPO, weights", "MODPO"]
LEADING = [*STEPS, "DPO, dual once", *PRIMARY_ALONE, "DPO, weights", "IPO, weights", "MODPO"]
DIALS = {  # beside those of the main condition and of what was asked
    "contrast": (0.7,),
    "regress": (0.5,),
    "DPO, dual once": (0.7,),
    "DPO, weights": (0.3, 1.0),
    "IPO, weights": (1.0, 1.5, 2.0),
    "MODPO": (1.0, 2.0),
    "rewarded soup": (0.56, 1.0, 2.0),
}
MIXTURES = {
    "clone per token": (0.6, 0.7, 0.8),
    "contrast + 0.2 clone": (0.7, 0.8),
    "contrast + 1 clone": (0.6, 0.7, 0.8),
    "contrast per token": (0.6, 0.8),
    "regress per token": (0.6, 0.8),
    "regress + 1 clone": (0.6, 0.8),
}
ASKED_OF = {  # thresholds on the labels of groups of n: what is wanted, what the formula asks for it, and higher
    size: tuple(round(x, 4) for x in (BREVITY, asked_for(BREVITY, size), *higher))
    for size, higher in {
        2: (0.85, HIGHEST),
        4: (asked_for(0.65, 4), asked_for(0.7, 4)),
        8: (asked_for(0.65, 8), asked_for(0.7, 8)),
    }.items()
}
REST = [*(f"{step}, shrunk labels" for step in STEPS), "clone, sgd dual", "clone, barrier dual"]
OWN_PAIRS = Condition()
CONDITIONS = {
    "groups of 4": Condition(size=4, groups=500),
    "groups of 8": Condition(size=8, groups=250),
    "100 pairs": Condition(groups=100),
    "300 pairs": Condition(groups=300),
    "2,000 pairs": Condition(groups=2000),
    "another model": Condition(writer="other"),
    "noisy": Condition(accuracy=0.7),
    "sharper": Condition(writer="sharp"),
    "50 groups of 4": Condition(size=4, groups=50),
    "noisy groups of 4": Condition(size=4, groups=500, accuracy=0.7),
}
OF_SIZE = {2: OWN_PAIRS, 4: CONDITIONS["groups of 4"], 8: CONDITIONS["groups of 8"]}
LARGER = (4, 8)
WEIGHTS_OF = dict.fromkeys(("DPO, weights", "IPO, weights"), (BREVITY_PRICE, 1.0, 1.5)) | {
    "MODPO": (BREVITY_PRICE, 1.0, 1.5, 2.0)
}
LARGE_SIZES = (2, 4)
OF_LARGE = {size: [*STEPS, "IPO, weights", "DPO, weights"] for size in LARGE_SIZES}  # contestants of the large model


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
    pretraining: int = SMALL.steps
    width: int = SMALL.width
    layers: int = SMALL.layers

    def result(self) -> dict[str, Any]:
        """Settings and what came of them."""
        origin = Origin(self.pretraining, self.width, self.layers)
        data = labelled(self.condition, self.seed, origin)
        base = writer("base", origin)[0]
        try:
            trained = train(base, data, self.method, self.budget, self.seed)
        except InfeasibleThresholds as error:
            return asdict(self) | {"infeasible": str(error)}
        against = ["base"] if self.condition.writer == "base" else ["base", self.condition.writer]
        measured = measure(trained.model, against, self.prompts, self.seed, self.held_out, origin)
        done = {"tokens": trained.tokens, "steps": trained.steps, "cpu_seconds": round(trained.seconds, 2)}
        multipliers = [round(x, 4) for x in trained.multipliers]
        tuning = {"tuning_brevity": brevity_of(trained.model, self.seed, 120)} if self.part in ("main", "asks") else {}
        return asdict(self) | {"multipliers": multipliers} | done | measured | tuning


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
    if row["contestant"] in PRIMARY_ALONE:
        return warmth - tau * row["kl"]
    return warmth + BREVITY_PRICE * (brevity - BREVITY) + RELEVANCE_PRICE * min(0.0, relevance - 0.5) - tau * row["kl"]


def screen(_: list[dict[str, Any]]) -> Iterator[Run]:
    """Learning rates on the tuning prompts, as many for everyone; of MOPO's steps for each size of groups."""
    for rate in RATES:
        for name in SCREENED:
            yield Run("screen", name, at_the_aim(name, {name: rate}), seed=100, prompts="tune")
        for size in LARGER:
            for name in (*STEPS, *PAIRWISE):
                yield Run("screen", name, at_the_aim(name, {name: rate}, size), OF_SIZE[size], 100, "tune")


def main_condition(rows: list[dict[str, Any]]) -> Iterator[Run]:
    """The leading ones at the aim that should hold brevity, those with a dual asked for what is wanted too."""
    rates = best_rates(rows)
    for seed in SEEDS:
        for name in LEADING:
            yield Run("main", name, at_the_aim(name, rates), seed=seed)
        for name in [*STEPS, "DPO, dual once"]:
            yield Run("main", name, tuned(name, rates, aim=BREVITY), seed=seed)


def mixtures(rows: list[dict[str, Any]]) -> Iterator[Run]:
    """A share of clone's likelihood, and log-probabilities per token."""
    rates = best_rates(rows)
    for seed in SEEDS:
        for name, aims in MIXTURES.items():
            for aim in aims:
                yield Run("main" if aim == ASKED else "sweep", name, tuned(name, rates, aim=aim), seed=seed)


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
    rates = {size: best_rates(rows, size) for size in OF_SIZE}
    for condition, seed in itertools.product(CONDITIONS.values(), SEEDS):
        more = ["DPO, dual once"] if condition.groups == 1000 else []
        importance = ["clone, importance"] if condition.writer == "other" else []
        if condition not in OF_SIZE.values():  # those are under `asks`
            for name in [*STEPS, *more, *importance]:
                method = tuned(name, rates[condition.size], aim=ASKED_OF[condition.size][1])
                yield Run("conditions", name, method, condition, seed)


def asks(rows: list[dict[str, Any]]) -> Iterator[Run]:
    """What to ask of the labels so that the policy holds it, by the size of groups."""
    for seed in SEEDS:
        for size, condition in OF_SIZE.items():
            rates = best_rates(rows, size)
            for name in STEPS:
                for asked in ASKED_OF[size][2 * (size == 2) :]:  # the first two of pairs are under `main`
                    yield Run("asks", name, tuned(name, rates, aim=asked), condition, seed)


def pairwise(rows: list[dict[str, Any]]) -> Iterator[Run]:
    """DPO and its kin on all pairs of larger groups, over their dials."""
    for seed in SEEDS:
        for size in LARGER:
            rates = best_rates(rows, size)
            for name in PAIRWISE:
                for aim in ASKED_OF[size][1::2] if name == "DPO, dual once" else WEIGHTS_OF[name]:
                    yield Run("asks", name, tuned(name, rates, aim=aim), OF_SIZE[size], seed)


def large_screen(_: list[dict[str, Any]]) -> Iterator[Run]:
    """Learning rates of a model of 1.4 million parameters."""
    for rate in RATES:
        for size in LARGE_SIZES:
            for name in OF_LARGE[size]:
                method = at_the_aim(name, {name: rate}, size)
                yield large_run("large screen", name, method, size, seed=100, prompts="tune")


def large(rows: list[dict[str, Any]]) -> Iterator[Run]:
    """That model: what is asked and what it writes."""
    for seed in SEEDS:
        for size in LARGE_SIZES:
            rates = best_rates(rows, size, "large screen")
            for name in OF_LARGE[size]:
                for aim in ASKED_OF[size][1:3] if name in STEPS else (BREVITY_PRICE, 1.0):
                    yield large_run("large", name, tuned(name, rates, aim=aim), size, seed=seed)


def large_run(part: str, name: str, method: Method, size: int, **rest: Any) -> Run:
    return Run(part, name, method, OF_SIZE[size], width=LARGE.width, layers=LARGE.layers, **rest)


def again(rows: list[dict[str, Any]]) -> Iterator[Run]:
    """Asked what the line between two trials says: brevity on the tuning prompts should be held with a margin."""
    for seed in SEEDS:
        for size, condition in OF_SIZE.items():
            for name in STEPS:
                some = [r for r in rows if r["contestant"] == name and r["seed"] == seed and "tuning_brevity" in r]
                tried = [r for r in some if Condition(**r["condition"]) == condition]
                ends = [r for r in tried if r["method"]["aim"] in ASKED_OF[size][::3]]  # the lowest and the highest
                found = {r["tuning_brevity"]: r["method"]["aim"] for r in ends}
                on_the_line = at_equal_threshold(found, BREVITY + MARGIN)
                nearest = found[min(found, key=lambda x: abs(x - BREVITY - MARGIN))]
                aim = round(nearest if on_the_line is None else on_the_line, 4)
                method = tuned(f"{name}, asked again", best_rates(rows, size), aim=aim)
                yield Run("again", f"{name}, asked again", method, condition, seed)


def noisy(rows: list[dict[str, Any]]) -> Iterator[Run]:
    """Higher thresholds of labels of which 70% are right."""
    for seed in SEEDS:
        for title in ("noisy", "noisy groups of 4"):
            condition = CONDITIONS[title]
            rates = best_rates(rows, condition.size)
            for name in STEPS:
                method = tuned(name, rates, aim=ASKED_OF[condition.size][3])
                yield Run("conditions", name, method, condition, seed)


def thresholds(rows: list[dict[str, Any]]) -> Iterator[Run]:
    """A threshold that does not bind, and one near what the labels of pairs allow."""
    rates = best_rates(rows)
    for seed in SEEDS:
        for name in [*STEPS, "DPO, dual once"]:
            yield Run("thresholds", name, tuned(name, rates, aim=SLACK), seed=seed)
        yield Run("thresholds", "DPO, dual once", tuned("DPO, dual once", rates, aim=HIGHEST), seed=seed)


def seconds(rows: list[dict[str, Any]]) -> Iterator[Run]:
    """As many passes as clone, the reference pass counted: forward is a third of forward and backward."""
    rates = best_rates(rows)
    for seed in SEEDS:
        for name, aim in (("contrast", ASKED), ("regress", ASKED), ("DPO, dual once", ASKED), ("DPO, weights", 1.0)):
            yield Run("seconds", name, tuned(name, rates, aim=aim), seed=seed, budget=WITHOUT_REFERENCE)


def settings(rows: list[dict[str, Any]]) -> Iterator[Run]:
    """tau of each step, and min_weight of clone."""
    rates = best_rates(rows)
    for seed in SEEDS:
        for name in STEPS:
            yield Run("settings", name, tuned(name, rates, aim=ASKED, tau=0.3), seed=seed)
        yield Run("settings", "clone", tuned("clone", rates, aim=ASKED, min_weight=0.1), seed=seed)


def tuned(name: str, rates: dict[str, float], **changes: Any) -> Method:
    return replace(Method(lr=rates[RATE_OF.get(name, name)], **CONTESTANTS[name]), **changes)


def at_the_aim(name: str, rates: dict[str, float], size: int = 2) -> Method:
    settings = CONTESTANTS[name]
    if name in PRIMARY_ALONE:
        return tuned(name, rates)
    if settings.get("scale") == "weights":
        return tuned(name, rates, aim=BREVITY_PRICE)
    return tuned(name, rates, aim=BREVITY if settings.get("shrink") else ASKED_OF[size][1])


def best_rates(rows: list[dict[str, Any]], size: int = 2, part: str = "screen") -> dict[str, float]:
    """Every contestant's learning rate of the highest Lagrangian in the screening, on groups of a size."""
    best: dict[str, tuple[float, float]] = {}
    for row in rows:
        if row["part"] == part and "infeasible" not in row and row["condition"]["size"] == size:
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
    "asks": asks,
    "sweep": sweep,
    "conditions": conditions,
    "pairwise": pairwise,
    "large screen": large_screen,
    "large": large,
    "again": again,
    "thresholds": thresholds,
    "seconds": seconds,
    "noisy": noisy,
    "mixtures": mixtures,
    "settings": settings,
    "rest": rest,
    "measured": measured,
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
