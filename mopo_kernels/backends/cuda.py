"""CUDA backend: the contracts `fold.py` and `batch.py` in CUDA C++ (csrc/cuda), on a tensor's device and its stream."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from mopo_kernels.backends.batch import ObjectiveValues
from mopo_kernels.backends.fold import Statistics, Transform

try:
    from mopo_kernels import _cuda
except ImportError as error:
    _cuda = None  # type: ignore[assignment]
    UNAVAILABLE = (
        f"the CUDA kernels are not built ({error}); reinstall with nvcc on the PATH: "
        "MOPO_BUILD_CUDA=1 pip install --no-build-isolation ..."
    )
else:
    UNAVAILABLE = ""

ARCHITECTURES = () if _cuda is None else tuple(_cuda.ARCHITECTURES.split(","))  # compute capabilities, "12.0+PTX"
WIDENED: frozenset[torch.dtype] = frozenset()  # tensor cores multiply 16-bit inputs as they are


@cache
def unfit_for(capability: tuple[int, int]) -> str:
    """Why the kernels, as they were built, do not run on a GPU of this compute capability, or nothing."""
    if any(runs_on(name, capability) for name in ARCHITECTURES):
        return ""
    gpu = "{}.{}".format(*capability)
    return (
        f"the CUDA kernels are built for {', '.join(ARCHITECTURES)} and this GPU is {gpu}: "
        f'reinstall with MOPO_CUDA_ARCHS="{gpu}"'
    )


def runs_on(architecture: str, capability: tuple[int, int]) -> bool:
    """Code for 8.0 runs on all 8.x from there on, for 9.0a on 9.0 alone, and PTX on whatever is newer."""
    match = re.fullmatch(r"(\d+)\.(\d)(a?)f?(\+PTX)?", architecture)
    if match is None:
        return False
    built = int(match[1]), int(match[2])
    if match[3]:
        return capability == built
    return capability >= built and (capability[0] == built[0] or bool(match[4]))


def fold_statistics(
    tile: Tensor,
    target: Tensor,
    statistics: Statistics,
    transform: Transform,
    *,
    first_column: int = 0,
    bias: Tensor | None = None,
) -> None:
    _, dtype = _typed(tile)
    scratch = _scratch(tile, _cuda.statistics_scratch(*tile.shape, dtype))
    with _stream(tile) as stream:
        _cuda.statistics(
            *_tile(tile, first_column, bias, target, transform),
            *(x.data_ptr() for x in statistics),
            *(scratch.data_ptr(), stream),
        )


def fold_gradient(
    tile: Tensor,
    target: Tensor,
    lse: Tensor,
    coefficient: Tensor,
    transform: Transform,
    *,
    first_column: int = 0,
    bias: Tensor | None = None,
    out: Tensor | None = None,
) -> None:
    out = tile if out is None else out
    with _stream(tile) as stream:
        _cuda.gradient(
            *_tile(tile, first_column, bias, target, transform),
            *(lse.data_ptr(), coefficient.data_ptr(), out.data_ptr(), out.stride(0), stream),
        )


def fold_peaks(tile: Tensor, lse: Tensor, transform: Transform, *, block: int, bias: Tensor | None = None) -> Tensor:
    rows, columns = tile.shape
    peaks = lse.new_empty(-(-rows // block), -(-columns // block))
    with _stream(tile) as stream:
        _cuda.peaks(
            *(*_typed(tile), rows, columns, tile.stride(0), 0 if bias is None else bias.data_ptr()),
            *(*transform, lse.data_ptr(), block, peaks.data_ptr(), stream),
        )
    return peaks


def sequence_sums(logp: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    sums, counts = logp.new_empty(len(logp), dtype=torch.float64), target.new_empty(len(logp))
    with _stream(logp) as stream:
        _cuda.sequence_sums(
            *(_typed(logp), logp.stride(0), target.data_ptr(), target.stride(0)),
            *(*logp.shape, ignore_index, sums.data_ptr(), counts.data_ptr(), stream),
        )
    return sums, counts


def objective(
    logp: Tensor,
    win_rate: Tensor,
    group: Tensor,
    multipliers: Tensor,
    ref_logp: Tensor | None,
    lag_log_ratio: Tensor | None,
    kept: Tensor | None,
    *,
    tau: float,
    eps: float,
    policy_step: str,
    normalize: str,
    primary: int,
) -> Tensor:
    values = win_rate.new_empty(ObjectiveValues.size(*win_rate.shape), dtype=torch.float64)
    scratch = _scratch(win_rate, _cuda.objective_scratch(*win_rate.shape))
    with _stream(win_rate) as stream:
        _cuda.objective(
            *(*win_rate.shape, _typed(logp), _typed(win_rate), group.data_ptr(), _typed(multipliers)),
            *(None if x is None else _typed(x) for x in (ref_logp, lag_log_ratio)),
            0 if kept is None else kept.data_ptr(),
            *(tau, eps, policy_step, normalize == "group", primary),
            *(scratch.data_ptr(), values.data_ptr(), stream),
        )
    return values


@contextmanager
def _stream(x: Tensor) -> Iterator[int]:
    """The current stream of the tensor's device, which becomes the current device."""
    with torch.cuda.device(x.device):
        yield torch.cuda.current_stream(x.device).cuda_stream


def _scratch(like: Tensor, size: int) -> Tensor:
    """Working memory; the allocator gives it to nobody else before the stream has passed the kernels that use it."""
    return like.new_empty(size, dtype=torch.float64)


def _tile(
    tile: Tensor, first_column: int, bias: Tensor | None, target: Tensor, transform: Transform
) -> tuple[Any, ...]:
    return (
        *(*_typed(tile), *tile.shape, tile.stride(0), first_column),
        *(0 if bias is None else bias.data_ptr(), target.data_ptr()),
        *transform,
    )


def _typed(x: Tensor) -> tuple[int, str]:
    """Address and dtype."""
    return x.data_ptr(), str(x.dtype).removeprefix("torch.")
