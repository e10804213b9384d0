"""Does a real model hold what was asked? SmolLM2-135M-Instruct; runs what is not in the results yet:

    python -m bench.studies.real_model.study bench/results/real_model [--part tune demo …] [--seeds 0 1 2]

Every run is one JSON line of runs.jsonl, written when it is known, its texts a file under texts/. A killed study goes
on where it was, several processes may work on one directory, and more seeds are more of the same.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from bench.studies.real_model import measure
from bench.studies.real_model.contestants import CONTESTANTS, train
from bench.studies.real_model.data import DATA, split
from mopo_kernels import InfeasibleThresholds
from mopo_trainer.commands.smollm import smollm2
from mopo_trainer.files import atomic_path

RATES = {"clone": (1e-3, 2e-3), "contrast": (5e-4, 1e-3), "dpo": (5e-4, 1e-3)}
TUNED_BY = {"clone": "clone, fresh", "contrast": "contrast, fresh", "dpo": "DPO, weights"}
SEEDS = (0, 1, 2)
TUNING_SEED = 100
HARDLY = 0.01  # of a value on the tuning prompts, whose win rates are known to some 0.08
FIRST = ("clone, fresh", "clone", "contrast, fresh", "DPO, weights")
PEOPLE = ("clone", "contrast", "DPO, weights as asked")
LONGER = tuple(name for name, contestant in CONTESTANTS.items() if contestant.steps > 1)
SCRATCH = Path("runs/real_model")

Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One model, trained and measured."""

    data: str
    contestant: str
    learning_rate: float
    seed: int
    part: str = "test"  # or tune: measured on the tuning prompts

    @property
    def name(self) -> str:
        contestant = self.contestant.replace(",", "").replace(" ", "-")
        return f"{self.data}_{contestant}_{self.learning_rate:g}_{self.part}{self.seed}"


@cache
def base_model() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return load(), AutoTokenizer.from_pretrained(smollm2())


def load() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32)


def result(run: Run, texts: Path) -> Row:
    """Settings and what came of them; its texts go into a file of the directory."""
    data, contestant = DATA[run.data], CONTESTANTS[run.contestant]
    groups, held_out = split(run.data, run.seed, run.part)
    base, tokenizer = base_model()
    row = asdict(run) | {"asked": contestant.thresholds(data, len(groups["responses"][0]))}
    try:
        trained = train(
            load(),
            tokenizer,
            groups,
            held_out,
            data,
            contestant,
            run.learning_rate,
            run.seed,
            str(SCRATCH / run.name),
        )
    except InfeasibleThresholds as error:
        return row | {"infeasible": str(error)}
    start = time.process_time()
    prompts = [measure.shorten(prompt, tokenizer, data) for prompt in held_out["prompt"]]
    theirs = held_out["responses"] if data.own else base_texts(run, prompts, texts)
    ours = measure.draw(trained.model, tokenizer, prompts, run.seed, data.max_new_tokens)
    write_texts(texts / f"{run.name}.jsonl", prompts, ours)
    return row | {
        "multipliers": [round(x, 4) for x in trained.multipliers],
        "steps": trained.steps,
        "tokens": round(trained.tokens),
        "cpu_seconds": round(trained.cpu_seconds, 1),
        "losses": trained.losses,
        "win_rates": measure.win_rates(prompts, ours, theirs, data),
        "implied": trained.implied,
        "words": measure.words(ours),
        "base_words": measure.words(theirs),
        "kl": measure.kl(trained.model, base, tokenizer, prompts, ours),
        "ordinary_loss": round(measure.ordinary_loss(trained.model, tokenizer) - base_loss(), 4),
        "measuring_cpu_seconds": round(time.process_time() - start, 1),
    }


@cache
def base_loss() -> float:
    return measure.ordinary_loss(*base_model())


def base_texts(run: Run, prompts: list[str], texts: Path) -> measure.Texts:
    """What the base model writes to a seed's prompts, drawn once for all contestants."""
    path = texts / f"{run.data}_base_{run.part}{run.seed}.jsonl"
    if not path.exists():
        write_texts(path, prompts, measure.draw(*base_model(), prompts, run.seed + 5000, DATA[run.data].max_new_tokens))
    return [row["texts"] for row in known(path)]


