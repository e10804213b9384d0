"""Labels of groups: win rates from comparisons, ratings and scorers, and the tensors that training reads."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset
from numpy.typing import NDArray
from torch import Tensor

from mopo_kernels.objective.labels import win_rate_from_comparisons
from mopo_trainer.data.scorers import Scorer, checked
from mopo_trainer.data.sources import DataError
from mopo_trainer.data.texts import Text, plain_text
from mopo_trainer.names import it_has

logger = logging.getLogger(__name__)

FloatArray: TypeAlias = NDArray[np.float64]
IntArray: TypeAlias = NDArray[np.int64]

FORMATS = (
    "prompt, chosen, rejected or prompt, response_0, response_1 (with preference: {objective: P}); "
    "prompt, responses, ratings: {objective: [rating, ..]}; "
    "prompt, responses, comparisons: {objective: [[first, second, P], ..]}"
)


class Label(NamedTuple):
    """What one row says about one objective."""

    kind: Literal["comparisons", "ratings", "win_rate"]
    values: list[Any]  # comparisons: (first, second, P(first beats second)); otherwise n numbers, None where unlabelled


class Group(NamedTuple):
    """One checked row."""

    prompt: Text
    responses: list[Text]  # n >= 2
    labels: dict[str, Label | None]  # by objective, None where unlabelled


def tie_equal_responses(groups: list[Group]) -> list[Group]:
    """Groups of two responses that are the same are ties in all that they are labelled for; said once."""
    equal = [number for number, group in enumerate(groups) if group.responses[1:] == group.responses[:1]]
    tie = Label("comparisons", [(0, 1, 0.5)])
    labelled = 0
    for number in equal:
        known = {
            name for name, label in groups[number].labels.items() if label and None not in (label.values or [None])
        }
        labelled += bool(known)
        labels = {name: tie if name in known else label for name, label in groups[number].labels.items()}
        groups[number] = groups[number]._replace(labels=labels)
    if labelled:
        logger.warning("%d of %d pairs have the same text twice: counted as ties", labelled, len(groups))
    return groups


def win_rates(groups: list[Group], scorers: Mapping[str, Scorer], rating_scale: float | None) -> dict[str, FloatArray]:
    """Win rates [M] by objective, responses in order, NaN where unlabelled."""
    names = list(dict.fromkeys(name for group in groups for name in group.labels))
    for name in scorers:
        if name in names:
            raise DataError(
                f"duplicate objective names: the data labels {name!r} and a scorer has the same name; rename it"
            )
    if not names and not scorers:
        raise DataError(f"no labels; give a scorer or write them as {FORMATS}")
    sizes = np.array([len(group.responses) for group in groups])
    starts = np.cumsum(sizes) - sizes
    pairs = _all_pairs(sizes, starts)
    text = _text_numbers(groups)
    rates = {}
    for name in names:
        triples = [
            (start + first, start + second, probability)
            for start, group in zip(starts.tolist(), groups, strict=True)
            for first, second, probability in _values(group, name, "comparisons")
        ]
        compared = np.array(triples, dtype=np.float64).reshape(-1, 3)
        rated = _compare_ratings(_per_response(groups, name, "ratings"), pairs, rating_scale)
        given = _per_response(groups, name, "win_rate")
        comparisons = np.concatenate([compared, rated])
        first, second = comparisons[:, :2].astype(int).T
        comparisons[text[first] == text[second], 2] = 0.5
        counted = _count_wins(comparisons, len(given))
        rates[name] = np.where(np.isnan(counted), given, counted)
    for name, function in scorers.items():
        scores = _score(groups, name, function)
        rates[name] = _count_wins(_compare_ratings(scores, pairs, None), len(scores))
    return rates


def _text_numbers(groups: list[Group]) -> IntArray:
    """Numbers [M] of the responses that are equal where their text is: of a group of several, copies are ties."""
    numbers: list[int] = []
    copies = 0
    for group in groups:
        start = len(numbers)
        known: dict[str, int] = {}
        numbers.extend(range(start, start + len(group.responses)))
        if len(group.responses) > 2:
            for index, response in enumerate(group.responses, start):
                numbers[index] = known.setdefault(str(response), index)
            copies += len(known) < len(group.responses)
    if copies:
        logger.warning("%d groups hold the same text more than once: copies are ties among themselves", copies)
    return np.array(numbers)


def _values(group: Group, name: str, kind: str) -> list[Any]:
    label = group.labels.get(name)
    return label.values if label and label.kind == kind else []


def _per_response(groups: list[Group], name: str, kind: str) -> FloatArray:
    """The values [M] of this kind, NaN where a group or a response has none."""
    nested = (_values(group, name, kind) or [None] * len(group.responses) for group in groups)
    return np.array(list(chain.from_iterable(nested)), dtype=np.float64)


def _all_pairs(sizes: IntArray, starts: IntArray) -> tuple[IntArray, IntArray]:
    """Row numbers (first, second) of every pair of responses within a group, first before second."""
    firsts, seconds = [], []
    for n in np.unique(sizes):
        first, second = np.triu_indices(n, k=1)
        start = starts[sizes == n, None]
        firsts.append((start + first).ravel())
        seconds.append((start + second).ravel())
    return np.concatenate(firsts), np.concatenate(seconds)


def _compare_ratings(ratings: FloatArray, pairs: tuple[IntArray, IntArray], scale: float | None) -> FloatArray:
    """Comparisons [C, 3] (first, second, P) of the pairs of which both responses are rated."""
    first, second = pairs
    difference = ratings[first] - ratings[second]
    known = ~np.isnan(difference)
    first, second, difference = first[known], second[known], difference[known]
    # tanh(x / 2) = 2 sigmoid(x) - 1 does not overflow
    sign = np.sign(difference) if scale is None else np.tanh(difference / (2 * scale))
    return np.stack([first, second, (sign + 1) / 2], axis=1)


def _count_wins(comparisons: FloatArray, num_responses: int) -> FloatArray:
    """Mean probability of winning [M] over each response's comparisons [C, 3], NaN where it has none."""
    table = torch.from_numpy(comparisons)
    first, second = table[:, 0].long(), table[:, 1].long()
    return win_rate_from_comparisons(first, second, table[:, 2:], num_responses)[:, 0].numpy()


