"""Public preference data sets recognised by their columns and rewritten as rows that `mopo_trainer.data` accepts.

To add one: write a function that is true of its rows alone, and one that rewrites a row (or all rows of one prompt)
in an accepted format or raises `Unusable`; then list both in ADAPTERS.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from mopo_trainer.data.adapters import pairs, rated, verdicts
from mopo_trainer.data.adapters.dialogues import SYSTEM_COLUMNS, Row, Unusable, as_chat, is_chat, system_of, with_system
from mopo_trainer.data.adapters.refused import MEDIA, refusal
from mopo_trainer.data.sources import DataError, one_line

__all__ = ["ADAPTERS", "Adapter", "adapt", "has"]

logger = logging.getLogger(__name__)

Adapted = tuple[int, Row | str | DataError]  # row index, row in an accepted format, why it is left out or bad

LABELS = {"preference", "ratings", "comparisons", "win_rate"}
ROWS_LOOKED_AT = 1000  # by which at least one row must have all the columns of its data set
SHAPE_ERRORS = (AttributeError, IndexError, KeyError, TypeError, ValueError)


@dataclass(frozen=True)
class Adapter:
    """One data set: `recognises` is true of its rows alone, `convert` rewrites a row, or all rows of one prompt."""

    name: str
    recognises: Callable[[Row], bool]
    convert: Callable[[Any], Row]
    by_prompt: bool = False
    speaks: Callable[[Row], bool] | None = None  # whether this row becomes messages, where some do and some do not
    reads: Callable[[Row], bool] | None = None  # rows that it takes when asked for by name; None: what it recognises


ADAPTERS = (
    Adapter("hh-rlhf", pairs.is_hh_pair, pairs.convert_pair),
    Adapter("pku-saferlhf", verdicts.PKU.recognises, verdicts.PKU.convert, reads=verdicts.PKU.reads),
    Adapter("ultrafeedback-binarized", pairs.is_scored_pair, pairs.convert_pair, speaks=pairs.speaks),
    Adapter("sharegpt-pairs", pairs.is_sharegpt_pair, pairs.convert_pair),
    Adapter("instruction-pairs", pairs.is_instruction_pair, pairs.convert_pair, speaks=pairs.speaks),
    Adapter("dialogue-pairs", pairs.is_dialogue_pair, pairs.convert_pair),
    Adapter("pku-saferlhf-single-dimension", verdicts.is_single_dimension, verdicts.SINGLE_DIMENSION.convert),
    *(
        Adapter(verdict.name, verdict.recognises, verdict.convert, speaks=verdict.speaks)
        for verdict in verdicts.VERDICTS
    ),
    Adapter("arena", verdicts.is_arena, verdicts.convert_arena),
    Adapter("arena-responses", verdicts.is_arena_responses, verdicts.convert_arena_responses),
    Adapter("webgpt", verdicts.is_webgpt, verdicts.convert_webgpt),
    Adapter("summarize-from-feedback", verdicts.is_summary_comparison, verdicts.convert_summary_comparison),
    Adapter("ultrafeedback", rated.is_ultrafeedback, rated.convert_ultrafeedback),
    Adapter("distilabel", rated.is_distilabel, rated.convert_distilabel),
    Adapter("nectar", rated.is_nectar, rated.convert_nectar, speaks=rated.is_dialogue),
    Adapter("helpsteer", rated.is_helpsteer, rated.convert_helpsteer, by_prompt=True, speaks=rated.is_dialogue),
    Adapter("beavertails", rated.is_beavertails, rated.convert_beavertails, by_prompt=True),
)


def adapt(rows: list[Row], adapter: str | None = None, preferred: str = "preferred") -> Iterable[Adapted]:
    """Rewrite `rows` by the adapter of that name, or by the one that recognises them if None; "none" keeps them.

    A column `system` or `system_prompt` becomes the first message. `preferred` is the objective of data that say which
    reply is better and not in what.

    Raises:
        DataError: no adapter of that name, rows of several data sets, of images, or that hold no comparison.
    """
    if adapter == "none":
        return enumerate(rows)
    names = [known.name for known in ADAPTERS]
    if adapter is not None and adapter not in names:
        raise DataError(f"adapter={adapter!r}: no such adapter; give one of {', '.join(names)}, none")
    known = _recognise(rows) if adapter is None else ADAPTERS[names.index(adapter)]
    if known and known.reads and adapter:
        known = replace(known, recognises=known.reads)
    columns = set().union(*rows)
    _refuse_media(rows, columns)
    if "tools" in columns and any(row.get("tools") for row in rows):
        logger.warning("the column `tools` is not read: the chat template sees the messages only")
    adapted: Iterable[Adapted] = _convert(rows, known) if known else enumerate(rows)
    if preferred != "preferred" and known:
        adapted = ((index, _renamed(row, preferred)) for index, row in adapted)
    systems: dict[int, str | DataError] = {}
    if columns.intersection(SYSTEM_COLUMNS):
        systems = {index: text for index, row in enumerate(rows) if (text := system_of(row))}
    if systems:
        logger.warning(
            "%d rows have a `system` column: it becomes the system message, and text becomes messages; "
            "adapter='none' leaves it out",
            len(systems),
        )
    chat = bool(systems) or (known is not None and known.speaks is not None and any(map(known.speaks, rows)))
    return _in_messages(adapted, systems) if chat else adapted


def has(row: Row, *columns: str) -> bool:
    """Whether every one of `columns` holds a value in this row."""
    return all(row.get(column) is not None for column in columns)


def _is_labelled(row: Row) -> bool:
    """Whether the row has labels in a format of ours, so that no adapter should touch it."""
    return not LABELS.isdisjoint(row) and any(isinstance(row.get(column), dict) for column in LABELS)


def _is_ours(row: Row) -> bool:
    return has(row, "chosen", "rejected") or has(row, "response_0", "response_1") or has(row, "responses")


def _recognise(rows: list[Row]) -> Adapter | None:
    """The adapter of the first row that has one, if none before it is in a format of ours."""
    for index, row in enumerate(rows[:ROWS_LOOKED_AT]):
        if _is_labelled(row):
            return None
        fitting = [known for known in ADAPTERS if known.recognises(row)]
        if len(fitting) > 1:
            names = " and of ".join(known.name for known in fitting)
            raise DataError(f"has the columns of {names}; give adapter='{fitting[0].name}' or the other", row=index)
        if fitting or _is_ours(row):
            return fitting[0] if fitting else None
    reason = refusal(rows[0])
    if reason:
        raise DataError(f"{reason} (columns: {_columns(rows[0])})", row=0)
    return None


def _refuse_media(rows: list[Row], columns: set[str]) -> None:
    for column in columns.intersection(MEDIA):
        for index, row in enumerate(rows):
            if row.get(column) not in (None, "", []):
                raise DataError(
                    f"the column `{column}` holds what the replies are about, and only text is read; remove the column "
                    "if the text makes sense alone, or give adapter='none' to leave it unread",
                    row=index,
                )


def _convert(rows: list[Row], adapter: Adapter) -> Iterator[Adapted]:
    recognised = [adapter.recognises(row) and not _is_labelled(row) for row in rows]
    whole = next((row for row, known in zip(rows, recognised, strict=True) if known), None)
    groups: dict[Any, list[int]] = {}
    for index, row in enumerate(rows):
        if not recognised[index]:
            yield index, _missing(row, whole, adapter)
        elif adapter.by_prompt:
            groups.setdefault((row["prompt"], str(system_of(row))), []).append(index)
        else:
            yield index, _converted(row, adapter)
    for indices in groups.values():
        yield indices[0], _converted([rows[index] for index in indices], adapter)


def _converted(given: Row | list[Row], adapter: Adapter) -> Row | str | DataError:
    try:
        return adapter.convert(given)
    except Unusable as reason:
        return str(reason)
    except SHAPE_ERRORS as error:
        shape = f"not of the shape that rows of {adapter.name} have"
        return DataError(
            f"{shape} ({type(error).__name__}: {one_line(error)}); mend it, or give adapter='none' if the data only "
            "looks like them",
            shape,
        )


def _missing(row: Row, whole: Row | None, adapter: Adapter) -> str | DataError:
    """Why a row that is not recognised is left out: values that other rows have are missing in it; or bad."""
    if whole is None or any(has(row, column) and not has(whole, column) for column in row):
        return DataError(
            f"columns {_columns(row)} are not those of {adapter.name}; "
            f"give adapter='none' if the data only looks like {adapter.name}, or mend the row",
            f"columns that are not those of {adapter.name}",
        )
    missing = [column for column in whole if has(whole, column) and not has(row, column)]
    decisive = [column for column in missing if adapter.recognises({**row, column: whole[column]})] or missing
    if not adapter.recognises({**row, **{column: whole[column] for column in missing}}):
        return DataError(
            f"columns {_columns(row)} hold other kinds of values than {adapter.name} has; "
            "mend the row, or give adapter='none' if the data only looks like it",
            f"other kinds of values than {adapter.name} has",
        )
    return f"no {', '.join(f'`{column}`' for column in decisive)}"


def _renamed(row: Row | str | DataError, preferred: str) -> Row | str | DataError:
    """The row with the judgement that has no name of its own under the name `preferred`."""
    if not isinstance(row, dict):
        return row
    labels = {
        column: {preferred if name == "preferred" else name: values for name, values in row[column].items()}
        for column in LABELS
        if column in row
    }
    return {**row, **labels}


def _in_messages(adapted: Iterable[Adapted], systems: Mapping[int, str | DataError]) -> Iterator[Adapted]:
    """All rows in messages, those of `systems` with their system message."""
    for index, row in adapted:
        row = _with_system(row, systems.get(index))
        yield index, as_chat(row) if isinstance(row, dict) and not is_chat(row) else row


def _with_system(row: Row | str | DataError, system: str | DataError | None) -> Row | str | DataError:
    if not isinstance(row, dict) or system is None:
        return row
    if isinstance(system, DataError):
        return system
    try:
        return with_system(row, system)
    except Unusable as reason:
        return str(reason)
    except SHAPE_ERRORS:  # what the row has in the place of text is for its reader to name
        return row


def _columns(row: Row) -> str:
    return ", ".join(column for column in row if has(row, column)) or "none"
