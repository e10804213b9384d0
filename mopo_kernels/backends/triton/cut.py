"""Cut backend: the products of an LM head and what is folded of them in one Triton kernel each way.

cut_statistics   Statistics (backends/fold.py) of hidden · weightᵀ
cut_gradients    ∂(Σ coefficient · logp) by hidden, weight and bias
"""

from __future__ import annotations

from mopo_kernels.backends.triton import UNAVAILABLE
from mopo_kernels.backends.triton.cut_tile import Blocks, CutInputs

if not UNAVAILABLE:
    from mopo_kernels.backends.triton.cut_backward import cut_gradients
    from mopo_kernels.backends.triton.cut_forward import cut_statistics

__all__ = ["UNAVAILABLE", "Blocks", "CutInputs", "cut_gradients", "cut_statistics"]
