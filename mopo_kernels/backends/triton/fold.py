# mypy: allow-untyped-defs
"""The fold contract (fold.py) in Triton: programs that read their part of a row of logits once, block after block.

    statistics   max ← max(max, block), sum rescaled to it; where a row has several programs, a second kernel combines
                 their results in the order of the columns
    gradient     coefficient · (onehot − exp(z − lse)) · dz/dlogit, elementwise
    peaks        a program per cell

Rows may begin anywhere: blocks are counted from the last multiple of ALIGN elements before a row, so that all of them
but the first and the last are read and written without a mask, in whole vectors.
"""

from __future__ import annotations

import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor

from mopo_kernels.backends.configuration import Configuration, recorded
from mopo_kernels.backends.fold import Statistics, Transform

ALIGN = 16  # elements: 16 bytes or more of any dtype
BLOCK_BYTES = 8192  # of a block as arithmetic sees it, float32 or float64: 32 for each of 256 threads; 64 spill
ENOUGH_PROGRAMS = 4096  # for the largest GPU to be busy to the end of its last wave
PARTS_BLOCK = 128  # partial results combined at a time
PEAKS_ROWS, PEAKS_COLUMNS = 8, 128
OPTIONS = {"num_warps": 8, "num_stages": 1}


# ---------------------------------------------------------------------------------------------------------- transform


@triton.jit
def tanh(x):
    """Within 3 ulp of either precision (Cephes: a rational function near 0, else by the exponential)."""
    square = x * x
    numerator = (-9.64399179425052238628e-1 * square - 9.92877231001918586564e1) * square - 1.61468768441708447952e3
    denominator = ((square + 1.12811678491632931402e2) * square + 2.23548839060100448583e3) * square
    near = x + x * square * (numerator / (denominator + 4.84406305325125486048e3))
    far = 1 - 2 / (tl.exp(2 * tl.abs(x)) + 1)
    return tl.where(tl.abs(x) < 0.625, near, tl.where(x < 0, -far, far))


@triton.jit
def scaled(logits, bias, columns, inside, inner):
    """inner · (logit + bias): z, or the argument of tanh where there is a softcap."""
    if bias is not None:
        logits += tl.load(bias + columns, mask=inside, other=0)
    return logits * inner


@triton.jit
def transformed(logits, bias, columns, inside, inner, outer, SOFTCAP: tl.constexpr):
    """z, and −∞ outside."""
    z = scaled(logits, bias, columns, inside, inner)
    if SOFTCAP:
        z = outer * tanh(z)
    return tl.where(inside, z, float("-inf"))


@triton.jit
def below(z, lse, WORK: tl.constexpr):
    """z − lse with lse in two parts: the difference to the high one is exact where z is near lse."""
    high = lse.to(WORK)
    return z - high - (lse - high).to(WORK)


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
def combined(max, sum, block_max, block_sum):
    """The largest of all maxima, and the sums that belong to them relative to it."""
    largest = tl.maximum(max, tl.max(block_max, 0))
    shift = tl.where(largest == float("-inf"), 0, largest)  # any finite shift makes exp(−∞ − shift) 0
    block_total = tl.sum(block_sum * tl.exp(block_max - shift), 0)
    return largest, sum * tl.exp(max - shift) + block_total


@triton.jit
def statistics_kernel(
    logits,  # [R, C]
    target,  # [R]
    max,  # [R]
    sum,  # [R]
    target_z,  # [R]
    part_max,  # [R, parts]; with one part, max and sum themselves
    part_sum,
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
):
    row, part, shift, first, last = part_of_row(row_stride, columns, parts, blocks, ALIGN, BLOCK_V)
    row_target = tl.load(target + row)
    if row_target < 0:
        return
    inner, outer = tl.full([], inner, WORK), tl.full([], outer, WORK)
    aligned_row = logits + row * row_stride // ALIGN * ALIGN

    # What was folded before goes into the first part.
    running_max = tl.load(max + row, mask=part == 0, other=float("-inf")).to(WORK)
    running_sum = tl.load(sum + row, mask=part == 0, other=0)
    for place in range(first, last, BLOCK_V):
        block, block_columns, inside = load_block(aligned_row, place, shift, columns, WORK, BLOCK_V)
        z = transformed(block, bias, block_columns, inside, inner, outer, SOFTCAP)
        running_max, running_sum = combined(running_max, running_sum, z, 1)
    tl.store(part_max + row * parts + part, running_max.to(tl.float64))
    tl.store(part_sum + row * parts + part, running_sum)

    column = row_target - first_column
    if (part == 0) & (column >= 0) & (column < columns):
        logit = tl.load(aligned_row + shift + column).to(WORK)
        z = transformed(logit, bias, column, True, inner, outer, SOFTCAP)
        tl.store(target_z + row, z.to(tl.float64))


