# mypy: allow-untyped-defs
"""Sampling of the fold contract (backends/fold.py) in Triton, and the products of what was sampled.

    fold_sample   t = p / floor, in whole numbers of GRID, where p = exp(z − lse) < floor, else 0
                  q = p where p ≥ floor, else floor where the running sum of t passes a whole number, else 0
                  entries of q · dz/dlogit where q > 0, and at the target
    sample_hidden, sample_weight   sums of rows of weight and of hidden, as the entries list them (backends/lists.py)

A program reads a row of logits once, block after block. Running sums are integers, so that no rounding can lose a step
between two lanes. A block without an entry, as most are, is reduced to its sum; others are scanned.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from mopo_kernels.backends.fold import GRID, Samples, Tile
from mopo_kernels.backends.lists import Lists, lists_of_columns, lists_of_rows
from mopo_kernels.backends.triton.fold import ALIGN, load_block
from mopo_kernels.backends.triton.transform import probability, transformed

ONE_BITS = tl.constexpr(1 - math.frexp(GRID)[1])
ONE = tl.constexpr(1 / GRID)  # of a running sum in units of GRID
SAMPLE_BLOCK_BYTES = 4096  # of a block as arithmetic sees it: 16 for each of 256 threads; with 32 the scan spills
SUM_BLOCK_H = 1024  # columns of a sum that a program has: 8 of each of 128 threads
SUM_BLOCK_E = 4  # entries whose rows are read at a time


# ------------------------------------------------------------------------------------------------------------- sample


@triton.jit
def nearest(x):
    """The integer next to x ≥ 0, ties to even: beyond `whole` every float is one, and below, adding it rounds."""
    whole: tl.constexpr = 2.0**52 if x.dtype == tl.float64 else 2.0**23
    return tl.where(x < whole, (x + whole) - whole, x).to(tl.int64)


@triton.jit
def sample_kernel(
    logits,  # [R, C]
    target,  # [R]
    lse,  # [R]
    running,  # [R]
    entry_column,  # [R, capacity]
    entry_value,  # [R, capacity]
    counts,  # [R]
    bias,  # [C] or None
    row_stride: tl.int64,
    columns: tl.int64,
    first_column: tl.int64,
    capacity: tl.int64,
    inner: tl.float64,
    outer: tl.float64,
    floor: tl.float64,
    SOFTCAP: tl.constexpr,
    WORK: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    target_column = tl.load(target + row) - first_column
    if target_column + first_column < 0:
        return
    row_lse, count = tl.load(lse + row), tl.load(counts + row).to(tl.int64)
    here = (tl.load(running + row) * ONE).to(tl.int64)
    inner, outer = tl.full([], inner, WORK), tl.full([], outer, WORK)
    floor = tl.full([], floor, WORK)
    inverse = 1 / floor
    shift = row * row_stride % ALIGN
    aligned_row = logits + row * row_stride // ALIGN * ALIGN
    for place in range(0, shift + columns, BLOCK_V):
        block, column, inside = load_block(aligned_row, place, shift, columns, WORK, BLOCK_V)
        z, bend = transformed(block, bias, column, inside, inner, outer, SOFTCAP, False)
        p = probability(z, row_lse, WORK)
        is_entry = (p >= floor) | (inside & (column == target_column))
        units = nearest(tl.where(p < floor, p * inverse, 0) * ONE)
        there = here + tl.sum(units, 0)
        if ((there >> ONE_BITS) != (here >> ONE_BITS)) | (tl.max(is_entry.to(tl.int32), 0) > 0):
            upto = here + tl.cumsum(units, 0)
            is_step = (upto >> ONE_BITS) != ((upto - units) >> ONE_BITS)
            q = tl.where(p >= floor, p, tl.where(is_step, floor, 0))
            is_entry |= is_step
            position = count + tl.cumsum(is_entry.to(tl.int32), 0) - 1
            has_room = is_entry & (position < capacity)
            tl.store(entry_column + row * capacity + position, (first_column + column).to(tl.int32), mask=has_room)
            tl.store(entry_value + row * capacity + position, q * bend * (inner * outer), mask=has_room)
            count += tl.sum(is_entry.to(tl.int32), 0)
        here = there
    tl.store(running + row, here.to(tl.float64) / ONE)
    tl.store(counts + row, tl.minimum(count, capacity).to(tl.int32))


def fold_sample(tile: Tile, lse: Tensor, running: Tensor, floor: float, samples: Samples) -> None:
    """One launch. Floor: R·C elements read, an exponential each."""
    if tile.logits.numel() == 0:
        return
    with torch.cuda.device_of(tile.logits):
        sample_kernel[(len(tile.logits),)](
            logits=tile.logits,
            target=tile.target,
            lse=lse,
            running=running,
            entry_column=samples.columns,
            entry_value=samples.values,
            counts=samples.counts,
            bias=tile.bias,
            row_stride=tile.logits.stride(0),
            columns=tile.logits.shape[1],
            first_column=tile.first_column,
            capacity=samples.columns.shape[1],
            inner=tile.transform.inner,
            outer=tile.transform.outer,
            floor=floor,
            SOFTCAP=tile.transform.softcap,
            WORK=tl.float64 if tile.logits.dtype == torch.float64 else tl.float32,
            ALIGN=ALIGN,
            BLOCK_V=SAMPLE_BLOCK_BYTES // max(4, tile.logits.element_size()),
            num_warps=8,
            num_stages=1,
        )


# ---------------------------------------------------------------------------------------------------------------- sums


@triton.jit
def sum_rows_kernel(
    source,  # [S, H]
    out,  # [I, H]
    start,  # [I]
    stop,  # [I]
    source_row,  # [E]
    value,  # [E]
    source_stride: tl.int64,
    out_stride: tl.int64,
    hidden_size: tl.int64,
    blocks: tl.int64,
    WORK: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    row, block = program // blocks, program % blocks
    entry, last = tl.load(start + row), tl.load(stop + row)
    column = block * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = column < hidden_size
    total = tl.zeros([BLOCK_E, BLOCK_H], WORK)
    while entry < last:
        place = entry + tl.arange(0, BLOCK_E)
        rows = tl.load(source_row + place, mask=place < last, other=0).to(tl.int64)
        weights = tl.load(value + place, mask=place < last, other=0).to(WORK)
        mask = (place < last)[:, None] & inside[None, :]
        x = tl.load(source + rows[:, None] * source_stride + column[None, :], mask=mask, other=0).to(WORK)
        total += weights[:, None] * x
        entry += BLOCK_E
    tl.store(out + row * out_stride + column, tl.sum(total, 0).to(out.dtype.element_ty), mask=inside)


def sample_hidden(samples: Samples, weight: Tensor, out: Tensor) -> None:
    """One launch. Floor: a row of the weight read for each entry, `out` written."""
    sum_rows(lists_of_rows(samples), weight, out)


def sample_weight(samples: Samples, hidden: Tensor, out: Tensor) -> None:
    """A sort and one launch. Floor: a row of hidden read for each entry, `out` written."""
    sum_rows(lists_of_columns(samples, len(out)), hidden, out)


def sum_rows(lists: Lists, source: Tensor, out: Tensor) -> None:
    rows, hidden_size = out.shape
    if out.numel() == 0:
        return
    block_h = min(SUM_BLOCK_H, triton.next_power_of_2(hidden_size))
    blocks = triton.cdiv(hidden_size, block_h)
    with torch.cuda.device_of(out):
        sum_rows_kernel[(rows * blocks,)](
            **lists._asdict(),
            source=source,
            out=out,
            source_stride=source.stride(0),
            out_stride=out.stride(0),
            hidden_size=hidden_size,
            blocks=blocks,
            WORK=tl.float64 if lists.value.dtype == torch.float64 else tl.float32,
            BLOCK_E=SUM_BLOCK_E,
            BLOCK_H=block_h,
            num_warps=4,
            num_stages=1,
        )
