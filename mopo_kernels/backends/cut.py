"""Cut backend: the products of an LM head and what is folded of them in one Triton kernel each way.

cut_statistics   Statistics (fold.py) of hidden · weightᵀ
cut_gradients    ∂(Σ coefficient · logp) by hidden, weight and bias
"""

from __future__ import annotations

from contextlib import suppress

from mopo_kernels.backends.triton import UNAVAILABLE

with suppress(ImportError):  # UNAVAILABLE says why
    from mopo_kernels.backends.cut_backward import cut_gradients
    from mopo_kernels.backends.cut_forward import cut_statistics

__all__ = ["UNAVAILABLE", "cut_gradients", "cut_statistics"]
