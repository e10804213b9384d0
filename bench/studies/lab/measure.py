"""What is measured of a policy: sampled notes on held-out prompts, and what it forgot of ordinary text."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bench.studies.lab.data import writer
from bench.studies.lab.language import OBJECTIVES, corpus, prompts, scores, well_formed
from bench.studies.lab.model import Origin, TinyLM, log_probs, next_tokens, pad, sample, sequences
from mopo_kernels import linear_logprob

PROMPTS, SAMPLES, OPPONENTS = 120, 4, 8


@cache
def opponents(name: str, part: str, count: int, origin: Origin) -> tuple[Tensor, Tensor]:
    """Prompts of a part and the scores [prompts, OPPONENTS, K] of a writer's notes."""
    asked = prompts(0, count, part)
    author, temperature = writer(name, origin)
    return asked, scores(asked, sample(author, asked, OPPONENTS, 77, temperature))


def wins(ours: Tensor, theirs: Tensor) -> Tensor:  # [prompts, n, K], [prompts, m, K] → [prompts, K]
    """Win rate of every prompt: the mean over pairs of 1, ½ (equal) or 0."""
    return (1 + (ours[:, :, None] - theirs[:, None]).sign().mean((1, 2))) / 2


def measure(model: TinyLM, against: Sequence[str], part: str, seed: int, count: int, origin: Origin) -> dict[str, Any]:
    """Win rates against the notes of several writers prompt by prompt, KL to the base, texts, loss on ordinary text."""
    base = writer("base", origin)[0]
    asked, _ = opponents("base", part, count, origin)
    notes = sample(model, asked, SAMPLES, 10_000 + seed)
    mine, encoded = scores(asked, notes), sequences(asked, notes)
    log_ratio = log_probs(model, *encoded) - log_probs(base, *encoded)
    flat = notes.flatten(0, 1).tolist()
    found: dict[str, Any] = {}
    for name in against:
        rates = wins(mine, opponents(name, part, count, origin)[1]) * 2 * SAMPLES * OPPONENTS
        found[f"half_wins_{name}"] = {k: x.round().int().tolist() for k, x in zip(OBJECTIVES, rates.T, strict=True)}
    return found | {
        "kl": round(float(log_ratio.mean()), 4),
        "words": round(float(-mine[..., 1].mean()), 3),
        "well_formed": round(sum(map(well_formed, flat)) / len(flat), 4),
        "forgotten": round(ordinary_loss(model) - loss_of_the_base(origin), 4),
    }


def ordinary_loss(model: TinyLM) -> float:
    """Nats per token on held-out plain and ornate notes with their prompts."""
    ids, target = ordinary_text()
    with torch.no_grad():
        return -float(linear_logprob(model(ids), model.head, target, reduction="mean"))


@cache
def loss_of_the_base(origin: Origin) -> float:
    return ordinary_loss(writer("base", origin)[0])


@cache
def ordinary_text() -> tuple[Tensor, Tensor]:
    return next_tokens(pad(corpus(prompts(1, 200, "test"), 99, ornate=0.125)))


# --------------------------------------------------------------------------------------------------------- statistics


@cache
def resampled(seeds: int, count: int, resamples: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Shares [resamples, seeds] and [resamples, count] of what was drawn anew."""
    rng = np.random.default_rng(0)
    sizes = (seeds, count)
    by_seed, by_prompt = (rng.multinomial(size, np.full(size, 1 / size), resamples) / size for size in sizes)
    return by_seed, by_prompt


def bootstrap(values: NDArray[np.float64], resamples: int = 4000) -> tuple[float, float, float]:
    """Mean of values[seeds, prompts] with its 95% interval, seeds and prompts drawn anew, independently."""
    by_seed, by_prompt = resampled(*values.shape, resamples)
    means = np.einsum("rs,sp,rp->r", by_seed, values, by_prompt, optimize=True)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(values.mean()), float(low), float(high)


def at_equal_threshold(front: Mapping[float, float], threshold: float) -> float | None:
    """The primary where the secondary equals the threshold, on the line through the points {secondary: primary}.

    None where the points do not enclose it: nothing is extrapolated. The front's best is meant, so of several lines
    that cross the threshold the highest counts.
    """
    points = sorted(front.items())
    found = []
    for (x, y), (x2, y2) in itertools.pairwise(points):
        if x <= threshold <= x2:
            found.append(y if x == x2 else y + (y2 - y) * (threshold - x) / (x2 - x))
    return max(found, default=None)
