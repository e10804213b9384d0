# mypy: allow-untyped-defs
"""Backward cut kernel: the logits of a tile again, and what they add to the gradients.

    g = slope · (onehot(target) − exp(z − lse)) · (1 − tanh²)        slope = coefficient · inner · outer
    grad_hidden += g · weight,   grad_weight += gᵀ · hidden,   grad_bias += Σ g over rows

A tile in which every probability is below grad_filter, and no row has its target, is skipped; so is one whose rows all
have coefficient 0. The sums are float32, in global memory:

    atomic       a program per tile adds to all gradients, in any order: 6·N·H·V
    owner        a program owns a block of rows of grad_hidden and takes it through the vocabulary, another launch does
                 the same for blocks of grad_weight: 4·N·H·V each, without atomics and in the same order every time

In the products g has the dtype of the inputs. float16 holds no number below 6e-8 and none above 65504, so g is given in
units of the largest slope / LARGEST, whatever the scale of the loss is.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mopo_kernels.backends.cut_tile import (
    ENOUGH_PROGRAMS,
    GROUP,
    Blocks,
    blocks_for,
    dot,
    dot_precision,
    form_logits,
    parts_of,
    row_pointers,
    tanh,
    with_contiguous_rows,
)
from mopo_kernels.backends.fold import Transform
from mopo_kernels.backends.triton_fold import below, scaled

OWNER = {"gradients": "nothing", "grad_hidden": "rows", "grad_weight": "columns"}  # what a kernel's program owns
LARGEST = 2.0**14
PART_BYTES = 2**28  # of partial sums of grad_hidden, which few rows have several of: 128 programs at H = 4096

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


@triton.jit
def add(total, x, inside, ATOMIC: tl.constexpr):
    if ATOMIC:
        tl.atomic_add(total, x, mask=inside, sem="relaxed")
    else:
        tl.store(total, tl.load(total, mask=inside, other=0) + x, mask=inside)


@triton.jit
def add_product(
    total,  # [rows, H]
    left,  # [BLOCK, BLOCK_OTHER]
    right_rows,  # [BLOCK_OTHER] pointers
    right_counts,  # [BLOCK_OTHER], or the row is 0
    unit,
    row,  # [BLOCK]
    rows,
    hidden_size,
    ATOMIC: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """total[row] += unit · left · right"""
    total_rows = total + row.to(tl.int64) * hidden_size
    for first in range(0, hidden_size, BLOCK_H):
        h = first + tl.arange(0, BLOCK_H)
        counts = right_counts[:, None] & (h < hidden_size)[None, :]
        right = tl.load(right_rows[:, None] + h[None, :], mask=counts, other=0)
        product = dot(left, right, tl.zeros([BLOCK, BLOCK_H], tl.float32), PRECISION)
        inside = (row < rows)[:, None] & (h < hidden_size)[None, :]
        add(total_rows[:, None] + h[None, :], product * unit, inside, ATOMIC)


@triton.jit
def cut_gradients_kernel(
    hidden,  # [N, H]
    weight,  # [V, H]
    target,  # [N]
    lse,  # [N]
    slope,  # [N], in units
    unit,  # [1]
    bias,  # [V] or None
    grad_hidden,  # [parts, N, H] or None
    grad_weight,  # [V, H] or None
    grad_bias,  # [V] or None
    hidden_row_stride: tl.int64,
    weight_row_stride: tl.int64,
    rows: tl.int32,
    vocab: tl.int32,
    hidden_size: tl.int32,
    parts: tl.int32,
    part_blocks: tl.int32,  # of columns
    inner: tl.float32,
    outer: tl.float32,
    grad_filter: tl.float32,
    SOFTCAP: tl.constexpr,
    OWNER: tl.constexpr,  # of what: "rows", "columns" or "nothing"
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    ATOMIC: tl.constexpr = OWNER == "nothing"
    SUM_H: tl.constexpr = BLOCK_H // 2  # a whole one, and tiles of 128 × 128 logits spill registers
    program, row_blocks, column_blocks = tl.program_id(0), tl.cdiv(rows, BLOCK_N), tl.cdiv(vocab, BLOCK_V)
    if OWNER == "columns":
        owned, first, last = program, 0, row_blocks
    else:
        owned, part = tl.swizzle2d(program // parts, program % parts, row_blocks, parts, GROUP)
        first, last = part * part_blocks, tl.minimum((part + 1) * part_blocks, column_blocks)
        if OWNER == "rows":
            grad_hidden += part.to(tl.int64) * rows * hidden_size
    unit = tl.load(unit)

    for step in range(first, last):
        if OWNER == "columns":
            block_n, block_v = step, owned
        else:
            block_n, block_v = owned, step
        row = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
        column = block_v * BLOCK_V + tl.arange(0, BLOCK_V)
        hidden_rows = row_pointers(hidden, row, rows, hidden_row_stride)
        weight_rows = row_pointers(weight, column, vocab, weight_row_stride)
        logits = form_logits(hidden_rows, weight_rows, hidden_size, BLOCK_N, BLOCK_V, BLOCK_H, PRECISION)

        row_target = tl.load(target + row, mask=row < rows, other=0).to(tl.int32)
        row_lse = tl.load(lse + row, mask=row < rows, other=0)
        row_slope = tl.load(slope + row, mask=row < rows, other=0)
        z = scaled(logits, bias, column, column < vocab, inner)
        grad = row_slope[:, None]
        if SOFTCAP:
            capped = tanh(z)
            z = outer * capped
            grad = grad * (1 - capped * capped)
        p = tl.where((column < vocab)[None, :], tl.exp(below(z, row_lse[:, None], tl.float32)), 0)
        grad = grad * tl.where(column[None, :] == row_target[:, None], 1 - p, -p)
        grad = tl.where((row_slope != 0)[:, None], grad, 0)

        has_target = (row_target >= block_v * BLOCK_V) & (row_target < block_v * BLOCK_V + BLOCK_V)
        has_large = tl.max(tl.where(p < grad_filter, 0, 1), 1) > 0  # NaN too
        if tl.max(((has_target | has_large) & (row_slope != 0)).to(tl.int32), 0) > 0:
            if grad_bias is not None:
                add(grad_bias + column, tl.sum(grad, 0) * unit, column < vocab, ATOMIC)
            left = grad.to(hidden.dtype.element_ty)
            if grad_hidden is not None:
                add_product(
                    *(grad_hidden, left, weight_rows, column < vocab, unit, row, rows, hidden_size),
                    *(ATOMIC, BLOCK_N, SUM_H, PRECISION),
                )
            if grad_weight is not None:
                add_product(
                    *(grad_weight, tl.trans(left), hidden_rows, row_slope != 0, unit, column, vocab, hidden_size),
                    *(ATOMIC, BLOCK_V, SUM_H, PRECISION),
                )
        if not ATOMIC:
            tl.debug_barrier()  # the next step's sums are read by other threads than those that wrote them


def cut_gradients(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    target: Tensor,  # [N] int64
    lse: Tensor,  # [N] float64
    coefficient: Tensor,  # [N] float64
    transform: Transform,
    *,
    bias: Tensor | None = None,  # [V]
    needs: tuple[bool, bool, bool],  # gradients of hidden, weight and bias
    grad_filter: float | None = None,
    blocks: Blocks | None = None,  # instead of the table's
) -> Gradients:
    """∂(Σ coefficient · logp) by hidden, weight and bias, in float32; by owners if torch is to be deterministic."""
    per_row = target, lse, *_in_units(coefficient * (transform.inner * transform.outer))
    inputs = with_contiguous_rows(hidden), with_contiguous_rows(weight), *per_row, bias, transform, grad_filter or 0.0

    def run(kernel: str, needs: tuple[bool, bool, bool]) -> Gradients:
        return launch(kernel, *inputs, needs, blocks or blocks_for(kernel, hidden))

    if not torch.are_deterministic_algorithms_enabled():
        return run("gradients", needs)
    needs_hidden, needs_weight, needs_bias = needs
    grad_hidden, _, _ = run("grad_hidden", (needs_hidden, False, False))
    _, grad_weight, grad_bias = run("grad_weight", (False, needs_weight, needs_bias))
    return grad_hidden, grad_weight, grad_bias


def launch(
    kernel: str,  # of OWNER
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    lse: Tensor,
    slope: Tensor,  # [N] float32, in units
    unit: Tensor,  # [1] float32
    bias: Tensor | None,
    transform: Transform,
    grad_filter: float,
    needs: tuple[bool, bool, bool],
    blocks: Blocks,
) -> Gradients:
    """The gradients needed, by one launch."""
    (rows, hidden_size), vocab = hidden.shape, len(weight)
    row_blocks, column_blocks = triton.cdiv(rows, blocks.BLOCK_N), triton.cdiv(vocab, blocks.BLOCK_V)
    programs, parts, part_blocks, copies = column_blocks, 1, column_blocks, 1
    if kernel == "gradients":
        programs, parts, part_blocks = row_blocks * column_blocks, column_blocks, 1
    elif kernel == "grad_hidden":
        wanted = triton.cdiv(ENOUGH_PROGRAMS, max(row_blocks, 1))
        parts, part_blocks = parts_of(column_blocks, min(wanted, PART_BYTES // max(4 * hidden.numel(), 1)))
        programs, copies = row_blocks * parts, parts

    shapes = (copies, rows, hidden_size), (vocab, hidden_size), (vocab,)
    grads = [hidden.new_zeros(x, dtype=torch.float32) if need else None for x, need in zip(shapes, needs, strict=True)]
    if any(needs) and rows > 0 and vocab > 0:
        with torch.cuda.device_of(hidden):
            cut_gradients_kernel[(programs,)](
                *(hidden, weight, target, lse, slope, unit, bias, *grads, hidden.stride(0), weight.stride(0)),
                *(rows, vocab, hidden_size, parts, part_blocks, transform.inner, transform.outer, grad_filter),
                SOFTCAP=transform.softcap,
                OWNER=OWNER[kernel],
                PRECISION=dot_precision(hidden.dtype),
                GROUP=GROUP,
                **blocks._asdict(),
            )
    grad_hidden, grad_weight, grad_bias = grads
    if grad_hidden is not None:
        grad_hidden = grad_hidden[0] if copies == 1 else grad_hidden.sum(0)
    return grad_hidden, grad_weight, grad_bias


def _in_units(slope: Tensor) -> tuple[Tensor, Tensor]:
    """Slopes in units of the largest / LARGEST, and that unit, float32."""
    largest = slope.abs().amax(0, keepdim=True) if len(slope) > 0 else slope.new_ones(1)
    unit = largest.clamp(min=LARGEST * torch.finfo(torch.float32).tiny) / LARGEST
    return (slope / unit).float(), unit.float()
