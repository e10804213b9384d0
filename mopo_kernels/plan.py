"""The planner: which blocks of rows and columns the tile engine works on, and how often it forms the logits.

A pure function of sizes, dtypes and the workspace. Costs are in units of N·H·V flops: the logits take 2, the gradient
of hidden 2 and that of weight 2.

    fused      6   the coefficient of a row is known once its logits are: gradients are formed while they are there
    kept       6   all logits fit the workspace and wait in it for the backward
    recompute  8   the backward forms the logits again
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

CPU_WORKSPACE = 64 * 2**20
ALIGN = 128  # columns of a block that grad_filter may skip; column blocks are whole numbers of it
ROW_ALIGN = 16  # rows that the products take at a time
STREAM_ROWS = 1024  # rows of a tile that holds only some columns: enough to make reading the weight cheap
# Below this many rows the products, bound by reading the weight, lose more than forming the logits twice costs (8/6).
MIN_RESIDENT_ROWS = 48

Logits = Literal["fused", "kept", "recompute"]


@dataclass(frozen=True)
class Plan:
    """Blocks of one call, and why."""

    row_block: int
    column_block: int  # columns of one product; all of them where no panel is converted
    resident: bool  # the tile holds all columns of its rows, so statistics and gradient read the same logits
    compute: torch.dtype  # dtype of tile and products; panels of weight are converted where it differs
    workspace: int  # bytes of the temporaries
    reason: str

    def tile_columns(self, vocab: int) -> int:
        return vocab if self.resident else self.column_block


def compute_dtype(dtype: torch.dtype, *, multiplies_bfloat16: bool) -> torch.dtype:
    """What the products run in: 16-bit inputs are widened unless the CPU multiplies them (float16 it never does)."""
    if dtype == torch.bfloat16 and multiplies_bfloat16:
        return dtype
    return torch.float64 if dtype == torch.float64 else torch.float32


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """What gradients are summed in: sums in 16 bits bias training."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def plan(
    rows: int,
    hidden_size: int,
    vocab: int,
    *,
    dtype: torch.dtype,
    compute: torch.dtype,
    workspace_bytes: int,
    logits: Logits,
) -> Plan:
    """Blocks whose temporaries stay within `workspace_bytes`, as far as blocks of one row and ALIGN columns can."""
    rows = max(rows, 1)
    size = _Bytes.of(hidden_size, dtype, compute)
    column_block = vocab if size.per_column == 0 else _aligned(workspace_bytes // 4 // size.per_column, vocab)
    per_row = size.per_row + vocab * size.logit
    capacity = (workspace_bytes - column_block * size.per_column) // per_row
    if logits == "kept":
        return _kept(rows, vocab, size, compute, workspace_bytes)
    if logits == "fused" and capacity >= min(rows, MIN_RESIDENT_ROWS):
        row_block = _balanced(rows, capacity)
        used = row_block * per_row + column_block * size.per_column
        reason = f"one pass, 6·N·H·V: {row_block} rows × all {vocab} columns fit the workspace"
        return Plan(row_block, column_block, True, compute, used, reason)
    return _streamed(rows, vocab, size, compute, workspace_bytes)


def fits_kept(
    rows: int, hidden_size: int, vocab: int, *, dtype: torch.dtype, compute: torch.dtype, workspace_bytes: int
) -> bool:
    """Whether the logits of all rows fit the workspace beside what the backward needs to use them."""
    size = _Bytes.of(hidden_size, dtype, compute)
    return _kept(rows, vocab, size, compute, workspace_bytes).workspace <= workspace_bytes


@dataclass(frozen=True)
class _Bytes:
    """What a row, a column and a logit cost in temporaries."""

    per_row: int  # gathered hidden, its gradient's sum, statistics
    per_column: int  # converted panel of weight, product waiting to be summed
    logit: int

    @classmethod
    def of(cls, hidden_size: int, dtype: torch.dtype, compute: torch.dtype) -> _Bytes:
        accumulate = accumulate_dtype(dtype)
        panel = 0 if compute == dtype else compute.itemsize
        product = 0 if dtype == accumulate else accumulate.itemsize
        return cls(
            per_row=hidden_size * (compute.itemsize + accumulate.itemsize) + 8 * 8,
            per_column=hidden_size * (panel + product),
            logit=compute.itemsize,
        )


def _kept(rows: int, vocab: int, size: _Bytes, compute: torch.dtype, workspace_bytes: int) -> Plan:
    rows = max(rows, 1)
    column_block = _aligned(workspace_bytes // 8 // (rows * size.logit + size.per_column), vocab)
    used = rows * (size.per_row + vocab * size.logit) + column_block * (rows * size.logit + size.per_column)
    reason = f"logits kept for the backward, 6·N·H·V: {rows} × {vocab} fit the workspace"
    return Plan(rows, column_block, True, compute, used, reason)


def _streamed(rows: int, vocab: int, size: _Bytes, compute: torch.dtype, workspace_bytes: int) -> Plan:
    row_block = _balanced(rows, STREAM_ROWS)
    while row_block > 1 and _stream_columns(row_block, size, workspace_bytes) < min(vocab, 2 * row_block):
        row_block = (row_block + 1) // 2
    column_block = _aligned(_stream_columns(row_block, size, workspace_bytes), vocab)
    used = row_block * size.per_row + column_block * (row_block * size.logit + size.per_column)
    reason = f"logits formed in each pass, 8·N·H·V: {row_block} rows × {column_block} columns at a time"
    return Plan(row_block, column_block, False, compute, used, reason)


def _stream_columns(row_block: int, size: _Bytes, workspace_bytes: int) -> int:
    return (workspace_bytes - row_block * size.per_row) // (row_block * size.logit + size.per_column)


def _aligned(columns: int, vocab: int) -> int:
    return min(vocab, max(ALIGN, columns // ALIGN * ALIGN))


def _balanced(rows: int, capacity: int) -> int:
    """Rows of a block when `rows` are dealt evenly to as few blocks as `capacity` allows."""
    even = -(-rows // -(-rows // capacity))
    return min(capacity, -(-even // ROW_ALIGN) * ROW_ALIGN, rows)
