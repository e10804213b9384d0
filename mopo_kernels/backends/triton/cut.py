"""Cut backend: the products of an LM head and what is folded of them in one Triton kernel each way.

cut_statistics   Statistics (fold.py) of hidden · weightᵀ
cut_gradients    ∂(Σ coefficient · logp) by hidden, weight and bias
"""

from __future__ import annotations

from contextlib import suppress

import torch

from mopo_kernels.backends.fold import Transform
from mopo_kernels.backends.triton import UNAVAILABLE

with suppress(ImportError):  # UNAVAILABLE says why
    from mopo_kernels.backends.configuration import Configuration, recorded
    from mopo_kernels.backends.cut_backward import cut_gradients, launch
    from mopo_kernels.backends.cut_forward import cut_statistics
    from mopo_kernels.backends.cut_tile import Blocks

__all__ = ["UNAVAILABLE", "configurations", "cut_gradients", "cut_statistics"]

NEEDS = {
    "gradients": [(True, True, True), (True, True, False), (True, False, False)],
    "grad_hidden": [(True, False, False)],
    "grad_weight": [(False, True, True), (False, True, False)],
}


def configurations(kernel: str, dtype: torch.dtype, blocks: Blocks) -> list[Configuration]:
    """Those of a kernel with these blocks: with all options, which comes first, and without; rows are whole vectors."""
    rows, vocab, hidden_size = 2**15, 2**17, 4096
    with recorded() as found, torch.device("meta"):
        for with_options in (True, False):
            transform = Transform(1.0, 1.0, with_options)
            bias = torch.empty(vocab) if with_options else None
            hidden, weight = torch.empty(rows, hidden_size, dtype=dtype), torch.empty(vocab, hidden_size, dtype=dtype)
            target, lse = torch.empty(rows, dtype=torch.int64), torch.empty(rows, dtype=torch.float64)
            if kernel == "statistics":
                cut_statistics(hidden, weight, target, transform, bias=bias, blocks=blocks)
                continue
            for needs in NEEDS[kernel]:
                if needs[2] <= with_options:
                    tensors = hidden, weight, target, lse, torch.empty(rows), torch.empty(1), bias
                    launch(kernel, *tensors, transform, 0.0, needs, blocks)
    return found
