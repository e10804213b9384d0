"""Preference data: rows in the accepted formats -> groups with win rates -> label tensors and token sequences.

A *group* is one prompt with its n >= 2 responses. `to_groups` turns every accepted format into one table with columns

    prompt      text, or a list of messages ({"role", "content"})
    responses   n texts, or n lists of messages
    win_rate    {objective: n numbers | null}: the mean of P(i beats j) over the responses j that i was compared with

and everything downstream sees nothing else. Objectives stand in the order in which the data first names them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
import pyarrow as pa
from datasets import Dataset

from mopo_trainer.data.adapters import adapt, has
from mopo_trainer.data.adapters.dialogues import OUR_ROLES, replies_to, role_of
from mopo_trainer.data.errors import BadRows, DataError, OnBadRow
from mopo_trainer.data.labels import FORMATS, FloatArray, Group, Label, tie_equal_responses, win_rates
from mopo_trainer.data.scorers import Scorer
from mopo_trainer.data.sources import FileRows
from mopo_trainer.data.texts import Text, without_nulls
from mopo_trainer.data.values import PlainValues

Rows: TypeAlias = "Dataset | Sequence[Mapping[str, Any]] | pd.DataFrame"
PAIR_COLUMNS = (("chosen", "rejected"), ("response_0", "response_1"))


def to_groups(
    rows: Rows,
    *,
    scorers: Mapping[str, Scorer] | None = None,
    rating_scale: float | None = None,
    adapter: str | None = None,
    preferred: str = "preferred",
    on_bad_row: OnBadRow = "error",
) -> Dataset:
    """Turn rows in any accepted format, which may change from row to row, into groups; groups come back as they are.

    A row holds its responses as `chosen` and `rejected`, `response_0` and `response_1`, or `responses`, and its labels
    as `preference`, `ratings`, `comparisons` or several of them for different objectives; null is unlabelled. Columns
    of other names are ignored. Two dialogues (messages) without a prompt have what they begin with in common as theirs.
    NaN is null, half a character (a lone surrogate) becomes U+FFFD, and both are said; a content that is a list of
    text parts is their concatenation.

    Args:
        scorers: {objective: function of (prompt, response)}: objectives to compute from the text, ties 1/2.
        rating_scale: ratings become P(i beats j) = sigmoid((r_i - r_j) / rating_scale); None: 1, 1/2 (tie) or 0.
        adapter: which public data set the rows come from (`data/adapters`); None recognises it by its columns,
            "none" looks for none.
        preferred: the objective that chosen beats rejected on, in rows without `preference`.
        on_bad_row: "skip" leaves out rows that cannot be used (empty replies, labels out of range ..) and says how many
            and why; "error" refuses them.

    Raises:
        DataError: names the file, the row (from 0) and its line, the value and what to do about it, and how many rows
            are bad.
    """
    source = isinstance(rows, Dataset) and rows.info.dataset_name
    try:
        if rating_scale is not None and not 0 < rating_scale < math.inf:
            raise DataError(f"rating_scale={rating_scale}: give a positive number, or None for hard comparisons")
        _check_objective(preferred)
        bad = BadRows(on_bad_row)
        if len(rows) == 0:
            raise DataError("the dataset is empty; give at least one row")
        groups = _read_groups(rows, adapter, preferred, bad)
        return _tabulate(groups, win_rates(groups, scorers or {}, rating_scale))
    except DataError as error:
        raise DataError(f"{source}: {error}" if source else str(error)) from error.__cause__


def _read_groups(rows: Rows, adapter: str | None, preferred: str, bad: BadRows) -> list[Group]:
    places, plain_rows = _plain_rows(rows, bad)
    groups: list[tuple[str, Group]] = []
    try:
        adapted = adapt(plain_rows, adapter, preferred) if plain_rows else ()
    except DataError as error:
        raise DataError(str(error) if error.row is None else f"{places[error.row]}: {error}") from None
    for index, row in adapted:
        if isinstance(row, str):
            bad.leave_out(row)
            continue
        if isinstance(row, DataError):
            bad.add(places[index], row)
            continue
        try:
            groups.append((places[index], _read_group(row, preferred)))
        except DataError as error:
            bad.add(places[index], error)
    kinds = Counter(isinstance(group.prompt, str) for _, group in groups)
    for place, group in groups:
        if isinstance(group.prompt, str) != kinds.most_common(1)[0][0]:
            bad.add(place, DataError("plain text and messages in one dataset; write every row the same way"))
    kept = [group for _, group in groups if isinstance(group.prompt, str) == kinds.most_common(1)[0][0]]
    bad.report(len(kept), rows.info.dataset_name if isinstance(rows, Dataset) else None)
    return tie_equal_responses(kept)


def _plain_rows(rows: Rows, bad: BadRows) -> tuple[list[str], list[Mapping[str, Any]]]:
    """Where every row stands, and the row as plain values."""
    values = PlainValues()
    places: list[str] = []
    plain: list[Mapping[str, Any]] = []
    if isinstance(rows, pd.DataFrame):
        raw: list[Any] = rows.to_dict("records")
    else:
        raw = rows.to_list() if isinstance(rows, Dataset) else list(rows)
    for index, row in enumerate(raw):
        place = rows.place(index) if isinstance(rows, FileRows) else f"row {index}"
        try:
            plain.append(values.row(row))
            places.append(place)
        except DataError as error:
            bad.add(place, error)
    values.report(rows.info.dataset_name if isinstance(rows, Dataset) else None)
    return places, plain


def _read_group(row: Mapping[str, Any], preferred: str) -> Group:
    prompt, responses = _read_texts(row)
    labels: dict[str, Label | None] = {}
    for column, read_label in LABEL_COLUMNS.items():
        by_objective = row.get(column) or {}
        if column == "preference" and has(row, "chosen") and not has(row, column):
            by_objective = {preferred: 1.0}
        if not isinstance(by_objective, dict):
            raise DataError(f"`{column}` is {_shown(by_objective)}; write {{objective: ..}}")
        for name, value in by_objective.items():
            if value is None:
                if _is_name(name):  # a table has the names of bad rows in every row
                    labels.setdefault(name, None)
                continue
            _check_objective(name)
            if labels.get(name) is None:
                labels[name] = read_label(f"{column} of {name!r}", value, len(responses))
            else:
                raise DataError(
                    f"duplicate objective names: {name!r} is labelled again in `{column}`; rename one of them"
                )
    return Group(prompt, responses, labels)


def _is_name(name: Any) -> bool:
    return isinstance(name, str) and name != "" and name == name.strip()


def _check_objective(name: Any) -> None:
    if not _is_name(name):
        raise DataError(f"the objective's name is {name!r}; write a name, without spaces around it")


def _read_texts(row: Mapping[str, Any]) -> tuple[Text, list[Text]]:
    pairs = [[row[column] for column in pair] for pair in PAIR_COLUMNS if has(row, *pair)]
    given = [*pairs, row["responses"]] if has(row, "responses") else pairs
    if len(given) != 1:
        columns = _shown_names(column for column in row if has(row, column))
        problem = "responses are given twice" if given else "unknown columns"
        raise DataError(f"{problem} (columns: {columns}); accepted are {FORMATS}")
    prompt, responses = row.get("prompt"), given[0]
    if prompt is None and pairs:
        prompt, responses = _split_shared_prompt(responses)
    if not isinstance(responses, list) or len(responses) < 2:
        raise DataError(f"`responses` is {_shown(responses)}; a group needs a list of at least two responses")
    prompt = _read_text("prompt", prompt)
    responses = [_read_text(f"response {index}", response) for index, response in enumerate(responses)]
    responses = replies_to(prompt, responses)
    if any(isinstance(response, str) != isinstance(prompt, str) for response in responses):
        raise DataError("the prompt and the responses mix plain text and messages; write all of them the same way")
    return prompt, responses


def _shown_names(names: Iterable[str], most: int = 20) -> str:
    shown = list(names)
    return ", ".join([*shown[:most], f"{len(shown) - most} more"] if len(shown) > most else shown) or "none"


def _split_shared_prompt(pair: list[Any]) -> tuple[list[Any] | None, list[Any]]:
    """The messages with which both dialogues begin, and what each adds."""
    if not all(isinstance(dialogue, list) for dialogue in pair):
        raise DataError(f"no `prompt` beside plain-text responses; accepted are {FORMATS}")
    first, second = pair
    shared = 0
    while shared < min(len(first), len(second)) and first[shared] == second[shared]:
        shared += 1
    if first == second and first and role_of(first[-1]) == "assistant":  # the same reply twice
        shared -= 1
    return first[:shared] or None, [first[shared:], second[shared:]]


def _read_text(name: str, text: Any) -> Text:
    if isinstance(text, str):
        if text.strip():
            return text
    elif isinstance(text, list) and all(isinstance(message, dict) for message in text):
        messages = [_with_text(name, message) for message in without_nulls(text)]
        if not all(isinstance(message.get("role"), str) for message in messages):
            keys = ", ".join(dict.fromkeys(key for message in messages for key in message))
            raise DataError(f"a message of the {name} has no role (keys: {keys}); write {{role, content}}")
        if not all(isinstance(message.get("content"), str) for message in messages):
            raise DataError(f"a message of the {name} has no text as its content; write {{role, content}}")
        if any(message["content"].strip() for message in messages):
            return messages
    elif text is not None:
        raise DataError(f"the {name} is {_shown(text)}; write text or a list of messages {{role, content}}")
    empty = f"empty {'prompt' if name == 'prompt' else 'reply'}"
    raise DataError(f"the {name} is empty; write its text or remove the row", empty)


def _with_text(name: str, message: dict[str, Any]) -> dict[str, Any]:
    """The message, its role by the usual name and its content as one text if it came in parts."""
    parts = message.get("content")
    if message.get("role") not in OUR_ROLES and message.get("role"):
        message = {**message, "role": role_of(message)}
    if not isinstance(parts, list):
        return message
    texts = []
    for part in parts:
        kind = part.get("type") or "text" if isinstance(part, dict) else "text"
        text = part.get("text") if isinstance(part, dict) else part
        if kind not in ("text", "input_text", "output_text") or not isinstance(text, str):
            raise DataError(
                f"a message of the {name} has a part of type {kind!r} ({_shown(part)}); only text is trained on, "
                "leave out such rows",
                f"a part of type {kind!r}",
            )
        texts.append(text)
    return {**message, "content": "".join(texts)}


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
            raise DataError(
                f"{name}: got {_shown(rating)}; give a finite number, or null where nobody rated{_quoted(rating)}"
            )
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
    mend = f"give a probability from 0 to 1, or null where nobody judged{_quoted(value)}"
    raise DataError(f"{name}: got {_shown(value)}; {mend}")


def _quoted(value: Any) -> str:
    return ", without quotes" if isinstance(value, str) else ""


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


def _tabulate(groups: list[Group], rates: Mapping[str, FloatArray]) -> Dataset:
    sizes = np.array([len(group.responses) for group in groups])
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    columns = []
    for values in rates.values():
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
                "win_rate": pa.StructArray.from_arrays(columns, names=list(rates)),
            }
        )
    )
