"""Backends and the one table that chooses among them: (op, device type) → backends in order of preference.

Every backend module implements an op with the signature that `reference` gives it. `backend=` or the environment
variable MOPO_BACKEND overrides the table; a name that cannot run the op on that device is an error, never a fallback.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from mopo_kernels.backends import reference

BACKENDS: dict[str, ModuleType] = {"reference": reference}

PREFERENCE: dict[str, dict[str, tuple[str, ...]]] = {
    "linear_logprob": {"cpu": ("reference",), "cuda": ("reference",), "mps": ("reference",)},
    "token_logprob": {"cpu": ("reference",), "cuda": ("reference",), "mps": ("reference",)},
}


class Choice(NamedTuple):
    """Which backend runs an op on a device, and why."""

    op: str
    device: str
    backend: str
    reason: str


def choose(op: str, device: str, backend: str | None = None) -> Choice:
    """The backend that runs `op` on a device type.

    Raises:
        ValueError: `backend` (or MOPO_BACKEND) names a backend that does not exist or cannot run there.
    """
    available = PREFERENCE[op].get(device, ("reference",))
    for source, name in (("backend", backend), ("MOPO_BACKEND", os.environ.get("MOPO_BACKEND"))):
        if not name:
            continue
        if name not in available:
            raise ValueError(f"{source}={name!r} cannot run {op} on {device}; choose one of {list(available)}")
        return Choice(op, device, name, f"asked for by {source}")
    return Choice(op, device, available[0], "first available in the table of preference")


def implementation(op: str, tensor: Tensor, backend: str | None) -> Callable[..., Tensor]:
    """The function that computes `op` on the device of `tensor`."""
    return getattr(BACKENDS[choose(op, tensor.device.type, backend).backend], op)


def describe() -> list[Choice]:
    """What runs where on this machine, one line per op and device present (`mopo doctor` prints it)."""
    devices = ["cpu"]
    devices += ["cuda"] if torch.cuda.is_available() else []
    devices += ["mps"] if torch.backends.mps.is_available() else []
    return [choose(op, device) for op in PREFERENCE for device in devices]
