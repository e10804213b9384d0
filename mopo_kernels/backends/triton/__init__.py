"""Triton backend: the contracts fold.py and batch.py in Triton, for GPUs, or interpreted where TRITON_INTERPRET=1."""

from __future__ import annotations

import os

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

try:
    from mopo_kernels.backends.triton.batch import label_statistics, sequence_sums
    from mopo_kernels.backends.triton.fold import fold_gradient, fold_statistics
except ImportError as error:
    UNAVAILABLE = f"Triton is not installed ({error}); pip install triton"
else:
    UNAVAILABLE = "" if INTERPRETED or torch.cuda.is_available() else "Triton kernels need a GPU, or TRITON_INTERPRET=1"

__all__ = ["INTERPRETED", "UNAVAILABLE", "fold_gradient", "fold_statistics", "label_statistics", "sequence_sums"]
