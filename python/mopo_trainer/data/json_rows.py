"""Rows from JSON text in the layouts that people write: a row a line, a list, an object around a list, columns."""

from __future__ import annotations

import codecs
import io
import json
import logging
from collections.abc import Iterable
from typing import Any, NamedTuple

from mopo_trainer.data.errors import BadRows, DataError
from mopo_trainer.data.values import PlainValues

logger = logging.getLogger(__name__)

AROUND_ROWS = ("data", "rows", "examples", "instances", "items", "samples", "records", "results", "entries", "dataset")


class JSONRows(NamedTuple):
    """Rows and, of JSON Lines, the line that each stands on."""

    rows: list[dict[str, Any]]
    lines: list[int | None]


def read_json(content: bytes, source: str, split: str, bad: BadRows) -> JSONRows:
    """The rows of a JSON or JSON Lines file; those that cannot be read are added to `bad`.

    Raises:
        DataError: the file is no JSON at all.
    """
    try:
        content = _as_utf8(content)
        whole = _whole_file(content, split)
    except (ValueError, TypeError) as error:
        raise DataError(f"{source}: {error}") from None
    numbered: Iterable[tuple[int, Any]] = enumerate(whole or [])
    if whole is None:
        numbered = ((n, line) for n, line in enumerate(io.BytesIO(content), start=1) if not line.isspace())
    values, found = PlainValues(), JSONRows([], [])
    for number, value in numbered:
        try:
            found.rows.append(values.row(_from_viewer(_parse(value) if whole is None else value)))
            found.lines.append(number if whole is None else None)
        except DataError as error:
            bad.add(f"{source}, {'line' if whole is None else 'element'} {number}", error)
    values.report(source)
    return found


def _as_utf8(content: bytes) -> bytes:
    encoding = json.detect_encoding(content[:4])
    if not encoding.startswith("utf-8"):
        try:
            content = content.decode(encoding, "surrogatepass").encode("utf-8", "surrogatepass")
        except UnicodeDecodeError as error:
            raise DataError(f"not text ({error.reason}, read as {encoding}); save it as UTF-8") from None
    return content.removeprefix(codecs.BOM_UTF8)


def _whole_file(content: bytes, split: str) -> list[Any] | None:
    """The rows of a file that is one JSON value, None if it has a row a line."""
    lines = (line for line in io.BytesIO(content) if not line.isspace())
    first, more = next(lines, b""), next(lines, None) is not None
    if first.lstrip().startswith(b"["):
        value = _parse(content)
        return value if isinstance(value, list) else None
    try:
        if more and isinstance(_parse(first), dict):
            return None
    except DataError:
        pass  # an object over several lines, or JSON Lines whose first line is broken
    try:
        value = _parse(content)
    except DataError:
        return None
    rows = _rows_of_object(value, split) if isinstance(value, dict) else [value]
    return None if not more and rows == [value] else rows


def _parse(text: bytes) -> Any:
    try:
        decoded = text.removeprefix(codecs.BOM_UTF8).decode("utf-8", "surrogatepass")
        return json.loads(decoded, object_pairs_hook=_unique_keys)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        problem, mend = f"{error.msg}, {line}column {error.colno}", "it is cut short or damaged, write it again"
    except UnicodeDecodeError as error:
        problem, mend = f"byte {text[error.start]:#x} at {error.start} is not utf-8", "save the file as UTF-8"
    except RecursionError:
        problem, mend = "nested too deeply", "write flat rows"
    except DataError:
        raise
    except ValueError as error:  # a number of thousands of digits
        problem, mend = str(error), "mend the number"
    raise DataError(f"not valid JSON ({problem}); {mend}", "not valid JSON")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise DataError(f"the name {twice!r} stands twice in one object; rename or drop one")
    return unique


def _rows_of_object(value: dict[str, Any], split: str) -> list[Any]:
    """The rows in one JSON object: a list under a name, columns, or the object itself."""
    for name in (split, *AROUND_ROWS):
        if _is_list_of_objects(value.get(name)):
            total = value.get("num_rows_total")  # as the hub's viewer answers
            if isinstance(total, int) and total > len(value[name]):
                logger.warning("the file holds %d of the %d rows of its data set", len(value[name]), total)
            return value[name]
        if set(value) == {name} and isinstance(value[name], dict):
            return _rows_of_object(value[name], split)
    columns = list(value.values())
    if {"columns", "data"} <= set(value):  # pandas, orient="split"
        return [dict(zip(value["columns"], row, strict=True)) for row in value["data"]]
    if columns and all(isinstance(column, list) for column in columns):
        first = [column[0] for column in columns if column]
        if any(isinstance(item, dict) and item.keys() & {"role", "from", "content"} for item in first):
            return [value]  # one row of messages
        if all(map(_is_list_of_objects, columns)):
            raise DataError(f"no split {split!r}; it has: {', '.join(value)}")
        lengths = [f"{name} {len(column)}" for name, column in value.items()]
        if len({len(column) for column in columns}) > 1:
            raise DataError(f"columns of different lengths ({', '.join(lengths)}); give every row every column")
        return [dict(zip(value, row, strict=True)) for row in zip(*columns, strict=True)]
    if columns and all(isinstance(column, dict) for column in columns):
        if all(key.isdigit() for column in columns for key in column):  # pandas, orient="columns"
            index = dict.fromkeys(key for column in columns for key in column)
            return [{name: column.get(key) for name, column in value.items()} for key in index]
        if all(name.isdigit() for name in value):  # pandas, orient="index"
            return columns
    return [value]


def _is_list_of_objects(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def _from_viewer(value: Any) -> Any:
    """A row as it is; of the hub's viewer, {"row_idx", "row", "truncated_cells"}, the row within."""
    if not isinstance(value, dict) or not {"row_idx", "row"} <= value.keys():
        return value
    if value.get("truncated_cells"):
        cells = ", ".join(map(str, value["truncated_cells"]))
        raise DataError(f"the viewer cut {cells} short; download the data set itself", "cut short by the viewer")
    return value["row"]
