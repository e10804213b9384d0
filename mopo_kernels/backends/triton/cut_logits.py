# mypy: allow-untyped-defs
"""A tile of logits, formed on the chip by the cut kernels."""

from __future__ import annotations

import triton
import triton.language as tl

# The interpreter's dot takes bfloat16 for integers.
INTERPRETED: tl.constexpr = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def row_pointers(x, row, rows, row_stride):
    """Where rows begin; behind the last one, the last one again, so that what is read there is never masked."""
    return x + tl.minimum(row, rows - 1).to(tl.int64) * row_stride


@triton.jit
def dot(left, right, sums, PRECISION: tl.constexpr):
    if INTERPRETED:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, sums, input_precision=PRECISION)


@triton.jit
def form_logits(
    hidden_rows,  # [BLOCK_N] pointers
    weight_rows,  # [BLOCK_V] pointers
    hidden_size,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """hidden · weightᵀ, [BLOCK_N, BLOCK_V] float32."""
    logits = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    for first in range(0, hidden_size, BLOCK_H):
        h = first + tl.arange(0, BLOCK_H)
        inside = (h < hidden_size)[None, :]
        hidden = tl.load(hidden_rows[:, None] + h[None, :], mask=inside, other=0)
        weight = tl.load(weight_rows[:, None] + h[None, :], mask=inside, other=0)
        logits = dot(hidden, tl.trans(weight), logits, PRECISION)
    return logits
