"""Two held-out measurements of an aligned model: sampled texts against the base model, and log-probs against labels.

**Sampled**: both models answer the same prompts; a scorer compares every response of one with every response of the
other. The win rate of prompt x is the mean over these pairs of 1 (higher score), ½ (equal) or 0; the figure reported is
the mean over prompts with a bootstrap interval over prompts.

**Labels**: no text is drawn. With h_i = log π(y_i|x) − log π_ref(y_i|x), the model reweights the labelled responses of
a group by softmax_group(h), the self-normalised estimate of π/π_ref under the behaviour policy, hence

    win rate_k   = mean_groups Σ_i softmax_group(h)_i v_ik        (π = π_ref gives the mean label, ½ where complete)
    agreement_k  = share of the pairs of a group with v_ik ≠ v_jk in which h orders i and j as v does (a tie of h: ½)

As in training, a response that a labelled group leaves unlabelled counts ½, and an unlabelled group is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from mopo_trainer.data.scorers import Scorer

MAX_BLOCK = 1 << 22  # numbers drawn at once, 64 MB


class Interval(NamedTuple):
    """A mean with its confidence interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.2f} [{self.low:.2f}, {self.high:.2f}]"


def bootstrap_interval(values: ArrayLike, *, confidence: float = 0.95, resamples: int = 10_000) -> Interval:
    """Mean of `values` with the percentile-bootstrap interval of the mean; NaN are left out."""
    sample: NDArray[np.float64] = np.asarray(values, dtype=np.float64)
    sample = sample[~np.isnan(sample)]
    if sample.size == 0:
        raise ValueError("values holds no number to average: nothing is labelled for this objective")
    random, block = np.random.default_rng(0), max(1, MAX_BLOCK // sample.size)
    sizes = [min(block, resamples - done) for done in range(0, resamples, block)]
    means = [sample[random.integers(sample.size, size=(size, sample.size))].mean(axis=1) for size in sizes]
    tail = 100 * (1 - confidence) / 2
    low, high = np.percentile(np.concatenate(means), [tail, 100 - tail])
    return Interval(float(sample.mean()), float(low), float(high))


def verdict(interval: Interval, threshold: float | None) -> str:
    """Whether a measured win rate meets its threshold, given the interval."""
    if threshold is None:
        return "maximised"
    if interval.mean >= threshold:
        return "met"
    return "missed" if interval.high < threshold else "missed within the interval"


def sampled_win_rates(
    prompts: Sequence[str],
    responses: Sequence[Sequence[str]],
    base_responses: Sequence[Sequence[str]],
    scorers: Mapping[str, Scorer],
) -> dict[str, NDArray[np.float64]]:
    """Win rate of `responses` against `base_responses` on every prompt, per objective.

    Args:
        responses, base_responses: texts [prompt][sample]; the two may hold different numbers of samples.
        scorers: objective → score(prompt, response), higher is better.

    Returns:
        objective → win rates [prompts] in [0, 1]; feed them, or the difference of two models', to `bootstrap_interval`.
    """
    win_rates = {}
    for name, score in scorers.items():
        ours, theirs = (
            [np.array([score(prompt, text) for text in texts]) for prompt, texts in zip(prompts, side, strict=True)]
            for side in (responses, base_responses)
        )
        win_rates[name] = np.array(
            [(np.sign(a[:, None] - b[None, :]).mean() + 1) / 2 for a, b in zip(ours, theirs, strict=True)]
        )
    return win_rates


def label_win_rates(
    logp: Tensor,  # [M]
    ref_logp: Tensor,  # [M]
    win_rate: Tensor,  # [M, K]
    group: Tensor,  # [M]
    objectives: Sequence[str],
) -> dict[str, dict[str, Any]]:
    """What log-probs say about labels: the win rates they imply and the pairs they order rightly (formulas above).

    Args:
        logp, ref_logp: summed log-probs of the responses under the model and under the reference.
        win_rate: labels v_ik, NaN where unlabelled.
        group: integer id of each response's prompt.

    Returns:
        objective → {"win_rate": Interval, "reference": the mean label, "agreement": Interval or None if all labels tie,
        "groups": how many carry the objective}.
    """
    log_ratio = (logp - ref_logp).double().cpu().numpy()
    labels, groups = win_rate.double().cpu().numpy(), group.cpu().numpy()
    members = [np.flatnonzero(groups == g) for g in np.unique(groups)]
    result = {}
    for k, name in enumerate(objectives):
        implied, reference, agreement = [], [], []
        for rows in members:
            h, v = log_ratio[rows], labels[rows, k]
            labelled = ~np.isnan(v)
            if not labelled.any():
                continue
            weights = np.exp(h - h.max())
            weights /= weights.sum()
            values = np.where(labelled, v, 0.5)
            implied.append(weights @ values)
            reference.append(values.mean())
            i, j = np.triu_indices(rows.size, k=1)
            ordered = labelled[i] & labelled[j] & (v[i] != v[j])
            if ordered.any():
                concordant = np.sign(h[i] - h[j]) * np.sign(v[i] - v[j])
                agreement.append((1 + concordant[ordered].mean()) / 2)
        result[name] = {
            "win_rate": bootstrap_interval(implied),
            "reference": float(np.mean(reference)),
            "agreement": bootstrap_interval(agreement) if agreement else None,
            "groups": len(implied),
        }
    return result
