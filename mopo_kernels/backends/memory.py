"""Memory that an engine is about to fill: on a CPU, writing it first is faster on huge pages."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

try:
    from mopo_kernels import _cpu
except ImportError:
    _cpu = None  # type: ignore[assignment]


def new_empty(like: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor on the device of `like`."""
    x = like.new_empty(shape, dtype=dtype)
    if _cpu is not None and x.device.type == "cpu":
        _cpu.advise_huge_pages(x.data_ptr(), x.numel() * x.element_size())
    return x
