# mypy: allow-untyped-defs
"""Forward cut kernel: statistics of hidden · weightᵀ, a tile of which lives on the chip only.

    z = transform(hidden · weightᵀ, bias);   maximum = max z,   total = Σ exp(z − maximum),   chosen = z at the target

A program takes a block of rows through one part of the vocabulary; the parts are combined afterwards, in their order.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from mopo_kernels.backends.fold import Statistics
from mopo_kernels.backends.triton.cut_logits import form_logits, row_pointers
from mopo_kernels.backends.triton.cut_tile import ENOUGH_PROGRAMS, Blocks, CutInputs, blocks_for, parts_of
from mopo_kernels.backends.triton.transform import rescaled, transformed


@triton.jit
def cut_statistics_kernel(
    hidden,  # [N, H]
    weight,  # [V, H]
    target,  # [N]
    part_maximum,  # [parts, N]
    part_total,  # [parts, N]
    part_chosen,  # [parts, N]
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

    maximum = tl.full([BLOCK_N], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float64)  # of thousands of blocks, whose roundings may all go one way
    chosen = maximum
    for block_v in range(part * part_blocks, tl.minimum((part + 1) * part_blocks, tl.cdiv(vocab, BLOCK_V))):
        column = block_v * BLOCK_V + tl.arange(0, BLOCK_V)
        weight_rows = row_pointers(weight, column, vocab, weight_row_stride)
        logits = form_logits(hidden_rows, weight_rows, hidden_size, BLOCK_N, BLOCK_V, BLOCK_H, PRECISION)
        z, _ = transformed(logits, bias, column, column < vocab, inner, outer, SOFTCAP, True)
        is_target = column[None, :] == row_target[:, None]
        chosen = tl.maximum(chosen, tl.max(tl.where(is_target, z, float("-inf")), 1))
        maximum, total, shift = rescaled(maximum, total, tl.max(z, 1))
        total += tl.sum(tl.exp(z - shift[:, None]), 1)

    place = part.to(tl.int64) * rows + row
    tl.store(part_maximum + place, maximum, mask=row < rows)
    tl.store(part_total + place, total, mask=row < rows)
    tl.store(part_chosen + place, chosen, mask=row < rows)


def cut_statistics(inputs: CutInputs, *, blocks: Blocks | None = None) -> Statistics:
    """Statistics of all rows; a target outside [0, V) gives −inf. Blocks replace the table's.

    Floor: 2·N·H·V flops; (N + V)·H elements read.
    """
    blocks = blocks or blocks_for("statistics", inputs.hidden)
    rows, vocab, _ = inputs.sizes
    row_blocks, column_blocks = blocks.along(rows, vocab)
    parts, part_blocks = parts_of(column_blocks, triton.cdiv(ENOUGH_PROGRAMS, max(row_blocks, 1)))
    of_parts = inputs.hidden.new_empty(3, parts, rows, dtype=torch.float64)
    if rows > 0:
        with torch.cuda.device_of(inputs.hidden):
            cut_statistics_kernel[(row_blocks * parts,)](
                **inputs.arguments(blocks),
                part_maximum=of_parts[0],
                part_total=of_parts[1],
                part_chosen=of_parts[2],
                parts=parts,
                part_blocks=part_blocks,
            )
    return _combined(*of_parts)


def _combined(part_maximum: Tensor, part_total: Tensor, part_chosen: Tensor) -> Statistics:  # [parts, N] each
    maximum = part_maximum.amax(0)
    shift = maximum.masked_fill(maximum == -math.inf, 0)
    return Statistics(maximum, (part_total * (part_maximum - shift).exp()).sum(0), part_chosen.amax(0))
