"""Products in a wider dtype than their operands': of matrices, added to sums, and of a gradient with a number."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from mopo_kernels.backends import triton


def add_product(total: Tensor, left: Tensor, right: Tensor, *, overwrite: bool = False) -> None:
    """total += left · right, or total = left · right, summed in total's dtype.

    Operands of 16 bits go straight into float32 sums where torch's addmm does that; elsewhere each product is rounded
    to 16 bits once before it is added.
    """
    if total.dtype == left.dtype:
        total.addmm_(left, right, beta=0 if overwrite else 1)
    elif left.is_cuda and sums_in(total.dtype, left.dtype, left.device):
        torch.addmm(total, left, right, beta=0 if overwrite else 1, out_dtype=total.dtype, out=total)
    elif overwrite:
        total.copy_(_product(left, right))
    else:
        total.add_(_product(left, right))


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left · right in their own dtype: under autocast they have been cast as it asks for."""
    with torch.autocast(left.device.type, enabled=False):
        return left @ right


@cache
def sums_in(total: torch.dtype, operand: torch.dtype, device: torch.device) -> bool:
    """Whether addmm adds products of `operand` in place to sums of `total`, tried once on numbers that tell."""
    step = torch.finfo(operand).eps
    ones, sums = torch.ones(16, 16, dtype=operand, device=device), torch.ones(16, 16, dtype=total, device=device)
    left = ones.index_fill(1, torch.zeros(1, dtype=torch.int64, device=device), 1 + step)
    try:
        torch.addmm(sums, left, ones, out_dtype=total, out=sums)
    except (RuntimeError, TypeError):  # NotImplementedError too
        return False
    return bool((sums == 17 + step).all())  # 16 + step has a bit more than `operand`


def multiply(x: Tensor, factor: Tensor) -> Tensor:
    """x · factor in place, in float32 or better; factor is a number [] on x's device, which a GPU is not waited for."""
    if x.is_cuda and not triton.UNAVAILABLE:
        return triton.scale_in_place(x, factor)
    return x if factor == 1 else x.mul_(factor.item())
