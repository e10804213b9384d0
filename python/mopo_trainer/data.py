"""Preference data: rows in the accepted formats -> groups with win rates -> label tensors and token sequences.

A *group* is one prompt with its n >= 2 responses. `to_groups` turns every accepted format into one table with columns

    prompt      text, or a list of messages ({"role", "content"})
    responses   n texts, or n lists of messages
    win_rate    {objective: n numbers | null}: the mean of P(i beats j) over the responses j that i was compared with

and everything downstream sees nothing else. Objectives stand in the order in which the data first names them.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import chain
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset
from jinja2 import TemplateError
from numpy.typing import NDArray
from torch import Tensor

from mopo_kernels.objective import win_rate_from_comparisons
from mopo_trainer.adapters import adapt, has
from mopo_trainer.scorers import Scorer
from mopo_trainer.sources import DataError, load_rows, one_line

if TYPE_CHECKING:  # `mopo solve` reads labels without waiting for transformers
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "DataError",
    "labels",
    "load_rows",
    "objectives",
    "plain_text",
    "split_groups",
    "to_groups",
    "tokenize_group",
]

logger = logging.getLogger(__name__)

Text: TypeAlias = "str | list[dict[str, Any]]"
FloatArray: TypeAlias = NDArray[np.float64]
IntArray: TypeAlias = NDArray[np.int64]

PAIR_COLUMNS = (("chosen", "rejected"), ("response_0", "response_1"))
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


# ------------------------------------------------------------------------------------------------- rows to groups


def to_groups(
    rows: Dataset | Sequence[Mapping[str, Any]],
    *,
    scorers: Mapping[str, Scorer] | None = None,
    rating_scale: float | None = None,
    adapter: str | None = None,
    preferred: str = "preferred",
) -> Dataset:
    """Turn rows in any accepted format, which may change from row to row, into groups; groups come back as they are.

    A row holds its responses as `chosen` and `rejected`, `response_0` and `response_1`, or `responses`, and its labels
    as `preference`, `ratings`, `comparisons` or several of them for different objectives; null is unlabelled. Columns
    of other names are ignored. Two dialogues (messages) without a prompt have what they begin with in common as theirs.

    Args:
        scorers: {objective: function of (prompt, response)}: objectives to compute from the text, ties 1/2.
        rating_scale: ratings become P(i beats j) = sigmoid((r_i - r_j) / rating_scale); None: 1, 1/2 (tie) or 0.
        adapter: which public data set the rows come from (`mopo_trainer.adapters`); None recognises it by its columns,
            "none" looks for none.
        preferred: the objective that chosen beats rejected on, in rows without `preference`.

    Raises:
        DataError: names the file and row (from 0), the value and what to do about it.
    """
    source = isinstance(rows, Dataset) and rows.info.dataset_name
    try:
        if rating_scale is not None and not 0 < rating_scale < math.inf:
            raise DataError(f"rating_scale={rating_scale}: give a positive number, or None for hard comparisons")
        if len(rows) == 0:
            raise DataError("the dataset is empty; give at least one row")
        plain_rows = rows.to_list() if isinstance(rows, Dataset) else list(rows)
        groups = _read_groups(plain_rows, adapter, preferred)
        return _tabulate(groups, _win_rates(groups, scorers or {}, rating_scale))
    except DataError as error:
        raise DataError(f"{source}: {error}" if source else str(error)) from error.__cause__


def _read_groups(rows: list[Mapping[str, Any]], adapter: str | None, preferred: str) -> list[Group]:
    groups: list[Group] = []
    left_out: Counter[str] = Counter()
    for index, row in adapt(rows, adapter):
        if isinstance(row, str):
            left_out[row] += 1
            continue
        try:
            groups.append(_read_group(row, preferred))
            if isinstance(groups[0].prompt, str) != isinstance(groups[-1].prompt, str):
                raise DataError("plain text and messages in one dataset; write every row the same way")
        except DataError as error:
            raise DataError(f"row {index}: {error}") from None
    reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
    if not groups:
        raise DataError(f"every row was left out: {reasons}")
    if left_out:
        logger.warning(
            "%d of %d rows or prompts left out: %s", left_out.total(), left_out.total() + len(groups), reasons
        )
    return groups


def _read_group(row: Mapping[str, Any], preferred: str) -> Group:
    prompt, responses = _read_texts(row)
    labels: dict[str, Label | None] = {}
    for column, read_label in LABEL_COLUMNS.items():
        by_objective = row.get(column) or {}
        if column == "preference" and has(row, "chosen") and not has(row, column):
            by_objective = {preferred: 1.0}
        if not isinstance(by_objective, Mapping):
            raise DataError(f"`{column}` is {_shown(by_objective)}; write {{objective: ..}}")
        for name, value in by_objective.items():
            if value is None:
                labels.setdefault(name, None)
            elif labels.get(name) is None:
                labels[name] = read_label(f"{column} of {name!r}", value, len(responses))
            else:
                raise DataError(
                    f"duplicate objective names: {name!r} is labelled again in `{column}`; rename one of them"
                )
    return Group(prompt, responses, labels)


def _read_texts(row: Mapping[str, Any]) -> tuple[Text, list[Text]]:
    pairs = [[row[column] for column in pair] for pair in PAIR_COLUMNS if has(row, *pair)]
    given = [*pairs, row["responses"]] if has(row, "responses") else pairs
    if len(given) != 1:
        columns = ", ".join(column for column in row if has(row, column)) or "none"
        problem = "responses are given twice" if given else "unknown columns"
        raise DataError(f"{problem} (columns: {columns}); accepted are {FORMATS}")
    prompt, responses = row.get("prompt"), given[0]
    if prompt is None and pairs:
        prompt, responses = _split_shared_prompt(responses)
    if not isinstance(responses, list) or len(responses) < 2:
        raise DataError(f"`responses` is {_shown(responses)}; a group needs a list of at least two responses")
    prompt = _read_text("prompt", prompt)
    responses = [_read_text(f"response {index}", response) for index, response in enumerate(responses)]
    if any(isinstance(response, str) != isinstance(prompt, str) for response in responses):
        raise DataError("the prompt and the responses mix plain text and messages; write all of them the same way")
    return prompt, responses


def _split_shared_prompt(pair: list[Any]) -> tuple[list[Any] | None, list[Any]]:
    """The messages with which both dialogues begin, and what each adds."""
    if not all(isinstance(dialogue, list) for dialogue in pair):
        raise DataError(f"no `prompt` beside plain-text responses; accepted are {FORMATS}")
    first, second = pair
    shared = 0
    while shared < min(len(first), len(second)) and first[shared] == second[shared]:
        shared += 1
    return first[:shared] or None, [first[shared:], second[shared:]]


def _read_text(name: str, text: Any) -> Text:
    if isinstance(text, str):
        if text.strip():
            return text
    elif isinstance(text, list) and all(isinstance(message, Mapping) for message in text):
        messages = _without_nulls(text)
        if not all(isinstance(message.get("role"), str) for message in messages):
            raise DataError(f"a message of the {name} has no role; write {{role, content}}")
        if not all(isinstance(message.get("content"), str) for message in messages):
            raise DataError(f"a message of the {name} has no text as its content; write {{role, content}}")
        if any(message["content"].strip() for message in messages):
            return messages
    elif text is not None:
        raise DataError(f"the {name} is {_shown(text)}; write text or a list of messages {{role, content}}")
    raise DataError(f"the {name} is empty; write its text or remove the row")


def _read_preference(name: str, value: Any, n: int) -> Label:
    if n != 2:
        raise DataError(f"{name}: compares two responses and this group has {n}; write `comparisons`")
    return Label("comparisons", [(0, 1, _probability(name, value))])


def _read_comparisons(name: str, value: Any, n: int) -> Label:
    triples, compared = [], set()
    for entry in _as_list(name, value):
        if not isinstance(entry, list | tuple) or len(entry) != 3:
            raise DataError(f"{name}: got {_shown(entry)}; write [first, second, P(first beats second)]")
        first, second, probability = entry
        for response in (first, second):
            if response not in range(n):
                raise DataError(f"{name}: {_shown(entry)} compares response {response}; give 0 to {n - 1}")
        pair = frozenset((first, second))
        if len(pair) == 1 or pair in compared:
            again = "a response with itself" if len(pair) == 1 else "two responses that were compared before"
            raise DataError(f"{name}: {_shown(entry)} compares {again}; give each pair once, with its mean P")
        compared.add(pair)
        if probability is not None:
            triples.append((int(first), int(second), _probability(name, probability)))
    return Label("comparisons", triples)


def _read_ratings(name: str, value: Any, n: int) -> Label:
    ratings = _one_per_response(name, value, n)
    for rating in ratings:
        if rating is not None and not (isinstance(rating, Real) and math.isfinite(rating)):
            raise DataError(f"{name}: got {_shown(rating)}; give a finite number, or null where nobody rated")
    return Label("ratings", ratings)


def _read_win_rate(name: str, value: Any, n: int) -> Label:
    win_rates = _one_per_response(name, value, n)
    return Label("win_rate", [rate if rate is None else _probability(name, rate) for rate in win_rates])


LABEL_COLUMNS: dict[str, Callable[[str, Any, int], Label]] = {
    "preference": _read_preference,
    "ratings": _read_ratings,
    "comparisons": _read_comparisons,
    "win_rate": _read_win_rate,
}


def _probability(name: str, value: Any) -> float:
    if isinstance(value, Real) and 0 <= float(value) <= 1:
        return float(value)
    raise DataError(f"{name}: got {_shown(value)}; give a probability from 0 to 1, or null where nobody judged")


def _one_per_response(name: str, value: Any, n: int) -> list[Any]:
    values = _as_list(name, value)
    if len(values) != n:
        raise DataError(f"{name}: {len(values)} values for {n} responses; give one per response, null where unlabelled")
    return values


def _as_list(name: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise DataError(f"{name}: got {_shown(value)}; write a list")
    return value


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


# ------------------------------------------------------------------------------------------- labels to win rates


def _win_rates(groups: list[Group], scorers: Mapping[str, Scorer], rating_scale: float | None) -> dict[str, FloatArray]:
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
    win_rates = {}
    for name in names:
        triples = [
            (start + first, start + second, probability)
            for start, group in zip(starts.tolist(), groups, strict=True)
            for first, second, probability in _values(group, name, "comparisons")
        ]
        compared = np.array(triples, dtype=np.float64).reshape(-1, 3)
        rated = _compare_ratings(_per_response(groups, name, "ratings"), pairs, rating_scale)
        given = _per_response(groups, name, "win_rate")
        counted = _count_wins(np.concatenate([compared, rated]), len(given))
        win_rates[name] = np.where(np.isnan(counted), given, counted)
    for name, function in scorers.items():
        scores = _score(groups, name, function)
        win_rates[name] = _count_wins(_compare_ratings(scores, pairs, None), len(scores))
    return win_rates


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
    scores = []
    for number, group in enumerate(groups):
        prompt = plain_text(group.prompt)
        for index, response in enumerate(group.responses):
            try:
                score = float(function(prompt, plain_text(response)))
            except Exception as error:  # the scorer is the user's code, which may raise anything
                problem = f"{type(error).__name__}: {one_line(error)}"
                raise DataError(f"group {number}, response {index}: scorer {name!r} failed ({problem})") from error
            if not math.isfinite(score):
                raise DataError(
                    f"group {number}, response {index}: scorer {name!r} returned {score}; return a finite number"
                )
            scores.append(score)
    return np.array(scores)


def _tabulate(groups: list[Group], win_rates: Mapping[str, FloatArray]) -> Dataset:
    sizes = np.array([len(group.responses) for group in groups])
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    columns = []
    for values in win_rates.values():
        unlabelled = np.add.reduceat(~np.isnan(values), offsets[:-1], dtype=np.int64) == 0
        columns.append(
            pa.ListArray.from_arrays(
                pa.array(offsets, pa.int32()), pa.array(values, mask=np.isnan(values)), mask=pa.array(unlabelled)
            )
        )
    return Dataset(
        pa.table(
            {
                "prompt": pa.array([group.prompt for group in groups]),
                "responses": pa.array([group.responses for group in groups]),
                "win_rate": pa.StructArray.from_arrays(columns, names=list(win_rates)),
            }
        )
    )


# -------------------------------------------------------------------------------------------------- use of groups


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
            raise DataError(f"objective {name!r} is not in the data; it has {', '.join(known)}")
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


# ---------------------------------------------------------------------------------------------- text and tokens


def plain_text(text: Text) -> str:
    """Text as it is; of messages their contents, a blank line between them."""
    return text if isinstance(text, str) else "\n\n".join(message["content"] for message in text)


def tokenize_group(
    prompt: Text,
    responses: Sequence[Text],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_prompt_length: int | None,
    max_length: int | None,
    as_chat: bool = False,
) -> list[tuple[list[int], int]]:
    """Tokenise every response behind its prompt, as TRL does: (input_ids, num_prompt_tokens) per response.

    Messages go through the chat template, the prompt with its generation prompt; plain text is concatenated and closed
    by the end-of-sequence token. All sequences begin with the same prompt tokens, and the response is exactly what
    follows them. Long prompts lose their beginning, long responses their end (reported once).

    Args:
        max_prompt_length: most tokens of a prompt; None keeps all.
        max_length: most tokens of prompt and response together; None keeps all.
        as_chat: make plain text a user's message and the assistant's reply.

    Raises:
        DataError: no chat template, one that refuses the messages or does not continue its generation prompt, or
            lengths that leave no room for the response.
    """
    if max_prompt_length is not None and max_prompt_length < 1:
        raise DataError(f"max_prompt_length={max_prompt_length}: give at least 1, or None to keep whole prompts")
    if as_chat and isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
        responses = [[{"role": "assistant", "content": response}] for response in responses]
    is_plain = isinstance(prompt, str)  # a chat template writes the special tokens itself
    start, endings = (_render_plain if is_plain else _render_chat)(prompt, responses, tokenizer)
    texts = [start, *(start + ending for ending in endings)]
    prompt_ids, *sequences = tokenizer(texts, add_special_tokens=is_plain, verbose=False)["input_ids"]
    # Tokens that merge across the boundary would change the prompt: such a response is tokenised by itself.
    response_ids = [
        sequence[len(prompt_ids) :]
        if sequence[: len(prompt_ids)] == prompt_ids
        else tokenizer(ending, add_special_tokens=False, verbose=False)["input_ids"]
        for sequence, ending in zip(sequences, endings, strict=True)
    ]
    if max_prompt_length is not None:
        prompt_ids = prompt_ids[-max_prompt_length:]
    room = None if max_length is None else max_length - len(prompt_ids)
    if room is not None and room <= 0:
        raise DataError(
            f"the prompt's {len(prompt_ids)} tokens leave no room for a response in max_length={max_length}; "
            "set max_prompt_length below max_length"
        )
    if room is not None and max(map(len, response_ids)) > room:
        _report_cut(max_length)
    return [(prompt_ids + ids[:room], len(prompt_ids)) for ids in response_ids]


def _render_plain(prompt: Any, responses: Sequence[Any], tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[str]]:
    """The prompt, and every response with the end-of-sequence token behind it."""
    eos = tokenizer.eos_token or ""
    return prompt, [response if response.endswith(eos) else response + eos for response in responses]


def _render_chat(prompt: Any, responses: Sequence[Any], tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[str]]:
    """The rendered prompt with its generation prompt, and what each response adds, up to its end-of-sequence token."""
    if not tokenizer.chat_template:
        raise DataError("messages need a chat template and the tokenizer has none; set one or write plain text")
    conversations = [_without_nulls([*prompt, *response]) for response in responses]
    try:
        start = tokenizer.apply_chat_template(_without_nulls(prompt), add_generation_prompt=True, tokenize=False)
        rendered = [tokenizer.apply_chat_template(messages, tokenize=False) for messages in conversations]
    except TemplateError as error:
        raise DataError(f"the chat template refuses the messages ({one_line(error)}); mend their roles") from None
    endings = []
    for whole in rendered:
        if not whole.startswith(start):
            raise DataError(
                f"the chat template renders the prompt alone as {start[-40:]!r} but not so before a response; "
                "use a template in which every reply follows the generation prompt"
            )
        ending = whole[len(start) :]
        reply, eos, rest = ending.rpartition(tokenizer.eos_token or "\0")
        endings.append(reply + eos if eos and not rest.strip() else ending)  # templates add a newline after it
    return start, endings


def _without_nulls(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages without the keys that a table adds because other messages have them."""
    return [{key: value for key, value in message.items() if value is not None} for message in messages]


@cache
def _report_cut(max_length: int) -> None:
    logger.warning("at least one response was cut to fit max_length=%d; raise it to keep them whole", max_length)
