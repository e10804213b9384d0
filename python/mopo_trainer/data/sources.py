"""Where rows come from: JSON, Parquet and Arrow files, compressed or not, directories, or a name on the hub."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict
from datasets.exceptions import DatasetsError

from mopo_trainer.data.archives import read_bytes
from mopo_trainer.data.errors import BadRows, DataError, OnBadRow, one_line
from mopo_trainer.data.json_rows import read_json
from mopo_trainer.names import it_has

logger = logging.getLogger(__name__)

JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")
KINDS = f"{', '.join(JSON_SUFFIXES)}, .parquet, .arrow, or one of these as .gz, .bz2, .xz, .zst, .zip"
NAMED = (*JSON_SUFFIXES, ".gz", ".bz2", ".xz", ".zst", ".zip")
FILE_NAME = re.compile(r".*\.(jsonl|json|ndjson|parquet|arrow|csv|tsv|gz|bz2|xz|zst|zip)")
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
MOST_DEPTH = 32  # schemas of more than 64 levels cannot be exchanged between Arrow's libraries
MOST_KEYS = 1000  # an object per row with names of its own (ids, say) would become a table of rows × names
LIBRARY_ERRORS = (DatasetsError, OSError, ValueError, RuntimeError, KeyError, pa.ArrowException)


class FileRows(Dataset):
    """Rows of files, which know where they stand as long as none is moved."""

    parts: Sequence[tuple[str, Sequence[int | None]]] = ()  # of each file: its name, and the line of each of its rows

    def place(self, index: int) -> str:
        """ "row 4 (line 7)", with the file's name before it if there are several."""
        for name, lines in self.parts:
            if index < len(lines):
                line = "" if lines[index] is None else f" (line {lines[index]})"
                return f"{name}, row {index}{line}" if len(self.parts) > 1 else f"row {index}{line}"
            index -= len(lines)
        return f"row {index}"


def load_rows(
    source: str | Path, *, split: str = "train", name: str | None = None, on_bad_row: OnBadRow = "error"
) -> Dataset:
    """Read the rows of `source` as they are (`mopo_trainer.data.to_groups` gives them their meaning).

    Args:
        source: a file of JSON Lines, of JSON (a list, an object around one, or columns), of Parquet or Arrow,
            compressed by gzip, bzip2, xz, zstd or zip or not; a directory written by `save_to_disk` or a clone of a
            hub dataset; or the name of a dataset on the hub.
        split: which split of a directory or hub dataset holds the rows; a file has only one.
        name: configuration of a hub dataset.
        on_bad_row: "skip" leaves out lines that are no JSON objects, and says how many; "error" refuses them.

    Raises:
        DataError: the source does not exist, is empty or cannot be read; of broken JSON lines, the first one's number
            and how many they are.
    """
    bad, path = BadRows(on_bad_row), Path(source).expanduser()
    if path.is_dir():
        rows = _read_directory(path, split, name, bad)
    elif path.is_file():
        rows = _read_files([path], split, bad)
    elif FILE_NAME.fullmatch(path.name) or not HUB_NAME.fullmatch(str(source)):
        raise DataError(f"{path}: no such file or directory")
    else:
        rows = _read_hub(str(source), split, name)
    bad.report(len(rows), str(source))
    if len(rows) == 0:
        raise DataError(f"{source}: the dataset is empty; give at least one row")
    rows.info.dataset_name = str(source)
    return rows


# ---------------------------------------------------------------------------------------------------------- files


def _read_files(paths: Sequence[Path], split: str, bad: BadRows) -> FileRows:
    tables, parts = [], []
    for path in paths:
        table, lines = _read_file(path, split, bad)
        tables.append(table)
        parts.append((path.name, lines))
    try:
        rows = FileRows(pa.concat_tables(tables, promote_options="permissive"))
    except (ValueError, TypeError, pa.ArrowException):  # types that differ from file to file, or that datasets lacks
        rows = FileRows(_table([row for table in tables for row in table.to_pylist(maps_as_pydicts="strict")]))
    rows.parts = parts
    return rows