def _score(groups: list[Group], name: str, function: Scorer) -> FloatArray:
    scores, score = [], checked(name, function)
    for number, group in enumerate(groups):
        prompt = plain_text(group.prompt)
        for index, response in enumerate(group.responses):
            try:
                scores.append(score(prompt, plain_text(response)))
            except DataError as error:
                raise DataError(f"group {number}, response {index}: {error}") from error.__cause__
    return np.array(scores)


def objectives(groups: Dataset) -> list[str]:
    """The objectives of `groups`, in the order in which the data first named them."""
    if "win_rate" not in groups.features:
        raise DataError(f"columns {', '.join(groups.column_names)} are not those of groups; call to_groups first")
    return list(groups.features["win_rate"])


def labels(groups: Dataset, names: Sequence[str]) -> tuple[Tensor, Tensor]:
    """The labels of all M responses, groups in order and responses in order within them.

    Returns:
        win_rate[M, K] float64, a column per objective in `names`, NaN where unlabelled; group[M] int64, the number of
        the group in the data set.

    Raises:
        DataError: an objective is unknown, named twice, or labelled in no group.
    """
    known = objectives(groups)
    for name in names:
        if name not in known:
            raise DataError(f"objective {name!r} is not in the data; {it_has(name, known)}")
        if list(names).count(name) > 1:
            raise DataError(f"duplicate objective names: {name!r} is asked for twice; name each one once")
    table = groups.select_columns(["responses", "win_rate"]).with_format("arrow")[:]
    sizes = pc.list_value_length(table["responses"]).to_numpy()
    win_rate = np.full((sizes.sum(), len(names)), np.nan)
    for column, name in enumerate(names):
        values = pc.struct_field(table["win_rate"], name)
        labelled = np.repeat(values.is_valid().to_numpy(), sizes)
        win_rate[labelled, column] = pc.list_flatten(values).to_numpy()
        if np.isnan(win_rate[:, column]).all():
            raise DataError(f"objective {name!r} is labelled in no group; label it somewhere or leave it out")
    return torch.from_numpy(win_rate), torch.from_numpy(np.repeat(np.arange(len(sizes)), sizes))


def split_groups(groups: Dataset, test_fraction: float, seed: int = 0) -> tuple[Dataset, Dataset]:
    """Split into (train, test) at random, all groups of one prompt on the same side, order kept.

    `test_fraction` of the different prompts are for testing: at least one, and at least one is left for training.
    """
    if not 0 < test_fraction < 1:
        raise DataError(f"test_fraction={test_fraction}: give a number between 0 and 1")
    prompts = [plain_text(prompt) for prompt in groups["prompt"]]
    different = sorted(set(prompts))
    if len(different) < 2:
        raise DataError(f"{len(different)} different prompts cannot be split; give at least 2")
    num_test = min(max(round(test_fraction * len(different)), 1), len(different) - 1)
    test = {different[index] for index in np.random.default_rng(seed).permutation(len(different))[:num_test]}
    in_test = np.array([prompt in test for prompt in prompts])
    return groups.select(np.flatnonzero(~in_test)), groups.select(np.flatnonzero(in_test))
