# mypy: allow-untyped-defs
"""The fold contract (backends/fold.py) in Triton: programs read their part of a row of logits once, block after block.

    statistics   a thread keeps the maximum of its z and the sum of exp(z − maximum), a program combines its threads',
                 and where a row has several programs a second kernel combines theirs in the order of the columns
    gradient     (coefficient · (onehot − p) + lse_coefficient · p) · dz/dlogit with p = exp(z − lse), elementwise

Rows may begin anywhere: blocks are counted from the last multiple of ALIGN elements before a row, so that all of them
but the first and the last are read and written without a mask, in whole vectors.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mopo_kernels.backends.fold import Statistics, Tile
from mopo_kernels.backends.triton.transform import logit_gradient, probability, rescaled, transformed

ALIGN = 16  # elements: 16 bytes or more of any dtype
BLOCK_BYTES = 8192  # of a block as arithmetic sees it, float32 or float64: 32 for each of 256 threads; 64 spill
LANE_BYTES = 16  # what a thread reads at a time
WEIGHTED_REGISTERS = 64  # at most: without a bound the assembler takes 40 and spills one that 44 would hold
ENOUGH_PROGRAMS = 4096  # for the largest GPU to be busy to the end of its last wave
PARTS_BLOCK = 128  # partial results combined at a time


# ------------------------------------------------------------------------------------------------------------ blocks


@triton.jit
def part_of_row(row_stride, columns, parts, blocks, ALIGN: tl.constexpr, BLOCK_V: tl.constexpr):
    """This program's row and part, how far behind an aligned element the row begins, first and last place of the part.

    Places count from that aligned element.
    """
    program = tl.program_id(0).to(tl.int64)
    row, part = program // parts, program % parts
    shift = row * row_stride % ALIGN
    first = part * blocks * BLOCK_V
    return row, part, shift, first, tl.minimum(first + blocks * BLOCK_V, shift + columns)


@triton.jit
def load_block(aligned_row, first, shift, columns, WORK: tl.constexpr, BLOCK_V: tl.constexpr):
    """Logits of BLOCK_V places, their columns, and which are inside the row; 0 outside."""
    places = first + tl.arange(0, BLOCK_V)
    inside = (places >= shift) & (places < shift + columns)
    if (first >= shift) & (first + BLOCK_V <= shift + columns):
        logits = tl.load(aligned_row + places)
    else:
        logits = tl.load(aligned_row + places, mask=inside, other=0)
    return logits.to(WORK), places - shift, inside


@triton.jit
def store_block(aligned_row, x, first, shift, columns, BLOCK_V: tl.constexpr):
    places = first + tl.arange(0, BLOCK_V)
    if (first >= shift) & (first + BLOCK_V <= shift + columns):
        tl.store(aligned_row + places, x.to(aligned_row.dtype.element_ty))
    else:
        inside = (places >= shift) & (places < shift + columns)
        tl.store(aligned_row + places, x.to(aligned_row.dtype.element_ty), mask=inside)


# --------------------------------------------------------------------------------------------------------- statistics


@triton.jit
def finite(below):
    """exp(−1000) is 0, and so is its product with −1000."""
    return tl.maximum(below, -1000.0)


@triton.jit
def combined(maximum, total, weighted, block_maximum, block_total, block_weighted, WEIGHTED: tl.constexpr):
    """The largest of all maxima, and the totals and weighted sums that belong to them relative to it."""
    before, before_total = maximum, total
    maximum, total, shift = rescaled(before, before_total, tl.max(block_maximum, 0))
    if WEIGHTED:
        weighted = (weighted + before_total * finite(before - shift)) * tl.exp(before - shift)
        block_weighted += block_total * finite(block_maximum - shift)
        weighted += tl.sum(block_weighted * tl.exp(block_maximum - shift), 0)
    return maximum, total + tl.sum(block_total * tl.exp(block_maximum - shift), 0), weighted


@triton.jit
def statistics_kernel(
    logits,  # [R, C]
    target,  # [R]
    maximum,  # [R]
    total,  # [R]
    chosen,  # [R]
    weighted,  # [R] or None
    part_maximum,  # [R, parts]; with one part, maximum, total and weighted themselves
    part_total,
    part_weighted,
    bias,  # [C] or None
    row_stride: tl.int64,
    columns: tl.int64,
    first_column: tl.int64,
    parts: tl.int64,
    blocks: tl.int64,
    inner: tl.float64,
    outer: tl.float64,
    SOFTCAP: tl.constexpr,
    WORK: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_V: tl.constexpr,
    LANE: tl.constexpr,  # neighbouring elements that are folded together, by one thread
):
    row, part, shift, first, last = part_of_row(row_stride, columns, parts, blocks, ALIGN, BLOCK_V)
    row_target = tl.load(target + row)
    if row_target < 0:
        return
    inner, outer = tl.full([], inner, WORK), tl.full([], outer, WORK)
    aligned_row = logits + row * row_stride // ALIGN * ALIGN

    WEIGHTED: tl.constexpr = weighted is not None
    lane_maximum = tl.full([BLOCK_V // LANE], float("-inf"), WORK)
    lane_total = tl.zeros([BLOCK_V // LANE], tl.float64)
    if WEIGHTED:
        lane_weighted = lane_total
    for place in range(first, last, BLOCK_V):
        block, column, inside = load_block(aligned_row, place, shift, columns, WORK, BLOCK_V)
        z, _ = transformed(block, bias, column, inside, inner, outer, SOFTCAP, False)
        z = tl.reshape(z, [BLOCK_V // LANE, LANE])
        before, before_total = lane_maximum, lane_total
        lane_maximum, lane_total, lane_shift = rescaled(before, before_total, tl.max(z, 1))
        lane_total += tl.sum(tl.exp(z - lane_shift[:, None]), 1)
        if WEIGHTED:
            below, old_below = z - lane_shift[:, None], before - lane_shift
            lane_weighted = (lane_weighted + before_total * finite(old_below)) * tl.exp(old_below)
            lane_weighted += tl.sum(tl.exp(below) * finite(below), 1)
    # What was folded before goes into the first part.
    row_maximum = tl.load(maximum + row, mask=part == 0, other=float("-inf")).to(WORK)
    row_total = tl.load(total + row, mask=part == 0, other=0)
    row_weighted = tl.load(weighted + row, mask=part == 0, other=0) if WEIGHTED else 0
    row_maximum, row_total, row_weighted = combined(
        row_maximum, row_total, row_weighted, lane_maximum, lane_total, lane_weighted if WEIGHTED else 0, WEIGHTED
    )
    tl.store(part_maximum + row * parts + part, row_maximum.to(tl.float64))
    tl.store(part_total + row * parts + part, row_total)
    if WEIGHTED:
        tl.store(part_weighted + row * parts + part, row_weighted)

    target_column = row_target - first_column
    if (part == 0) & (target_column >= 0) & (target_column < columns):
        logit = tl.load(aligned_row + shift + target_column).to(WORK)
        z, _ = transformed(logit, bias, target_column, True, inner, outer, SOFTCAP, False)
        tl.store(chosen + row, z.to(tl.float64))


@triton.jit
def combine_kernel(
    target,  # [R]
    maximum,  # [R]
    total,  # [R]
    weighted,  # [R] or None
    part_maximum,  # [R, parts]
    part_total,
    part_weighted,
    parts: tl.int64,
    WORK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if tl.load(target + row) < 0:
        return
    WEIGHTED: tl.constexpr = weighted is not None
    row_maximum, row_total = tl.full([], float("-inf"), WORK), tl.full([], 0, tl.float64)
    row_weighted = row_total
    for first in range(0, parts, BLOCK):
        part = first + tl.arange(0, BLOCK)
        place = row * parts + part
        block_maximum = tl.load(part_maximum + place, mask=part < parts, other=float("-inf")).to(WORK)
        block_total = tl.load(part_total + place, mask=part < parts, other=0)
        block_weighted = tl.load(part_weighted + place, mask=part < parts, other=0) if WEIGHTED else 0
        row_maximum, row_total, row_weighted = combined(
            row_maximum, row_total, row_weighted, block_maximum, block_total, block_weighted, WEIGHTED
        )
    tl.store(maximum + row, row_maximum.to(tl.float64))
    tl.store(total + row, row_total)
    if WEIGHTED:
        tl.store(weighted + row, row_weighted)


def fold_statistics(tile: Tile, statistics: Statistics) -> None:
    """One launch, two for few long rows. Floor: R·C elements read, an exponential each."""
    if tile.logits.numel() == 0:
        return
    arguments, rows = _arguments(tile), len(tile.logits)
    parts = arguments["parts"]
    maximum, total, chosen, weighted = statistics
    part_maximum, part_total, part_weighted = maximum, total, weighted
    if parts > 1:
        part_maximum, part_total = maximum.new_empty(2, rows, parts)
        part_weighted = None if weighted is None else weighted.new_empty(rows, parts)
    with torch.cuda.device_of(tile.logits):
        statistics_kernel[(rows * parts,)](
            **arguments,
            maximum=maximum,
            total=total,
            chosen=chosen,
            weighted=weighted,
            part_maximum=part_maximum,
            part_total=part_total,
            part_weighted=part_weighted,
            ALIGN=ALIGN,
            LANE=LANE_BYTES // tile.logits.element_size(),
            maxnreg=WEIGHTED_REGISTERS if weighted is not None and arguments["WORK"] == tl.float32 else None,
        )
        if parts > 1:
            combine_kernel[(rows,)](
                target=tile.target,
                maximum=maximum,
                total=total,
                weighted=weighted,
                part_maximum=part_maximum,
                part_total=part_total,
                part_weighted=part_weighted,
                parts=parts,
                WORK=arguments["WORK"],
                BLOCK=PARTS_BLOCK,
                num_warps=1,
            )


# ----------------------------------------------------------------------------------------------------------- gradient


@triton.jit
def gradient_kernel(
    logits,  # [R, C]
    target,  # [R]
    lse,  # [R]
    coefficient,  # [R]
    lse_coefficient,  # [R] or None
    out,  # [R, C], or the logits
    bias,  # [C] or None
    row_stride: tl.int64,
    out_row_stride: tl.int64,
    columns: tl.int64,
    first_column: tl.int64,
    parts: tl.int64,
    blocks: tl.int64,
    inner: tl.float64,
    outer: tl.float64,
    SOFTCAP: tl.constexpr,
    WORK: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row, _, shift, first, last = part_of_row(row_stride, columns, parts, blocks, ALIGN, BLOCK_V)
    row_lse, row_coefficient = tl.load(lse + row), tl.load(coefficient + row)
    target_column = tl.load(target + row) - first_column
    inner, outer = tl.full([], inner, WORK), tl.full([], outer, WORK)
    slope, counts = row_coefficient.to(WORK) * inner * outer, row_coefficient != 0
    if lse_coefficient is not None:
        row_lse_coefficient = tl.load(lse_coefficient + row)
        lse_slope, counts = row_lse_coefficient.to(WORK) * inner * outer, counts | (row_lse_coefficient != 0)
    aligned_row = logits + row * row_stride // ALIGN * ALIGN
    aligned_out = out + (row * out_row_stride - shift) // ALIGN * ALIGN
    for place in range(first, last, BLOCK_V):
        gradient = tl.zeros([BLOCK_V], WORK)
        if counts:
            block, column, inside = load_block(aligned_row, place, shift, columns, WORK, BLOCK_V)
            z, bend = transformed(block, bias, column, inside, inner, outer, SOFTCAP, False)
            gradient = logit_gradient(z, column == target_column, row_lse, slope * bend, WORK)
            if lse_coefficient is not None:
                gradient += lse_slope * bend * probability(z, row_lse, WORK)
        store_block(aligned_out, gradient, place, shift, columns, BLOCK_V)


def fold_gradient(
    tile: Tile, lse: Tensor, coefficient: Tensor, out: Tensor, lse_coefficient: Tensor | None = None
) -> None:
    """One launch. Floor: R·C elements read and written, an exponential each."""
    if tile.logits.numel() == 0:
        return
    arguments, alike = _arguments(tile), (tile.logits.stride(0) - out.stride(0)) % ALIGN == 0
    with torch.cuda.device_of(tile.logits):
        gradient_kernel[(len(tile.logits) * arguments["parts"],)](
            **arguments,
            lse=lse,
            coefficient=coefficient,
            lse_coefficient=lse_coefficient,
            out=out,
            out_row_stride=out.stride(0),
            ALIGN=ALIGN if alike else 1,
        )


# ---------------------------------------------------------------------------------------------------------- launching


def _arguments(tile: Tile) -> dict[str, Any]:
    """What both kernels take."""
    block_v, parts, blocks = _parts(tile.logits)
    return {
        "logits": tile.logits,
        "target": tile.target,
        "bias": tile.bias,
        "row_stride": tile.logits.stride(0),
        "columns": tile.logits.shape[1],
        "first_column": tile.first_column,
        "parts": parts,
        "blocks": blocks,
        "inner": tile.transform.inner,
        "outer": tile.transform.outer,
        "SOFTCAP": tile.transform.softcap,
        "WORK": tl.float64 if tile.logits.dtype == torch.float64 else tl.float32,
        "BLOCK_V": block_v,
        "num_warps": 8,
        "num_stages": 1,
    }


def _parts(logits: Tensor) -> tuple[int, int, int]:
    """Columns of a block, programs per row, blocks of each.

    Few long rows get enough programs to fill the GPU. Shapes alone decide, so that sums run in the same order anywhere.
    """
    rows, columns = logits.shape
    block_v = BLOCK_BYTES // max(4, logits.element_size())
    in_row = triton.cdiv(columns + ALIGN - 1, block_v)
    blocks = triton.cdiv(in_row, min(in_row, triton.cdiv(ENOUGH_PROGRAMS, rows)))
    return block_v, triton.cdiv(in_row, blocks), blocks
