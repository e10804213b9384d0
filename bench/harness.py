"""Contestants timed in turn: every round runs each once, so that other work on the machine falls on all alike.

The order is another one in each round: a GPU at its power limit is up to 8% slower after one contestant than after
another. Time is the median over rounds after a warm-up, on a GPU with a cold L2; memory the peak above the start,
outputs and gradients included. One that fails (a peer that is not installed, a GPU's memory that is too small) is
reported as such and leaves the rest alone.
"""

from __future__ import annotations

import ctypes
import gc
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.memory import measure
from mopo_kernels.measure import roofline, workloads
from mopo_kernels.measure.roofline import Run, time_once

MIN_ROUNDS = 2
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h
CPU = torch.device("cpu")


class Limits(NamedTuple):
    """How long a contest may take."""

    rounds: int
    seconds: float = inf  # after which there are no more rounds, if there were MIN_ROUNDS
    patience: float = inf  # seconds: who needs more for the first call is not run again


ON_CPU = Limits(rounds=4, patience=30)
ON_GPU = Limits(rounds=5, seconds=20)


@dataclass
class Result:
    """How a contestant did."""

    rounds: list[float] = field(default_factory=list)  # seconds
    peak_bytes: int | None = None
    error: str = ""

    @property
    def seconds(self) -> float | None:
        return None if self.error or not self.rounds else median(self.rounds)


def hold(
    contestants: Mapping[str, Callable[..., Run]],  # name → inputs bound to a call that can be repeated
    inputs: Sequence[Tensor] = (),
    device: torch.device = CPU,
    limits: Limits = ON_CPU,
) -> dict[str, Result]:
    """Warm up all, then time them in turn."""
    keep_freed_memory()
    results = {name: Result() for name in contestants}
    calls = {}
    for name, bind in contestants.items():
        call = _enter(bind, inputs, device, limits, results[name])
        if call is not None:
            calls[name] = call
        else:
            _forget(inputs)
    _play(calls, results, device, limits)
    return results


def entry(
    group: str,
    contestants: Mapping[str, Callable[..., Run]],
    inputs: Sequence[Tensor] = (),
    limits: Limits = ON_CPU,
    **info: Any,
) -> dict[str, Any]:
    """A contest on a CPU as JSON has it: seconds of every round and peak bytes of those that ran; errors of others."""
    print(f"{group} ... ", end="", flush=True)
    start = time.monotonic()
    results = hold(contestants, inputs, limits=limits)
    print(f"{time.monotonic() - start:.0f} s", flush=True)
    well = {name: result for name, result in results.items() if result.seconds is not None}
    found = {"group": group, **info, "threads": torch.get_num_threads()}
    found["seconds"] = {name: result.rounds for name, result in well.items()}
    found["peak_bytes"] = {name: result.peak_bytes for name, result in well.items()}
    found["errors"] = {name: result.error for name, result in results.items() if name not in well}
    return {"extra_info": found}


def pass_of(loss: Callable[..., Tensor]) -> Callable[..., Run]:
    """Forward and backward of a loss, as a contestant."""
    return lambda *inputs: workloads.forward_and_backward(
        lambda: loss(*inputs), *(x for x in inputs if x.requires_grad)
    )


def peak_bytes(run: Run, device: torch.device) -> int:
    """What a call holds at its peak above the start: by the allocator's count on a GPU, the profiler's elsewhere."""
    peak = roofline.peak_bytes(run, device)
    return measure(run)[0] if peak is None else peak


def reason(error: BaseException) -> str:
    """One line: out of memory, or what kind of error says what."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"


def keep_freed_memory() -> None:
    """Let malloc reuse what was freed, as caching allocators do, and not hand it back to the kernel.

    How long fetching it again takes says more of the machine (of its host, if it is a virtual one) than of contestants.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


def _enter(
    bind: Callable[..., Run], inputs: Sequence[Tensor], device: torch.device, limits: Limits, result: Result
) -> Run | None:
    """A warmed-up call, whose peak is known; None for one that fails, or whose first call took all patience."""
    start = time.perf_counter()
    try:
        call = bind(*inputs)
        result.peak_bytes = peak_bytes(call, device)  # compiles kernels, chooses algorithms
        first = time.perf_counter() - start
        if first <= limits.patience:
            result.peak_bytes = peak_bytes(call, device)
            return call
        result.rounds.append(first)
    except Exception as error:
        result.error = reason(error)
    return None


def _play(calls: dict[str, Run], results: dict[str, Result], device: torch.device, limits: Limits) -> None:
    cold, start = _cold_cache(device), time.monotonic()
    for done in range(limits.rounds):
        if done >= MIN_ROUNDS and time.monotonic() - start > limits.seconds:
            break
        for name in random.Random(done).sample(sorted(calls), len(calls)):
            call = calls[name]
            cold()
            try:
                results[name].rounds.append(time_once(call, device))
            except Exception as error:
                results[name].error = reason(error)
                del calls[name]


def _cold_cache(device: torch.device) -> Callable[[], object]:
    """Overwrites L2; while that runs, the host gets ahead of the device, as it does in training."""
    if device.type != "cuda":
        return lambda: None
    size = 4 * torch.cuda.get_device_properties(device).L2_cache_size
    return torch.empty(size, dtype=torch.uint8, device=device).zero_


def _forget(inputs: Sequence[Tensor]) -> None:
    """Gradients and cached memory that a contestant left behind."""
    for x in inputs:
        x.grad = None
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
