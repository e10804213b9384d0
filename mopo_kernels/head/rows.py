"""Rows of hidden states: which of them count, and the blocks in which an engine takes them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Rows = torch.Tensor | slice  # where a block's rows stand in hidden: int64, or a slice, which is never copied


def rows_that_count(target: Tensor, ignore_index: int) -> Rows:
    rows = (target != ignore_index).nonzero().squeeze(-1)
    return slice(0, len(target)) if len(rows) == len(target) else rows


def count(rows: Rows) -> int:
    return rows.stop - rows.start if isinstance(rows, slice) else len(rows)


def split(rows: Rows, size: int) -> Sequence[Rows]:
    """Blocks of at most `size` rows."""
    if isinstance(rows, Tensor):
        return rows.split(size) if len(rows) > 0 else ()
    return [slice(first, min(first + size, rows.stop)) for first in range(rows.start, rows.stop, size)]


def whole_groups(rows: Tensor, slot: Tensor, row_block: int) -> Sequence[Tensor]:
    """Deal rows, whose groups are `slot`, to blocks of whole groups: at most `row_block` rows, or one group."""
    order = slot.argsort(stable=True)
    sizes, total = [], 0
    for size in slot.bincount().tolist():
        if total and total + size > row_block:
            sizes.append(total)
            total = 0
        total += size
    return rows[order].split([*sizes, total]) if len(rows) else ()


def take(hidden: Tensor, rows: Rows, dtype: torch.dtype) -> Tensor:  # [R, H]
    """Rows of hidden in the dtype that products run in."""
    chosen = hidden[rows] if isinstance(rows, slice) else hidden.index_select(0, rows)
    return chosen.to(dtype)


def put(total: Tensor, rows: Rows, gradient: Tensor) -> None:
    """Write the gradient of a block of rows to its place in that of all rows, unless it was formed there."""
    if isinstance(rows, Tensor):
        total.index_copy_(0, rows, gradient.to(total.dtype))
    elif not total[rows].is_set_to(gradient):
        total[rows] = gradient
