"""Where rows come from: JSON Lines, JSON, Parquet, a directory written by `save_to_disk`, or a name on the hub."""

from __future__ import annotations

import gzip
import json
import logging
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, cast

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict

from mopo_trainer.names import it_has

logger = logging.getLogger(__name__)

JSON_SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")

# Columns that hold prompts, responses or labels in some format: one that mixes types is an error, others are left out.
READ_COLUMNS = (
    *("prompt", "responses", "response_0", "response_1", "chosen", "rejected"),
    *("preference", "ratings", "comparisons", "win_rate"),
    *("response", "instruction", "completions"),
)


class DataError(ValueError):
    """Data that cannot be used; one line that names the file, the row, the value and what to do about it."""


def one_line(error: Exception, limit: int = 200) -> str:
    """What an error of another library says, without its line breaks."""
    text = " ".join(str(error).split())
    return text if len(text) <= limit else text[: limit - 3] + "..."


def load_rows(source: str | Path, *, split: str = "train", name: str | None = None) -> Dataset:
    """Read the rows of `source` as they are (`mopo_trainer.data.to_groups` gives them their meaning).

    Args:
        source: a .jsonl, .json (one list, or one object per line), .gz of either, or .parquet file; a directory
            written by `save_to_disk`; or the name of a dataset on the hub.
        split: which split of a directory or hub dataset holds the rows; a file has only one.
        name: configuration of a hub dataset.

    Raises:
        DataError: the source does not exist, is empty or cannot be read; of a broken JSON line, the line number.
    """
    path = Path(source)
    if path.is_dir():
        rows = _read_directory(path, split)
    elif path.is_file() and path.name.endswith(JSON_SUFFIXES):
        rows = _table(list(_read_json(path)), str(path))
    elif path.is_file() and path.suffix == ".parquet":
        rows = _read_parquet(path)
    elif path.is_file():
        raise DataError(f"{path}: unknown kind of file; give one of {', '.join(JSON_SUFFIXES)}, .parquet")
    elif path.name.endswith((*JSON_SUFFIXES, ".parquet")) or not HUB_NAME.fullmatch(str(source)):
        raise DataError(f"{path}: no such file or directory")
    else:
        rows = _read_hub(str(source), split, name)
    if len(rows) == 0:
        raise DataError(f"{source}: the dataset is empty; give at least one row")
    rows.info.dataset_name = str(source)
    return rows


def _read_json(path: Path) -> Iterator[dict[str, Any]]:
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with cast("IO[bytes]", opener(path, "rb")) as file:
            if ".jsonl" not in path.suffixes and file.read(1) == b"[":
                file.seek(0)
                yield from _json_objects(enumerate(_parse_json(file.read(), str(path))), f"{path}, element")
            else:
                file.seek(0)
                lines = ((number, line) for number, line in enumerate(file, start=1) if line.strip())
                values = ((number, _parse_json(line, f"{path}, line {number}")) for number, line in lines)
                yield from _json_objects(values, f"{path}, line")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: the gzip file is cut short or damaged ({error}); write it again") from None


def _parse_json(text: bytes, where: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_unique_keys)
    except DataError as error:
        raise DataError(f"{where}: {error}") from None
    except ValueError as error:
        raise DataError(
            f"{where}: not valid JSON ({error}); the line is cut short or damaged, write it again"
        ) from None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise DataError(f"the name {twice!r} stands twice in one object; rename or drop one")
    return unique


def _json_objects(values: Iterable[tuple[int, Any]], where: str) -> Iterator[dict[str, Any]]:
    for number, value in values:
        if not isinstance(value, dict):
            raise DataError(f"{where} {number}: got {str(value)[:40]!r}; write one JSON object, {{...}}, per row")
        yield value


def _table(rows: list[dict[str, Any]], where: str) -> Dataset:
    """Rows that need not share their columns as a Dataset; a column absent from a row is null there."""
    arrays = {}
    for column in dict.fromkeys(key for row in rows for key in row):
        try:
            arrays[column] = pa.array([row.get(column) for row in rows])
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            problem = f"{where}: column `{column}` mixes types ({one_line(error)})"
            if column in READ_COLUMNS:
                raise DataError(f"{problem}; write it the same way in every row") from None
            logger.warning("%s; it is left out", problem)
    return Dataset(pa.table(arrays))


def _read_parquet(path: Path) -> Dataset:
    try:
        return Dataset(pq.read_table(path, memory_map=True))
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file ({one_line(error)})") from None


def _read_directory(path: Path, split: str) -> Dataset:
    try:
        loaded = datasets.load_from_disk(str(path))
    except (FileNotFoundError, pa.ArrowInvalid) as error:
        raise DataError(
            f"{path}: not a directory that `save_to_disk` wrote ({one_line(error)}); name a file in it"
        ) from None
    if isinstance(loaded, DatasetDict):
        if split not in loaded:
            raise DataError(f"{path}: no split {split!r}; {it_has(split, loaded)}")
        return loaded[split]
    return loaded


def _read_hub(source: str, split: str, name: str | None) -> Dataset:
    try:
        return datasets.load_dataset(source, name=name, split=split)
    except (ConnectionError, FileNotFoundError, ValueError) as error:
        raise DataError(
            f"{source}: neither a file or directory here nor a dataset that the hub would give ({one_line(error)}); "
            "check the name, the split and the connection, or give the path of a file"
        ) from None
