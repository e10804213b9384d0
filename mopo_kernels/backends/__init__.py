"""Backends and the one table that chooses among them: (op, device type) → backends in order of preference.

`reference` computes whole ops; every other backend implements the contracts fold.py (the tile engine does the rest of
an LM head) and batch.py. `backend=` or the environment variable MOPO_BACKEND overrides the table; a name that cannot
run the op on that device is an error, never a fallback. A backend that could not be built is passed over, and
`describe` says why.
"""

from __future__ import annotations

import os
from types import ModuleType
from typing import NamedTuple, cast

import torch

from mopo_kernels.backends import cpu, reference
from mopo_kernels.backends.batch import Batch
from mopo_kernels.backends.fold import Fold

BACKENDS: dict[str, ModuleType] = {"reference": reference, "cpu": cpu}

PREFERENCE: dict[str, dict[str, tuple[str, ...]]] = {
    "linear_logprob": {"cpu": ("cpu", "reference"), "cuda": ("reference",), "mps": ("reference",)},
    "token_logprob": {"cpu": ("cpu", "reference"), "cuda": ("reference",), "mps": ("reference",)},
    "sequence_sums": {"cpu": ("cpu", "reference"), "cuda": ("reference",), "mps": ("reference",)},
    "objective": {"cpu": ("cpu", "reference"), "cuda": ("reference",), "mps": ("reference",)},
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
    names = PREFERENCE[op].get(device, ("reference",))
    available = [name for name in names if not _unavailable(name)]
    for source, name in (("backend", backend), ("MOPO_BACKEND", os.environ.get("MOPO_BACKEND"))):
        if not name:
            continue
        if name not in available:
            why = f" ({_unavailable(name)})" if name in names else ""
            raise ValueError(f"{source}={name!r} cannot run {op} on {device}{why}; choose one of {available}")
        return Choice(op, device, name, f"asked for by {source}")
    return Choice(op, device, available[0], "first available in the table of preference")


def fold(backend: str) -> Fold:
    """The module that implements the fold contract under this name."""
    return cast(Fold, BACKENDS[backend])


def batch(backend: str) -> Batch:
    """The module that implements the batch contract under this name."""
    return cast(Batch, BACKENDS[backend])


def _unavailable(backend: str) -> str:
    """Why a backend cannot run here, or nothing."""
    return cpu.UNAVAILABLE if backend == "cpu" else ""


def describe() -> list[Choice]:
    """What runs where on this machine, one line per op and device present (`mopo doctor` prints it)."""
    devices = ["cpu"]
    devices += ["cuda"] if torch.cuda.is_available() else []
    devices += ["mps"] if torch.backends.mps.is_available() else []
    return [_explained(choose(op, device)) for op in PREFERENCE for device in devices]


def _explained(choice: Choice) -> Choice:
    """The choice with what it runs on, and with the backends passed over for it."""
    details = f"; {cpu.instruction_set()} instructions" if choice.backend == "cpu" else ""
    for name in PREFERENCE[choice.op].get(choice.device, ()):
        details += f"; {name} is passed over: {_unavailable(name)}" if _unavailable(name) else ""
    return choice._replace(reason=choice.reason + details)
