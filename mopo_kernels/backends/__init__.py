"""Backends and the one table that chooses among them: (op, device type) → backends in order of preference.

    reference   whole ops in plain torch, the truth; on a GPU only on request, or with a warning where all else fails
    cpu         C++ (csrc/cpu)            fold.py and batch.py: an engine does the rest of an LM head
    cuda        CUDA C++ (csrc/cuda)      fold.py and batch.py
    triton      Triton                    fold.py and batch.py
    cut         Triton                    the products too, logits never leave the chip; linear_logprob alone

`backend=` or the environment variable MOPO_BACKEND overrides the table, MOPO_BACKEND for the ops that the backend has;
a name that cannot run the op on that device, in that dtype, is an error, never a fallback. A backend that cannot run
here is passed over, and `describe` says why. "cut" stands last: it runs on request, or where rates measured on that
GPU say that it is faster (head/rates.py).
"""

from __future__ import annotations

import os
import warnings
from typing import Any, NamedTuple, cast

import torch

from mopo_kernels.backends import native, reference, triton
from mopo_kernels.backends.batch import Batch
from mopo_kernels.backends.fold import Fold
from mopo_kernels.backends.triton import cut

BACKENDS: dict[str, Any] = {
    "reference": reference,
    "cpu": native.cpu,
    "cuda": native.cuda,
    "triton": triton,
    "cut": cut,
}

# Triton's kernels run on CPU tensors where TRITON_INTERPRET=1: for tests, not for use.
FOLD = {"cpu": ("cpu", "reference", "triton"), "cuda": ("cuda", "triton", "reference"), "mps": ("reference",)}
PREFERENCE: dict[str, dict[str, tuple[str, ...]]] = {
    "linear_logprob": {**FOLD, "cpu": (*FOLD["cpu"], "cut"), "cuda": (*FOLD["cuda"], "cut")},
    "token_logprob": FOLD,
    "sequence_sums": FOLD,
    "label_statistics": FOLD,
}


class Choice(NamedTuple):
    """Which backend runs an op on a device, and why."""

    op: str
    device: str
    backend: str
    reason: str
    requested: bool


def choose(op: str, device: str, backend: str | None = None, dtype: torch.dtype = torch.float32) -> Choice:
    """The backend that runs `op` on a device type in a dtype.

    Raises:
        ValueError: `backend` (or MOPO_BACKEND) names a backend that does not exist or cannot run there.
    """
    names = PREFERENCE[op].get(device, ("reference",))
    for source, name in (("backend", backend), ("MOPO_BACKEND", if_it_has(op, os.environ.get("MOPO_BACKEND")))):
        if not name:
            continue
        why = _unavailable(name, device, dtype) if name in names else "no such backend for it"
        if why:
            others = [other for other in names if not _unavailable(other, device, dtype)]
            raise ValueError(f"{source}={name!r} cannot run {op} on {device} ({why}); choose one of {others}")
        return Choice(op, device, name, f"asked for by {source}", True)
    found = next(name for name in names if not _unavailable(name, device, dtype))
    if device == "cuda" and found == "reference":
        warnings.warn(
            f"{op} runs in plain torch on the GPU, slowly and with all its logits in memory: "
            f"{'; '.join(BACKENDS[name].UNAVAILABLE for name in FOLD['cuda'][:-1])}. "
            "backend='reference' asks for it without this warning",
            RuntimeWarning,
            stacklevel=3,
        )
    return Choice(op, device, found, "first available in the table of preference", False)


def fold(backend: str) -> Fold:
    """What implements the fold contract under this name."""
    return cast(Fold, BACKENDS[backend])


def batch(backend: str) -> Batch:
    """What implements the batch contract under this name."""
    return cast(Batch, BACKENDS[backend])


def if_it_has(op: str, backend: str | None) -> str | None:
    """The name, unless it is that of a backend which has other ops but not this one."""
    has_op = any(backend in names for names in PREFERENCE[op].values())
    return backend if has_op or backend not in BACKENDS else None


def _unavailable(backend: str, device: str, dtype: torch.dtype = torch.float32) -> str:
    """Why a backend cannot run here, or nothing."""
    if BACKENDS[backend].UNAVAILABLE:
        return str(BACKENDS[backend].UNAVAILABLE)
    if backend == "cuda" and device == "cuda" and torch.cuda.is_available():
        return native.unfit_for(torch.cuda.get_device_capability())
    if backend in ("triton", "cut") and device == "cpu" and not triton.INTERPRETED:
        return "Triton kernels run on CPU tensors only where TRITON_INTERPRET=1"
    if backend == "cut" and dtype == torch.float64:
        return "the cut kernels do not multiply float64"
    return ""


def describe() -> list[Choice]:
    """What runs where on this machine, one line per op and device present (`mopo doctor` prints it)."""
    devices = ["cpu"]
    devices += ["cuda"] if torch.cuda.is_available() else []
    devices += ["mps"] if torch.backends.mps.is_available() else []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the reason says the same
        return [_explained(choose(op, device)) for op in PREFERENCE for device in devices]


def _explained(choice: Choice) -> Choice:
    """The choice with what it runs on, and with the backends passed over for it."""
    details = f"; {native.instruction_set()} instructions" if choice.backend == "cpu" else ""
    names = PREFERENCE[choice.op].get(choice.device, ("reference",))
    for name in names[: names.index(choice.backend)]:
        why = _unavailable(name, choice.device)
        details += f"; {name} is passed over: {why}" if why else ""
    return choice._replace(reason=choice.reason + details)
