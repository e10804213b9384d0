# mypy: allow-untyped-defs
"""x ← x · factor, factor a number on the GPU that nobody there waits for: x is neither read nor written where it is 1.

torch's own product with such a number first rounds it to x's 16 bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # elements: 16 for each of 256 threads
MAX_PROGRAMS = 4096  # for the largest GPU to be busy to the end of its last wave


@triton.jit
def scale_kernel(
    x,  # [size]
    factor,  # []
    size: tl.int64,
    programs: tl.int64,
    WORK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    by = tl.load(factor).to(WORK)
    if by != 1:
        for first in range(tl.program_id(0).to(tl.int64) * BLOCK, size, programs * BLOCK):
            place = first + tl.arange(0, BLOCK)
            inside = place < size
            scaled = tl.load(x + place, mask=inside).to(WORK) * by
            tl.store(x + place, scaled.to(x.dtype.element_ty), mask=inside)


def scale_in_place(x: Tensor, factor: Tensor) -> Tensor:
    """x, multiplied in float32 (float64 for float64); contiguous. Floor: nothing, or x read and written once."""
    programs = min(triton.cdiv(x.numel(), BLOCK), MAX_PROGRAMS)
    if programs > 0:
        with torch.cuda.device_of(x):
            scale_kernel[(programs,)](
                x=x,
                factor=factor,
                size=x.numel(),
                programs=programs,
                WORK=tl.float64 if x.dtype == torch.float64 else tl.float32,
                BLOCK=BLOCK,
                num_warps=8,
            )
    return x
