# mypy: allow-untyped-defs
"""Arithmetic that fold and cut kernels share, in the symbols of the fold contract (backends/fold.py).

u = inner · (logit + bias);   z = outer · tanh(u) with a softcap and where u is finite, else u
dz/dlogit = inner · outer · bend;   bend = 1 − tanh(u)² with a softcap, else 1
"""

from __future__ import annotations

import triton
import triton.language as tl


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
def short_tanh(x):
    """Within 4e-7, absolutely. What `tanh` spends on values near 0 costs wide tiles their registers."""
    return 1 - 2 / (tl.exp(2 * x) + 1)


@triton.jit
def transformed(logits, bias, column, inside, inner, outer, SOFTCAP: tl.constexpr, SHORT_TANH: tl.constexpr):
    """z, which is −∞ outside, and bend."""
    if bias is not None:
        logits += tl.load(bias + column, mask=inside, other=0)
    z = logits * inner
    bend = 1
    if SOFTCAP:
        capped = short_tanh(z) if SHORT_TANH else tanh(z)
        z = tl.where(tl.abs(z) < float("inf"), outer * capped, z)
        bend = 1 - capped * capped
    return tl.where(inside, z, float("-inf")), bend


@triton.jit
def rescaled(maximum, total, block_maximum):
    """The larger maximum, the total relative to it, and what to subtract from a z that is added to this total."""
    largest = tl.maximum(maximum, block_maximum)
    shift = tl.where(largest == float("-inf"), 0, largest)  # any finite shift makes exp(−∞ − shift) 0
    return largest, total * tl.exp(maximum - shift), shift


@triton.jit
def probability(z, lse, WORK: tl.constexpr):
    """exp(z − lse); lse comes in two parts: the difference to the high one is exact where z is near lse."""
    high = lse.to(WORK)
    return tl.exp(z - high - (lse - high).to(WORK))


@triton.jit
def logit_gradient(z, is_target, lse, slope, WORK: tl.constexpr):
    """slope · (onehot − p), with slope = coefficient · dz/dlogit. With onehot as a number, the cut kernels spill."""
    p = probability(z, lse, WORK)
    return slope * tl.where(is_target, 1 - p, -p)
