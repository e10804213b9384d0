"""Which computable objective conflicts with what people preferred? Small learned scorers, if installed, and exact ones:

    pip install alt-profanity-check hatesonar harper-py    # hatesonar wants the locale en_US.UTF-8 (localedef)
    python -m bench.studies.real_model.conflicts > bench/results/real_model/conflicts.md

Correlation over all responses of a data set between win rates within the group: −1 opposed, 0 unrelated.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

import numpy as np
from numpy.typing import NDArray

from bench.studies.lab.report import table
from bench.studies.real_model.data import DATA, SCORERS, groups_of
from mopo_trainer.data.scorers import Scorer


def clean(prompt: str, response: str) -> float:
    """Minus the probability that it offends: a linear SVM on words (MIT)."""
    return -float(import_module("profanity_check").predict_prob([response])[0])


def inoffensive(prompt: str, response: str) -> float:
    """The probability of neither hate speech nor offence: logistic regression on tweets (MIT)."""
    classes = _sonar().ping(response)["classes"]
    return next(x["confidence"] for x in classes if x["class_name"] == "neither")


def grammar(prompt: str, response: str) -> float:
    """Minus the lints a word of the Harper grammar checker (Apache-2.0)."""
    return -len(_linter().lint(response)) / max(1, len(response.split()))


@cache
def _sonar():  # type: ignore[no-untyped-def]
    return import_module("hatesonar").Sonar()


@cache
def _linter():  # type: ignore[no-untyped-def]
    return import_module("harper").Linter()


LEARNED: dict[str, tuple[str, Scorer]] = {
    "clean": ("alt-profanity-check", clean),
    "inoffensive": ("hatesonar", inoffensive),
    "grammar": ("harper-py", grammar),
}


def installed() -> dict[str, Scorer]:
    found = dict(SCORERS)
    for name, (package, scorer) in LEARNED.items():
        try:
            found[f"{name} ({package} {version(package)})"] = scorer
        except PackageNotFoundError:
            print(f"{package} is not installed: left out.\n")
    return found


def correlations(data: str, scorers: dict[str, Scorer]) -> list[float]:
    judged: list[NDArray[np.float64]] = []
    scored: list[NDArray[np.float64]] = []
    for group in groups_of(data):
        people = np.array(group["win_rate"][DATA[data].primary], dtype=float)
        scores = np.array([[score(group["prompt"], text) for text in group["responses"]] for score in scorers.values()])
        judged.append(people)
        scored.append(np.sign(scores[:, :, None] - scores[:, None]).sum(2))
    people, ours = np.concatenate(judged), np.concatenate(scored, axis=1)
    known = ~np.isnan(people)
    return [float(np.corrcoef(people[known], row[known])[0, 1]) for row in ours]


def main() -> None:
    scorers = installed()
    human: list[str] = [name for name, data in DATA.items() if data.human and data.source.exists()]
    columns = [correlations(name, scorers) for name in human]
    lines = [f"{name} | {' | '.join(f'{x:+.3f}' for x in row)}" for name, *row in zip(scorers, *columns, strict=True)]
    print("Correlation of win rates with the label of people.\n")
    print(table(f"objective | {' | '.join(f'{name}: {DATA[name].primary}' for name in human)}", lines))


if __name__ == "__main__":
    main()
