"""Values as JSON has them, whatever library they come from."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Any

import numpy as np
import pandas as pd

from mopo_trainer.data.errors import DataError

logger = logging.getLogger(__name__)

INT64 = range(-(2**63), 2**63)


class PlainValues:
    """Turns values into text, numbers, lists and dicts, and counts what had to change.

    NaN, NA and NaT are null, as pandas means them; half a character (a lone surrogate, as cut model output has) becomes
    U+FFFD; integers beyond 64 bits become floats; NumPy's arrays and scalars, tuples and decimals their Python kin.
    """

    def __init__(self) -> None:
        self.nans = 0
        self.halves = 0
        self._names: dict[str, str] = {}

    def row(self, value: Any) -> dict[str, Any]:
        """One row.

        Raises:
            DataError: not a mapping, or nested too deeply.
        """
        try:
            plain = value if _are_plain((value,)) else self.plain(value)
        except RecursionError:
            raise DataError("nested too deeply; write flat rows", "nested too deeply") from None
        if not isinstance(plain, dict):
            raise DataError(f"got {str(plain)[:40]!r}; write one JSON object, {{...}}, per row", "no object")
        return plain

    def plain(self, value: Any) -> Any:
        kind = type(value)
        if kind is str:
            return value if value.isascii() else self._whole(value)
        if kind is dict:
            return {self._names.get(key) or self._name(key): self.plain(item) for key, item in value.items()}
        if kind is list:
            return [self.plain(item) for item in value]
        if kind is float:
            return value if value == value else self._null()
        if kind is int:
            return value if value in INT64 else _as_float(value)
        if value is None or kind is bool:
            return value
        return self._foreign(value)

    def _foreign(self, value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return self.plain(value.tolist())
        if isinstance(value, np.generic):
            return self.plain(None if pd.isna(value) else value.item())
        if isinstance(value, Mapping):
            return self.plain(dict(value))
        if isinstance(value, list | tuple):
            return self.plain(list(value))
        if isinstance(value, Decimal):
            return self.plain(float(value))
        if isinstance(value, str):
            return self.plain(str(value))
        return self._null() if value is pd.NA or value is pd.NaT else value

    def _null(self) -> None:
        self.nans += 1

    def _whole(self, text: str) -> str:
        if _is_utf8(text):
            return text
        self.halves += 1
        # Two halves that belong together (written apart by careless escaping) make their character again.
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")

    def _name(self, key: Any) -> Any:
        if isinstance(key, str):
            self._names[key] = self._whole(key)
            return self._names[key]
        return key

    def report(self, source: str | None = None) -> None:
        """Say once what was changed."""
        prefix = f"{source}: " if source else ""
        if self.halves:
            logger.warning(
                "%s%d texts hold half a character (a lone surrogate); it is replaced by U+FFFD", prefix, self.halves
            )
        if self.nans:
            logger.warning("%s%d values are NaN; they are read as null (nobody labelled it)", prefix, self.nans)


def _are_plain(values: Iterable[Any]) -> bool:
    """Whether nothing has to change: most rows, which a copy would make a third slower to read."""
    for value in values:
        kind = type(value)
        if kind is str:
            if not value.isascii() and not _is_utf8(value):
                return False
        elif kind is list:
            if not _are_plain(value):
                return False
        elif kind is dict:
            if not (_are_plain(value) and _are_plain(value.values())):
                return False
        elif kind is float:
            if value != value:
                return False
        elif kind is int:
            if value not in INT64:
                return False
        elif value is not None and kind is not bool:
            return False
    return True


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _as_float(number: int) -> float:
    try:
        return float(number)
    except OverflowError:
        return float("inf") if number > 0 else float("-inf")
