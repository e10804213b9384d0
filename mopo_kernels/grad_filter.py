"""What grad_filter leaves of a gradient tile: blocks with some probability above it, and the targets' own elements."""

from __future__ import annotations

import torch
from torch import Tensor

from mopo_kernels.plan import ALIGN

MAX_KEPT_FRACTION = 0.5  # of the elements, above which gathering the kept columns costs more than it saves


def drop_small_blocks(
    grad: Tensor,  # [R, C], zeroed in place where it is dropped
    target: Tensor,  # [R], relative to the tile; those outside [0, C) belong to other tiles
    keep: Tensor,  # [ceil(R / ALIGN), ceil(C / ALIGN)] bool
) -> Tensor | None:  # [ceil(R / ALIGN), C] bool
    """Zero the blocks not kept, but for the elements at targets, whose part coefficient · onehot is never small.

    Returns the columns that each stripe of ALIGN rows needs, or None where so many are left that the products may as
    well be over all of them.
    """
    needed = keep.repeat_interleave(ALIGN, 1)[:, : grad.shape[1]]
    rows = ((target >= 0) & (target < grad.shape[1])).nonzero().squeeze(-1)
    columns = target[rows]
    at_target = grad[rows, columns]
    for stripe, kept in zip(grad.split(ALIGN), needed, strict=True):
        stripe.masked_fill_(~kept, 0)
    grad[rows, columns] = at_target
    needed[rows // ALIGN, columns] = True
    return needed if needed.mean(dtype=torch.float32) <= MAX_KEPT_FRACTION else None
