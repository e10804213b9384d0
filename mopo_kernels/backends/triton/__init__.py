"""Triton backend: the contracts fold.py and batch.py in Triton, for GPUs, or interpreted where TRITON_INTERPRET=1.

Where neither is there, Triton is not imported, which takes longer than the rest of the package.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if find_spec("triton") is None:
    UNAVAILABLE = "Triton is not installed; pip install triton"
elif not (INTERPRETED or torch.cuda.is_available()):
    UNAVAILABLE = "Triton kernels need a GPU, or TRITON_INTERPRET=1"
else:
    UNAVAILABLE = ""
    from mopo_kernels.backends.triton.batch import label_statistics, sequence_sums
    from mopo_kernels.backends.triton.fold import fold_gradient, fold_statistics
    from mopo_kernels.backends.triton.sample import fold_sample, sample_hidden, sample_weight
    from mopo_kernels.backends.triton.scale import scale_in_place

__all__ = [
    "INTERPRETED",
    "UNAVAILABLE",
    "fold_gradient",
    "fold_sample",
    "fold_statistics",
    "label_statistics",
    "sample_hidden",
    "sample_weight",
    "scale_in_place",
    "sequence_sums",
]
