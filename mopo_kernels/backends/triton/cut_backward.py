# mypy: allow-untyped-defs
"""Backward cut kernel: the logits of a tile again, and what they add to the gradients.

    g = slope · bend · (onehot(target) − exp(z − lse));   slope = coefficient · inner · outer
    grad_hidden += g · weight,   grad_weight += gᵀ · hidden,   grad_bias += Σ g over rows

A tile whose rows all have coefficient 0 is skipped. The sums are float32, in global memory:

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

from mopo_kernels.backends.triton.cut_logits import dot, form_logits, row_pointers
from mopo_kernels.backends.triton.cut_tile import ENOUGH_PROGRAMS, Blocks, CutInputs, blocks_for, parts_of
from mopo_kernels.backends.triton.transform import logit_gradient, transformed

OWNER = {"gradients": "nothing", "grad_hidden": "rows", "grad_weight": "columns"}  # what a kernel's program owns
LARGEST = 2.0**14
PART_BYTES = 2**28  # of partial sums of grad_hidden, which few rows have several of: 128 programs at H = 4096

Needs = tuple[bool, bool, bool]  # of the gradients of hidden, weight and bias
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


@triton.jit
def add(sums, x, inside, ATOMIC: tl.constexpr):
    if ATOMIC:
        tl.atomic_add(sums, x, mask=inside, sem="relaxed")
    else:
        tl.store(sums, tl.load(sums, mask=inside, other=0) + x, mask=inside)


@triton.jit
def accumulate_product(
    sums,  # [rows, H]
    left,  # [BLOCK, BLOCK_OTHER]
    right_rows,  # [BLOCK_OTHER] pointers
    right_counts,  # [BLOCK_OTHER], or the row is 0
    unit,
    row,  # [BLOCK]
    rows,
    hidden_size,
    ATOMIC: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """sums[row] += unit · left · right"""
    sum_rows = sums + row.to(tl.int64) * hidden_size
    for first in range(0, hidden_size, BLOCK_H):
        h = first + tl.arange(0, BLOCK_H)
        counts = right_counts[:, None] & (h < hidden_size)[None, :]
        right = tl.load(right_rows[:, None] + h[None, :], mask=counts, other=0)
        product = dot(left, right, tl.zeros([left.shape[0], BLOCK_H], tl.float32), PRECISION)
        inside = (row < rows)[:, None] & (h < hidden_size)[None, :]
        add(sum_rows[:, None] + h[None, :], product * unit, inside, ATOMIC)


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
        counts, inside = row_slope != 0, column < vocab
        z, bend = transformed(logits, bias, column, inside, inner, outer, SOFTCAP, True)
        is_target = column[None, :] == row_target[:, None]
        grad = logit_gradient(z, is_target, row_lse[:, None], row_slope[:, None] * bend, tl.float32)
        grad = tl.where(counts[:, None], grad, 0)
        if tl.max(counts.to(tl.int32), 0) > 0:
            if grad_bias is not None:
                add(grad_bias + column, tl.sum(grad, 0) * unit, inside, ATOMIC)
            left = grad.to(hidden.dtype.element_ty)
            if grad_hidden is not None:
                accumulate_product(
                    grad_hidden, left, weight_rows, inside, unit, row, rows, hidden_size, ATOMIC, SUM_H, PRECISION
                )
            if grad_weight is not None:
                left = tl.trans(left)
                accumulate_product(
                    grad_weight, left, hidden_rows, counts, unit, column, vocab, hidden_size, ATOMIC, SUM_H, PRECISION
                )
        if not ATOMIC:
            tl.debug_barrier()  # the next step's sums are read by other threads than those that wrote them


def cut_gradients(
    inputs: CutInputs,
    lse: Tensor,  # [N] float64
    coefficient: Tensor,  # [N] float64
    needs: Needs,
    *,
    blocks: Blocks | None = None,
) -> Gradients:
    """∂(Σ coefficient · logp) by hidden, weight and bias, in float32; by owners if torch is to be deterministic.

    Blocks replace the table's. Floor: 6·N·H·V flops for both products, 4·N·H·V for one; with owners 8 for both;
    (N + V)·H elements read, as many float32 written.
    """
    slope, unit = _in_units(coefficient * (inputs.transform.inner * inputs.transform.outer))

    def run(kernel: str, needs: Needs) -> Gradients:
        return launch(kernel, inputs, lse, slope, unit, needs, blocks or blocks_for(kernel, inputs.hidden))

    if not torch.are_deterministic_algorithms_enabled():
        return run("gradients", needs)
    needs_hidden, needs_weight, needs_bias = needs
    grad_hidden, _, _ = run("grad_hidden", (needs_hidden, False, False))
    _, grad_weight, grad_bias = run("grad_weight", (False, needs_weight, needs_bias))
    return grad_hidden, grad_weight, grad_bias


def launch(
    kernel: str,  # of OWNER
    inputs: CutInputs,
    lse: Tensor,
    slope: Tensor,  # [N] float32, in units
    unit: Tensor,  # [1] float32
    needs: Needs,
    blocks: Blocks,
) -> Gradients:
    """The gradients needed, by one launch."""
    rows, vocab, hidden_size = inputs.sizes
    row_blocks, column_blocks = blocks.along(rows, vocab)
    programs, parts, part_blocks, copies = column_blocks, 1, column_blocks, 1
    if kernel == "gradients":
        programs, parts, part_blocks = row_blocks * column_blocks, column_blocks, 1
    elif kernel == "grad_hidden":
        wanted = triton.cdiv(ENOUGH_PROGRAMS, max(row_blocks, 1))
        parts, part_blocks = parts_of(column_blocks, min(wanted, PART_BYTES // max(4 * inputs.hidden.numel(), 1)))
        programs, copies = row_blocks * parts, parts

    shapes = (copies, rows, hidden_size), (vocab, hidden_size), (vocab,)
    grad_hidden, grad_weight, grad_bias = (
        inputs.hidden.new_zeros(shape, dtype=torch.float32) if need else None
        for shape, need in zip(shapes, needs, strict=True)
    )
    if any(needs) and rows > 0 and vocab > 0:
        with torch.cuda.device_of(inputs.hidden):
            cut_gradients_kernel[(programs,)](
                **inputs.arguments(blocks),
                lse=lse,
                slope=slope,
                unit=unit,
                grad_hidden=grad_hidden,
                grad_weight=grad_weight,
                grad_bias=grad_bias,
                parts=parts,
                part_blocks=part_blocks,
                OWNER=OWNER[kernel],
            )
    if grad_hidden is not None:
        grad_hidden = grad_hidden[0] if copies == 1 else grad_hidden.sum(0)
    return grad_hidden, grad_weight, grad_bias


def _in_units(slope: Tensor) -> tuple[Tensor, Tensor]:
    """Slopes in units of the largest / LARGEST, and that unit, float32."""
    largest = slope.abs().amax(0, keepdim=True) if len(slope) > 0 else slope.new_ones(1)
    unit = largest.clamp(min=LARGEST * torch.finfo(torch.float32).tiny) / LARGEST
    return (slope / unit).float(), unit.float()
