"""Labelled groups under a condition: who wrote the notes, how many a prompt, and how good the labels are."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from bench.studies.lab.language import prompts, scores
from bench.studies.lab.model import SMALL, Origin, TinyLM, cached_model, log_probs, sample, sequences
from mopo_kernels import win_rate_from_comparisons

Number = TypeVar("Number", float, Tensor)
MODELS = Path(__file__).parents[2] / "results/lab/models"  # committed: runs go on from one base on every machine
SHARP = 0.7  # temperature of the sharper writer


@dataclass(frozen=True)
class Condition:
    """What data a run is given."""

    writer: str = "base"  # base: the policy itself; sharp: at a lower temperature; other: another model
    size: int = 2  # notes of a prompt
    groups: int = 1000
    accuracy: float = 1.0  # share of comparisons that name the better note


class Labelled(NamedTuple):
    """Sequences of groups that stand one behind another."""

    ids: Tensor  # [B, L]
    target: Tensor  # [B, L]
    win_rate: Tensor  # [B, K]
    group: Tensor  # [B]
    ref_logp: Tensor  # [B] under the base
    log_ratio: Tensor  # [B] log pi_ref - log mu; of a sharper writer that of its model, at temperature 1

    def take(self, rows: Tensor) -> Labelled:
        return Labelled(*(x[rows] for x in self))


def writer(name: str, origin: Origin = SMALL) -> tuple[TinyLM, float]:
    """The model that wrote the notes, and its temperature."""
    return cached_model("other" if name == "other" else "base", origin, MODELS), SHARP if name == "sharp" else 1.0


@cache
def labelled(condition: Condition, seed: int, origin: Origin = SMALL) -> Labelled:
    """Training data of a seed: its own prompts, notes and label noise."""
    asked = prompts(seed, condition.groups, "train")
    author, temperature = writer(condition.writer, origin)
    notes = sample(author, asked, condition.size, seed, temperature)
    ids, target = sequences(asked, notes)
    ref_logp = log_probs(writer("base", origin)[0], ids, target)
    return Labelled(
        ids,
        target,
        win_rates(scores(asked, notes), condition.accuracy, seed),
        torch.arange(condition.groups).repeat_interleave(condition.size),
        ref_logp,
        ref_logp - log_probs(author, ids, target),
    )


def win_rates(values: Tensor, accuracy: float, seed: int) -> Tensor:  # [G, n, K] → [G n, K] float64
    """Win rates in the group by all comparisons, of which a share is turned round; equal scores are ½."""
    groups, size, _ = values.shape
    i, j = (torch.tensor(side) for side in zip(*itertools.combinations(range(size), 2), strict=True))
    sign = (values[:, i] - values[:, j]).sign().double()
    generator = torch.Generator().manual_seed(1_000_003 + seed)
    wrong = torch.rand(sign.shape, generator=generator) >= accuracy
    offset = torch.arange(groups)[:, None] * size
    preference = (1 + torch.where(wrong, -sign, sign)) / 2
    return win_rate_from_comparisons(
        (offset + i).flatten(), (offset + j).flatten(), preference.flatten(0, 1), groups * size
    )


def fresh_win_rate(in_group: Number, size: int) -> Number:
    """What a win rate within groups of n is against fresh notes of the same writer, scores being exact and distinct.

    The note of rank r in n beats r - 1 of the n - 1 others, and r / (n + 1) of fresh ones on average (the mean of the
    r-th order statistic), so v becomes ((n - 1) v + 1) / (n + 1): only a third of a pair's distance from ½ is real.
    """
    return ((size - 1) * in_group + 1) / (size + 1)


def asked_for(fresh: float, size: int) -> float:
    """The inverse: the win rate to ask of the labels of groups of n, to get `fresh` against fresh notes."""
    return ((size + 1) * fresh - 1) / (size - 1)
