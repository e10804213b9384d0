"""Triton backend: the contracts fold.py and batch.py in Triton, for GPUs, or interpreted where TRITON_INTERPRET=1."""

from __future__ import annotations

import os

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
WIDENED: frozenset[torch.dtype] = frozenset()  # tensor cores multiply 16-bit inputs as they are

try:
    from mopo_kernels.backends.triton_batch import objective, sequence_sums
    from mopo_kernels.backends.triton_fold import fold_gradient, fold_peaks, fold_statistics
except ImportError as error:
    UNAVAILABLE = f"Triton is not installed ({error}); pip install triton"
else:
    UNAVAILABLE = "" if INTERPRETED or torch.cuda.is_available() else "Triton kernels need a GPU, or TRITON_INTERPRET=1"

__all__ = [
    "INTERPRETED",
    "UNAVAILABLE",
    "WIDENED",
    "fold_gradient",
    "fold_peaks",
    "fold_statistics",
    "objective",
    "sequence_sums",
]
