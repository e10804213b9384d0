"""What people hand over as a data set -> rows -> groups -> tokens: splits, streams, tables, paths."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import pandas as pd
import pyarrow as pa
from datasets import Dataset
from tqdm.auto import tqdm

from mopo_trainer.data import load_rows, to_groups
from mopo_trainer.data.errors import DataError, OnBadRow
from mopo_trainer.data.scorers import load_scorers
from mopo_trainer.data.tokens import TokenizedGroups, tokenize_groups
from mopo_trainer.training.config import MOPOConfig

Rows: TypeAlias = Dataset | Sequence[Mapping[str, Any]]

MOST_STREAMED = 1_000_000  # rows: a stream beyond it has no end, or none that fits into memory


def read_rows(source: Any, argument: str, *, split: str = "train", on_bad_row: OnBadRow = "error") -> Rows:
    """The rows of one data set, whole: the multipliers are solved on all labels before the first step.

    Args:
        source: rows; a Dataset, pandas DataFrame or pyarrow Table; a stream (IterableDataset, generator), read to its
            end; a path or hub name as `load_rows` takes it; of a DatasetDict the rows of `split`.
        argument: what the message of an error calls it.
        on_bad_row: of a path, what becomes of lines that cannot be read.

    Raises:
        DataError: no such split, a stream of more than MOST_STREAMED rows, rows that are no mappings, another type.
    """
    if isinstance(source, str | Path):
        return load_rows(source, split=split, on_bad_row=on_bad_row)
    if isinstance(source, Mapping):
        if split not in source:
            raise DataError(f"{argument} is a dict of {_names(source)} without {split!r}; give the rows of one split")
        return read_rows(source[split], f"{argument}[{split!r}]", on_bad_row=on_bad_row)
    if isinstance(source, Dataset):
        return source
    if isinstance(source, pd.DataFrame):
        return source.to_dict("records")  # as a table, a column of mixed types would be refused
    if isinstance(source, pa.Table):
        return Dataset(source)
    if hasattr(source, "__len__") and hasattr(source, "__getitem__"):
        rows = [source[i] for i in range(len(source))]
    elif isinstance(source, Iterable):
        rows = list(_to_the_end(source, argument))
    else:
        raise DataError(
            f"{argument} is a {type(source).__name__}; give rows, a Dataset, DatasetDict or IterableDataset, a "
            "DataFrame, or the path of a file"
        )
    for index, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise DataError(f"{argument}, row {index} is a {type(row).__name__}; give one mapping per row")
    return rows


def read_groups(source: Any, argument: str, args: MOPOConfig, *, split: str = "train") -> Dataset:
    """The groups of one data set, the scorers of `args` applied."""
    rows = read_rows(source, argument, split=split, on_bad_row=args.on_bad_row)
    scorers = load_scorers(args.scorers or [])
    return to_groups(rows, scorers=scorers, rating_scale=args.rating_scale, on_bad_row=args.on_bad_row)


def tokenize(groups: Dataset, names: Sequence[str], tokenizer: Any, args: MOPOConfig) -> TokenizedGroups:
    """Tokens of groups under the lengths and template that `args` ask for."""
    return tokenize_groups(
        groups,
        names,
        tokenizer,
        max_length=args.max_length,
        max_prompt_length=args.max_prompt_length,
        as_chat=args.as_chat,
    )


def _to_the_end(stream: Iterable[Any], argument: str) -> Iterator[Any]:
    rows = iter(stream)
    yield from tqdm(islice(rows, MOST_STREAMED), desc=f"Reading {argument}", unit=" rows", delay=1)
    if next(rows, None) is not None:
        raise DataError(
            f"{argument} streams more than {MOST_STREAMED:,} rows and all are read before the first step; "
            "give the first so many, .take(n), or a Dataset"
        )


def _names(splits: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, splits)) or "nothing"
