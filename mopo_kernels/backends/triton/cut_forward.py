# mypy: allow-untyped-defs
"""Forward cut kernel: statistics of hidden · weightᵀ, a tile of which lives on the chip only.

    z = transform(hidden · weightᵀ, bias);  max = max z,  sum = Σ exp(z − max),  target = z at the target column

A program takes a block of rows through one part of the vocabulary; the parts are combined afterwards, in their order.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from mopo_kernels.backends.cut_tile import (
    ENOUGH_PROGRAMS,
    GROUP,
    Blocks,
    blocks_for,
    dot_precision,
    form_logits,
    parts_of,
    row_pointers,
    tanh,
    with_contiguous_rows,
)
from mopo_kernels.backends.fold import Statistics, Transform
from mopo_kernels.backends.triton_fold import scaled


@triton.jit
def cut_statistics_kernel(
    hidden,  # [N, H]
    weight,  # [V, H]
    target,  # [N]
    part_max,  # [parts, N]
    part_sum,  # [parts, N]
    part_target,  # [parts, N]
    bias,  # [V] or None
    hidden_row_stride: tl.int64,
    weight_row_stride: tl.int64,
    rows: tl.int32,
    vocab: tl.int32,
    hidden_size: tl.int32,
    parts: tl.int32,
    part_blocks: tl.int32,  # of columns
    inner: tl.float32,
    outer: tl.float32,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    program = tl.program_id(0)
    block_n, part = tl.swizzle2d(program // parts, program % parts, tl.cdiv(rows, BLOCK_N), parts, GROUP)
    row = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    hidden_rows = row_pointers(hidden, row, rows, hidden_row_stride)
    row_target = tl.load(target + row, mask=row < rows, other=0).to(tl.int32)

    max = tl.full([BLOCK_N], float("-inf"), tl.float32)
    sum = tl.zeros([BLOCK_N], tl.float64)  # of thousands of blocks, whose roundings may all go one way
    target_z = max
    for block_v in range(part * part_blocks, tl.minimum((part + 1) * part_blocks, tl.cdiv(vocab, BLOCK_V))):
        column = block_v * BLOCK_V + tl.arange(0, BLOCK_V)
        weight_rows = row_pointers(weight, column, vocab, weight_row_stride)
        logits = form_logits(hidden_rows, weight_rows, hidden_size, BLOCK_N, BLOCK_V, BLOCK_H, PRECISION)
        z = scaled(logits, bias, column, column < vocab, inner)
        if SOFTCAP:
            z = outer * tanh(z)
        z = tl.where((column < vocab)[None, :], z, float("-inf"))
        target_z = tl.maximum(target_z, tl.max(tl.where(column[None, :] == row_target[:, None], z, float("-inf")), 1))
        largest = tl.maximum(max, tl.max(z, 1))
        shift = tl.where(largest == float("-inf"), 0, largest)  # any finite shift makes exp(−∞ − shift) 0
        sum = sum * tl.exp(max - shift) + tl.sum(tl.exp(z - shift[:, None]), 1)
        max = largest

    place = part.to(tl.int64) * rows + row
    tl.store(part_max + place, max, mask=row < rows)
    tl.store(part_sum + place, sum, mask=row < rows)
    tl.store(part_target + place, target_z, mask=row < rows)


def cut_statistics(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    target: Tensor,  # [N] int64
    transform: Transform,
    *,
    bias: Tensor | None = None,  # [V]
    blocks: Blocks | None = None,  # instead of the table's
) -> Statistics:
    """Statistics of all rows; a target outside [0, V) gives −inf."""
    blocks = blocks or blocks_for("statistics", hidden)
    hidden, weight = with_contiguous_rows(hidden), with_contiguous_rows(weight)
    (rows, hidden_size), vocab = hidden.shape, len(weight)
    row_blocks, column_blocks = triton.cdiv(rows, blocks.BLOCK_N), triton.cdiv(vocab, blocks.BLOCK_V)
    parts, part_blocks = parts_of(column_blocks, triton.cdiv(ENOUGH_PROGRAMS, max(row_blocks, 1)))
    of_parts = hidden.new_empty(3, parts, rows, dtype=torch.float64)
    if rows > 0:
        with torch.cuda.device_of(hidden):
            cut_statistics_kernel[(row_blocks * parts,)](
                *(hidden, weight, target, *of_parts, bias, hidden.stride(0), weight.stride(0)),
                *(rows, vocab, hidden_size, parts, part_blocks, transform.inner, transform.outer),
                SOFTCAP=transform.softcap,
                PRECISION=dot_precision(hidden.dtype),
                GROUP=GROUP,
                **blocks._asdict(),
            )
    return _combined(*of_parts)


def _combined(part_max: Tensor, part_sum: Tensor, part_target: Tensor) -> Statistics:  # [parts, N] each
    largest = part_max.amax(0)
    shift = largest.masked_fill(largest == -math.inf, 0)
    return Statistics(largest, (part_sum * (part_max - shift).exp()).sum(0), part_target.amax(0))
