"""What an op must do at least, what a machine can do, and how far a measured time is from the two.

    floor = max(flops / gemm, bytes / copy)          roofline fraction = floor / measured time

`gemm` and `copy` are measured on the machine at hand by the functions below, not read off a data sheet.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from statistics import median
from typing import NamedTuple

import torch

Run = Callable[[], object]


class Work(NamedTuple):
    """Flops of matrix products, and bytes that global memory has to hand over or take."""

    flops: float
    bytes: float


class Ceilings(NamedTuple):
    """Rates of one machine in one dtype."""

    gemm: float  # flop/s of matrix products
    copy: float  # bytes/s, read and written

    def floor(self, work: Work) -> float:
        """Seconds below which this machine cannot do the work."""
        return max(work.flops / self.gemm, work.bytes / self.copy)

    def fraction(self, work: Work, seconds: float) -> float:
        return self.floor(work) / seconds


def seconds_of(run: Run, device: torch.device, *, rounds: int = 5, warmup: int = 1) -> float:
    """Median time of a call."""
    for _ in range(warmup):
        run()
    return median(time_once(run, device) for _ in range(rounds))


def time_once(run: Run, device: torch.device) -> float:
    """Seconds from the moment the device starts on a call until it is done."""
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def steady_seconds(run: Run, device: torch.device, *, seconds: float = 0.5) -> float:
    """Time of a call among as many as take this long, after as many that warm the device up.

    A GPU that multiplies matrices without a pause soon slows down to what its power limit allows.
    """
    if device.type != "cuda":
        return seconds_of(run, device)
    calls = math.ceil(seconds / seconds_of(run, device))

    def many() -> None:
        for _ in range(calls):
            run()

    return seconds_of(many, device, rounds=1) / calls


def copy_rate(size: int, device: torch.device) -> float:
    """Bytes/s, read and written, of a copy of `size` bytes: far more than caches hold."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / seconds_of(lambda: target.copy_(source), device)


def gemm_rate(m: int, n: int, k: int, dtype: torch.dtype, device: torch.device) -> float:
    """Flop/s of [m, k] · [k, n], steadily; random numbers: products of zeros draw less power and run faster."""
    left, right = torch.randn(m, k, device=device).to(dtype), torch.randn(n, k, device=device).to(dtype)
    out = torch.empty(m, n, dtype=dtype, device=device)
    return 2.0 * m * n * k / steady_seconds(lambda: torch.mm(left, right.t(), out=out), device)


def ceilings_of(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Measured in a second or two."""
    on_gpu = device.type == "cuda"
    side = 8192 if on_gpu else 1024
    return Ceilings(gemm_rate(side, side, side, dtype, device), copy_rate(2**30 if on_gpu else 2**26, device))


def peak_bytes(run: Run, device: torch.device) -> int | None:
    """Largest extra allocation of a call on a GPU; None elsewhere, where torch keeps no count."""
    if device.type != "cuda":
        return None
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    return torch.cuda.max_memory_allocated(device) - before
