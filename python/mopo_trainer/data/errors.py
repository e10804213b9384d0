"""What is said of data that cannot be used, and of how many rows."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Literal, TypeAlias

logger = logging.getLogger(__name__)

OnBadRow: TypeAlias = Literal["error", "skip"]


class DataError(ValueError):
    """Data that cannot be used; one line that names the file, the row, the value and what to do about it.

    `reason` is what it is counted under where rows are skipped; by default the message up to its mend. `row` is the row
    that it is about, where the message does not name it yet.
    """

    def __init__(self, message: str, reason: str | None = None, row: int | None = None) -> None:
        super().__init__(message)
        self.reason = reason or message.partition(";")[0]
        self.row = row


def one_line(error: Exception, limit: int = 200) -> str:
    """What an error of another library says, without its line breaks."""
    text = " ".join(str(error).split())
    return text if len(text) <= limit else text[: limit - 3] + "..."


class BadRows:
    """Rows that cannot be used: refused together, by the first of them, or left out and counted by reason."""

    def __init__(self, on_bad_row: OnBadRow) -> None:
        if on_bad_row not in ("error", "skip"):
            raise DataError(f"on_bad_row={on_bad_row!r}: give 'error' (refuse them) or 'skip' (leave them out)")
        self.skip = on_bad_row == "skip"
        self.first = ""
        self.bad: Counter[str] = Counter()
        self.left_out: Counter[str] = Counter()

    def add(self, place: str, error: DataError) -> None:
        """One row that cannot be read."""
        self.first = self.first or f"{place}: {error}"
        self.bad[error.reason] += 1

    def leave_out(self, reason: str) -> None:
        """One row, or all of a prompt, that a public data set is known to have and nobody can use."""
        self.left_out[reason] += 1

    def report(self, kept: int, source: str | Literal[False] | None = None) -> None:
        """Raise if bad rows are refused or none is left; otherwise warn of those left out."""
        bad, reasons = self.bad.total(), self.bad + self.left_out
        total = kept + reasons.total()
        if bad and not self.skip:
            counted = f": {_listed(self.bad)}" if len(self.bad) > 1 else ""
            are = "row is bad" if total == 1 else "rows are bad"
            raise DataError(f"{self.first} ({bad} of {total} {are}{counted}; on_bad_row=skip leaves out such rows)")
        if reasons and not kept:
            first = f" (the first: {self.first})" if self.first else ""
            raise DataError(f"every row was left out: {_listed(reasons)}{first}")
        if reasons:
            prefix = f"{source}: " if source else ""
            logger.warning("%s%d of %d rows or prompts left out: %s", prefix, reasons.total(), total, _listed(reasons))


def _listed(reasons: Counter[str], most: int = 5) -> str:
    shown = [f"{count} {reason}" for reason, count in reasons.most_common(most)]
    others = reasons.total() - sum(count for _, count in reasons.most_common(most))
    return ", ".join([*shown, f"{others} for other reasons"] if others else shown)