@triton.jit
def combine_kernel(
    target,  # [R]
    max,  # [R]
    sum,  # [R]
    part_max,  # [R, parts]
    part_sum,
    parts: tl.int64,
    WORK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if tl.load(target + row) < 0:
        return
    running_max, running_sum = tl.full([], float("-inf"), WORK), tl.full([], 0, tl.float64)
    for first in range(0, parts, BLOCK):
        part = first + tl.arange(0, BLOCK)
        block_max = tl.load(part_max + row * parts + part, mask=part < parts, other=float("-inf")).to(WORK)
        block_sum = tl.load(part_sum + row * parts + part, mask=part < parts, other=0)
        running_max, running_sum = combined(running_max, running_sum, block_max, block_sum)
    tl.store(max + row, running_max.to(tl.float64))
    tl.store(sum + row, running_sum)


def fold_statistics(
    tile: Tensor,
    target: Tensor,
    statistics: Statistics,
    transform: Transform,
    *,
    first_column: int = 0,
    bias: Tensor | None = None,
) -> None:
    rows, columns = tile.shape
    if tile.numel() == 0:
        return
    block_v, parts, blocks = _parts(tile)
    in_parts = statistics.max.new_empty(2, rows, parts) if parts > 1 else (statistics.max, statistics.sum)
    work = _work(tile)
    with torch.cuda.device_of(tile):
        statistics_kernel[(rows * parts,)](
            *(tile, target, *statistics, *in_parts, bias),
            *(tile.stride(0), columns, first_column, parts, blocks, transform.inner, transform.outer),
            SOFTCAP=transform.softcap,
            WORK=work,
            ALIGN=ALIGN,
            BLOCK_V=block_v,
            **OPTIONS,
        )
        if parts > 1:
            combine_kernel[(rows,)](
                *(target, statistics.max, statistics.sum, *in_parts, parts), WORK=work, BLOCK=PARTS_BLOCK, num_warps=1
            )


# ----------------------------------------------------------------------------------------------------------- gradient


@triton.jit
def gradient_kernel(
    logits,  # [R, C]
    target,  # [R]
    lse,  # [R]
    coefficient,  # [R]
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
    slope = row_coefficient.to(WORK) * inner
    if SOFTCAP:
        slope *= outer
    aligned_row = logits + row * row_stride // ALIGN * ALIGN
    aligned_out = out + (row * out_row_stride - shift) // ALIGN * ALIGN
    for place in range(first, last, BLOCK_V):
        gradient = tl.zeros([BLOCK_V], WORK)
        if row_coefficient != 0:
            block, block_columns, inside = load_block(aligned_row, place, shift, columns, WORK, BLOCK_V)
            z = scaled(block, bias, block_columns, inside, inner)
            if SOFTCAP:
                capped = tanh(z)
                z = outer * capped
                gradient = slope * (1 - capped * capped)
            else:
                gradient += slope
            gradient *= tl.where(block_columns == target_column, 1, 0) - tl.exp(below(z, row_lse, WORK))
        store_block(aligned_out, gradient, place, shift, columns, BLOCK_V)


def fold_gradient(
    tile: Tensor,
    target: Tensor,
    lse: Tensor,
    coefficient: Tensor,
    transform: Transform,
    *,
    first_column: int = 0,
    bias: Tensor | None = None,
    out: Tensor | None = None,
) -> None:
    out = tile if out is None else out
    if tile.numel() == 0:
        return
    rows, columns = tile.shape
    block_v, parts, blocks = _parts(tile)
    alike = (tile.stride(0) - out.stride(0)) % ALIGN == 0
    with torch.cuda.device_of(tile):
        gradient_kernel[(rows * parts,)](
            *(tile, target, lse, coefficient, out, bias, tile.stride(0), out.stride(0), columns, first_column),
            *(parts, blocks, transform.inner, transform.outer),
            SOFTCAP=transform.softcap,
            WORK=_work(tile),
            ALIGN=ALIGN if alike else 1,
            BLOCK_V=block_v,
            **OPTIONS,
        )


# -------------------------------------------------------------------------------------------------------------- peaks


@triton.jit
def peaks_kernel(
    logits,  # [R, C]
    lse,  # [R]
    peaks,  # [row cells, column cells]
    bias,  # [C] or None
    row_stride: tl.int64,
    rows: tl.int64,
    columns: tl.int64,
    size: tl.int64,
    inner: tl.float64,
    outer: tl.float64,
    SOFTCAP: tl.constexpr,
    WORK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    cell, column_cells = tl.program_id(0).to(tl.int64), tl.cdiv(columns, size)
    first_row, first_column = cell // column_cells * size, cell % column_cells * size
    last_row, last_column = tl.minimum(first_row + size, rows), tl.minimum(first_column + size, columns)
    inner, outer = tl.full([], inner, WORK), tl.full([], outer, WORK)
    largest = tl.full([BLOCK_N, BLOCK_V], float("-inf"), WORK)
    for block_row in range(first_row, last_row, BLOCK_N):
        row = block_row + tl.arange(0, BLOCK_N).to(tl.int64)[:, None]
        row_lse = tl.load(lse + row, mask=row < last_row, other=0)
        for block_column in range(first_column, last_column, BLOCK_V):
            column = block_column + tl.arange(0, BLOCK_V)[None, :]
            inside = (row < last_row) & (column < last_column)
            block = tl.load(logits + row * row_stride + column, mask=inside, other=0).to(WORK)
            z = transformed(block, bias, column, inside, inner, outer, SOFTCAP)
            largest = tl.maximum(largest, below(z, row_lse, WORK))
    peak = tl.max(tl.max(largest, 1), 0)
    tl.store(peaks + cell, tl.exp(peak.to(tl.float64)))


def fold_peaks(tile: Tensor, lse: Tensor, transform: Transform, *, block: int, bias: Tensor | None = None) -> Tensor:
    rows, columns = tile.shape
    peaks = lse.new_empty(triton.cdiv(rows, block), triton.cdiv(columns, block))
    if peaks.numel() == 0:
        return peaks
    with torch.cuda.device_of(tile):
        peaks_kernel[(peaks.numel(),)](
            *(tile, lse, peaks, bias, tile.stride(0), rows, columns, block, transform.inner, transform.outer),
            SOFTCAP=transform.softcap,
            WORK=_work(tile),
            BLOCK_N=PEAKS_ROWS,
            BLOCK_V=PEAKS_COLUMNS,
            **OPTIONS,
        )
    return peaks


# ---------------------------------------------------------------------------------------------------------- launching


def _work(tile: Tensor) -> tl.dtype:
    """What arithmetic runs in."""
    return tl.float64 if tile.dtype == torch.float64 else tl.float32


def _parts(tile: Tensor) -> tuple[int, int, int]:
    """Columns of a block, programs per row, blocks of each.

    Few long rows get enough programs to fill the GPU. Shapes alone decide, so that sums run in the same order anywhere.
    """
    rows, columns = tile.shape
    block_v = BLOCK_BYTES // max(4, tile.element_size())
    in_row = triton.cdiv(columns + ALIGN - 1, block_v)
    blocks = triton.cdiv(in_row, min(in_row, triton.cdiv(ENOUGH_PROGRAMS, rows)))
    return block_v, triton.cdiv(in_row, blocks), blocks


def configurations() -> list[Configuration]:
    """Those of all dtypes and options, of vocabularies that are whole vectors and not, of few rows and many."""
    dtypes = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    with recorded() as found, torch.device("meta"):
        for dtype, softcap, with_bias in itertools.product(dtypes, (False, True), (False, True)):
            transform = Transform(1.0, 1.0, softcap)
            for rows, columns in ((8192, 151936), (4, 50257)):
                tile, target = torch.empty(rows, columns, dtype=dtype), torch.empty(rows, dtype=torch.int64)
                per_row = torch.empty(rows, dtype=torch.float64)
                bias = torch.empty(columns, dtype=torch.promote_types(dtype, torch.float32)) if with_bias else None
                fold_statistics(tile, target, Statistics(per_row, per_row, per_row), transform, bias=bias)
                for out in (None, torch.empty(rows, columns + 1, dtype=dtype)[:, :-1]):
                    fold_gradient(tile, target, per_row, per_row, transform, bias=bias, out=out)
                fold_peaks(tile, per_row, transform, block=128, bias=bias)
    return found