def _read_file(path: Path, split: str, bad: BadRows) -> tuple[pa.Table, Sequence[int | None]]:
    """The table of one file and, of JSON Lines, the line of each row."""
    content = read_bytes(path)
    try:
        if content.startswith(b"PAR1"):
            table = pq.read_table(pa.BufferReader(content))
        elif content.startswith(b"ARROW1"):
            table = pa.ipc.open_file(content).read_all()
        elif content.startswith(b"\xff\xff\xff\xff"):  # as datasets keeps its cache
            table = pa.ipc.open_stream(content).read_all()
        else:
            _check_text(path, content)
            rows, lines = read_json(content, str(path), split, bad)
            return _table(rows), lines
        table.validate(full=True)  # text that is not UTF-8
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet or Arrow file ({one_line(error)}); write it again") from None
    return table, [None] * len(table)


def _check_text(path: Path, content: bytes) -> None:
    """Refuse what is neither JSON nor a file that is called so."""
    start = content[:4096].replace(b"\0", b"").lstrip(b"\xef\xbb\xbf\xff\xfe \t\r\n").lower()
    if start.startswith(b"version https://git-lfs"):
        raise DataError(f"{path}: a pointer of git-lfs instead of the file; run `git lfs pull` in its repository")
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise DataError(f"{path}: a web page, perhaps a login or an error, instead of data; download the file again")
    if path.suffix in (".parquet", ".arrow"):
        raise DataError(f"{path}: not a readable {path.suffix[1:].capitalize()} file; download or write it again")
    if path.suffix not in NAMED and not start.startswith((b"{", b"[")):
        mend = f"give one of {KINDS}"
        if path.suffix in (".csv", ".tsv"):
            mend += ", with labels as objects (datasets' Dataset.from_csv(..).to_json(..) writes JSON Lines)"
        raise DataError(f"{path}: unknown kind of file; {mend}")


def _table(rows: list[dict[str, Any]]) -> pa.Table:
    """Rows that need not share their columns as a table; a column absent from a row is null there."""
    names = dict.fromkeys(key for row in rows for key in row)
    return pa.table({name: _column([row.get(name) for row in rows]) for name in names})


def _column(values: list[Any]) -> pa.Array:
    """An Arrow column; of values that Arrow cannot hold in one (types that mix, nesting too deep), one of JSON."""
    try:
        names = {key for value in values if isinstance(value, dict) for key in value}
        if len(names) <= MOST_KEYS:
            column = pa.array(values)
            if _depth(column.type) <= MOST_DEPTH:
                return column
    except (pa.ArrowException, OverflowError, TypeError):
        pass
    texts = [None if value is None else json.dumps(value) for value in values]
    return pa.ExtensionArray.from_storage(pa.json_(), pa.array(texts, pa.string()))


def _depth(kind: pa.DataType) -> int:
    return 1 + max((_depth(kind.field(i).type) for i in range(kind.num_fields)), default=0)


# ---------------------------------------------------------------------------------------------- directories, the hub


def _read_directory(path: Path, split: str, name: str | None, bad: BadRows) -> Dataset:
    saved = any((path / state).exists() for state in ("state.json", "dataset_dict.json"))
    try:
        loaded = datasets.load_from_disk(str(path)) if saved else _data_files(path, name)
    except LIBRARY_ERRORS as error:
        raise DataError(
            f"{path}: not a directory that `save_to_disk` wrote, nor a clone of a hub dataset ({one_line(error)}); "
            "name a file in it"
        ) from None
    if isinstance(loaded, Dataset):
        return loaded
    if split not in loaded:
        raise DataError(f"{path}: no split {split!r}; {it_has(split, map(str, loaded))}")
    return loaded[split] if isinstance(loaded, DatasetDict) else _read_files(loaded[split], split, bad)


def _data_files(path: Path, name: str | None) -> dict[str, list[Path]]:
    """The files of each split, as the README of a clone or the names of the files tell."""
    files = datasets.load_dataset_builder(str(path), name=name).config.data_files
    return {str(split): [Path(file) for file in of_split] for split, of_split in files.items()}


def _read_hub(source: str, split: str, name: str | None) -> Dataset:
    try:
        return datasets.load_dataset(source, name=name, split=split)
    except LIBRARY_ERRORS as error:
        raise DataError(
            f"{source}: neither a file or directory here nor a dataset that the hub would give ({one_line(error)}); "
            "check the name, the split and the connection, or give the path of a file"
        ) from None