def write_texts(path: Path, prompts: Iterable[str], texts: measure.Texts) -> None:
    lines = [json.dumps({"prompt": x, "texts": y}, ensure_ascii=False) for x, y in zip(prompts, texts, strict=True)]
    with atomic_path(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------- the results


def known(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run_of(row: Row) -> Run:
    return Run(**{name: row[name] for name in Run.__dataclass_fields__})


def execute(runs: Iterable[Run], results: Path, until: float) -> None:
    """Runs what the file does not know and nobody else is at, in order, until the clock says so."""
    path, texts = results / "runs.jsonl", results / "texts"
    texts.mkdir(parents=True, exist_ok=True)
    for run in runs:
        if time.time() > until or run in map(run_of, known(path)):
            continue
        with claim(run) as mine:
            if not mine or run in map(run_of, known(path)):
                continue
            start, row = time.time(), result(run, texts if DATA[run.data].shipped else SCRATCH)
            with path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{run.name}: {summary(row)} {time.time() - start:.0f} s", flush=True)


class claim:
    """True within if no other process holds this run."""

    def __init__(self, run: Run) -> None:
        self.path = SCRATCH / f"{run.name}.lock"

    def __enter__(self) -> bool:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = os.open(self.path, os.O_CREAT | os.O_RDWR)
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def __exit__(self, *_: object) -> None:
        os.close(self.file)


def mean_win_rates(row: Row) -> dict[str, float]:
    return {name: sum(values) / len(values) for name, values in row["win_rates"].items()}


def summary(row: Row) -> str:
    if "infeasible" in row:
        return row["infeasible"]
    rest = {name: row[name] for name in ("kl", "words", "ordinary_loss", "cpu_seconds", "measuring_cpu_seconds")}
    return " ".join(f"{name} {x:.3f}" for name, x in (mean_win_rates(row) | rest).items())


# --------------------------------------------------------------------------------------------------------------- parts


def tune(_: list[Row]) -> Iterator[Run]:
    """Two learning rates of each kind, on the tuning prompts."""
    for kind, name in TUNED_BY.items():
        for rate in RATES[kind]:
            yield Run("demo", name, rate, TUNING_SEED, "tune")


def lagrangian(row: Row, tau: float = 0.08) -> float:
    """The primary, less what the thresholds lack at the multipliers of the labels, less τ KL."""
    data, found = DATA[row["data"]], mean_win_rates(row)
    prices = dict(zip(data.objectives, row["multipliers"], strict=True))
    lacking = sum(prices[name] * min(0.0, found[name] - bound) for name, bound in data.thresholds.items())
    return found[data.primary] + lacking - tau * row["kl"]


def best_rates(rows: list[Row]) -> dict[str, float]:
    """Of each kind the learning rate that the tuning prompts liked best, the lower of two that they hardly order."""
    values: dict[str, dict[float, float]] = {}
    for row in rows:
        if row["part"] == "tune" and "infeasible" not in row:
            values.setdefault(CONTESTANTS[row["contestant"]].step, {})[row["learning_rate"]] = lagrangian(row)
    return {
        kind: min(rate for rate, value in found.items() if value >= max(found.values()) - HARDLY)
        for kind, found in values.items()
    }


def demo(rows: list[Row], seeds: Iterable[int] = SEEDS) -> Iterator[Run]:
    """The demo's data; what matters most first."""
    for names in (FIRST, ["clone, fresh, twice as long"]):
        for seed in seeds:
            for name in names:
                yield tuned(rows, "demo", name, seed)


def rest(rows: list[Row], seeds: Iterable[int] = SEEDS) -> Iterator[Run]:
    """The demo's data, the other contestants."""
    for seed in seeds:
        for name in CONTESTANTS:
            if name not in (*LONGER, "DPO, weights as asked"):
                yield tuned(rows, "demo", name, seed)


def human(rows: list[Row], seeds: Iterable[int] = SEEDS) -> Iterator[Run]:
    """Human labels on texts of other systems, at the demo's learning rates; data that are not here are left out."""
    for seed in seeds:
        for data in ("qa-feedback", "hh-harmless", "summeval-op"):
            for name in PEOPLE:
                if DATA[data].source.exists():
                    yield tuned(rows, data, name, seed)


def longer(rows: list[Row], seeds: Iterable[int] = SEEDS) -> Iterator[Run]:
    """Human pairs, nearly one pass over them instead of a fifth of one."""
    for seed in seeds:
        for name in LONGER:
            if DATA["hh-harmless"].source.exists():
                yield tuned(rows, "hh-harmless", name, seed)


def tuned(rows: list[Row], data: str, name: str, seed: int) -> Run:
    return Run(data, name, best_rates(rows)[CONTESTANTS[name].step], seed)


PARTS: dict[str, Callable[..., Iterator[Run]]] = {
    "tune": tune,
    "demo": demo,
    "human": human,
    "longer": longer,
    "rest": rest,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="the directory of runs.jsonl")
    parser.add_argument("--part", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run after this time")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    until = time.time() + 60 * options.minutes
    for part in options.part:
        rows = known(options.results / "runs.jsonl")
        runs = PARTS[part](rows) if part == "tune" else PARTS[part](rows, options.seeds)
        execute(runs, options.results, until)


if __name__ == "__main__":
    main()
