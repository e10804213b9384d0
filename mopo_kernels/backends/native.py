"""CPU backend: the contracts `fold.py` and `batch.py` in C++ (csrc/cpu), called with addresses, sizes and strides.

The instruction set (AVX-512, AVX2 or portable code) is the best that the CPU has; the environment variable
MOPO_CPU_ISA = avx512 | avx2 | portable asks for another one.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from mopo_kernels.backends.batch import ObjectiveValues
from mopo_kernels.backends.fold import Statistics, Transform

try:
    from mopo_kernels import _cpu
except ImportError as error:
    _cpu = None  # type: ignore[assignment]
    UNAVAILABLE = f"the C++ kernels are not built ({error}); reinstall with a C++17 compiler"
else:
    UNAVAILABLE = ""
    if os.environ.get("MOPO_CPU_ISA"):
        _cpu.choose_isa(os.environ["MOPO_CPU_ISA"])

# Without matrix instructions for 16 bits, which float16 never has, those products run several times slower.
_MULTIPLIES_BFLOAT16 = os.environ.get("MOPO_CPU_ISA") in (None, "", "avx512") and bool(
    torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
)
WIDENED = frozenset({torch.float16} if _MULTIPLIES_BFLOAT16 else {torch.float16, torch.bfloat16})


def instruction_set() -> str:
    """The instruction set in use: "avx512", "avx2" or "portable"."""
    return _cpu.isa()


def on_huge_pages(x: Tensor) -> Tensor:
    """The same tensor, whose memory nobody has touched yet: writing it first is faster on huge pages."""
    if _cpu is not None and x.device.type == "cpu":
        _cpu.advise_huge_pages(x.data_ptr(), x.numel() * x.element_size())
    return x


def fold_statistics(
    tile: Tensor,
    target: Tensor,
    statistics: Statistics,
    transform: Transform,
    *,
    first_column: int = 0,
    bias: Tensor | None = None,
) -> None:
    arguments = _tile(tile, first_column, bias, target, transform)
    _cpu.statistics(*arguments, *(x.data_ptr() for x in statistics), torch.get_num_threads())


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
    arguments = _tile(tile, first_column, bias, target, transform)
    _cpu.gradient(
        *arguments, lse.data_ptr(), coefficient.data_ptr(), out.data_ptr(), out.stride(0), torch.get_num_threads()
    )


def fold_peaks(tile: Tensor, lse: Tensor, transform: Transform, *, block: int, bias: Tensor | None = None) -> Tensor:
    rows, columns = tile.shape
    peaks = lse.new_empty(-(-rows // block), -(-columns // block))
    data, dtype, *shape, _, bias_data, _, inner, outer, softcap = _tile(tile, 0, bias, lse, transform)
    _cpu.peaks(
        *(data, dtype, *shape, bias_data, inner, outer, softcap),
        *(lse.data_ptr(), block, peaks.data_ptr(), torch.get_num_threads()),
    )
    return peaks


def sequence_sums(logp: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    sums, counts = logp.new_empty(len(logp), dtype=torch.float64), target.new_empty(len(logp))
    _cpu.sequence_sums(
        *(_typed(logp), logp.stride(0), target.data_ptr(), target.stride(0)),
        *(*logp.shape, ignore_index, sums.data_ptr(), counts.data_ptr(), torch.get_num_threads()),
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
    _cpu.objective(
        *(*win_rate.shape, _typed(logp), _typed(win_rate), group.data_ptr(), _typed(multipliers)),
        *(None if x is None else _typed(x) for x in (ref_logp, lag_log_ratio)),
        0 if kept is None else kept.data_ptr(),
        *(tau, eps, policy_step, normalize == "group", primary, values.data_ptr()),
    )
    return values


def _tile(
    tile: Tensor, first_column: int, bias: Tensor | None, target: Tensor, transform: Transform
) -> tuple[Any, ...]:
    rows, columns = tile.shape
    return (
        *(*_typed(tile), rows, columns, tile.stride(0), first_column),
        *(0 if bias is None else bias.data_ptr(), target.data_ptr()),
        *transform,
    )


def _typed(x: Tensor) -> tuple[int, str]:
    """Address and dtype."""
    return x.data_ptr(), str(x.dtype).removeprefix("torch.")
