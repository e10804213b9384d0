"""Thresholds as users write them: `objective=win rate`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence


def parse_thresholds(thresholds: Mapping[str, float] | Sequence[str] | None) -> dict[str, float]:
    """{objective: win rate} from a mapping or from "name=value" strings.

    Raises:
        ValueError: an entry without "=", a value that is no win rate, or a name given twice.
    """
    pairs = thresholds.items() if isinstance(thresholds, Mapping) else map(_split, thresholds or [])
    parsed: dict[str, float] = {}
    for name, value in pairs:
        if name in parsed:
            raise ValueError(f"thresholds name {name!r} twice; give each objective one threshold")
        parsed[name] = _win_rate(name, value)
    return parsed


def _split(entry: str) -> tuple[str, str]:
    name, equals, value = entry.rpartition("=")
    if not name or not equals:
        raise ValueError(f"threshold {entry!r} is not of the form objective=value, for example brevity=0.6")
    return name, value


def _win_rate(name: str, value: float | str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 <= number <= 1:
        raise ValueError(f"threshold {name}={value} is not a win rate; give a number in [0, 1]")
    return number
