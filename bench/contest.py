"""Contestants timed in turn: every round runs each once, so that other work on the machine falls on all alike."""

import ctypes
import sys
import time

import torch
from memory import measure

ROUNDS = 4
LONG = 30  # seconds: who needs more for the warm-up is not run again
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h


def forward_and_backward(function, hidden, weight, *others):
    def run():
        function(hidden, weight, *others).backward()
        hidden.grad = weight.grad = None

    return run


def keep_freed_memory():
    """Let malloc reuse what was freed, as caching allocators do, and not hand it back to the kernel.

    How long fetching it again takes says more of the machine (of its host, if it is a virtual one) than of contestants.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


def rounds_of(runs):
    """Seconds of {name: run} in ROUNDS rounds after a warm-up."""
    keep_freed_memory()
    seconds = {name: [] for name in runs}
    for _ in range(1 + ROUNDS):
        play(runs, seconds)
    return {name: times[1:] for name, times in seconds.items()}


def play(runs, seconds):
    """One round."""
    for name, run in runs.items():
        start = time.perf_counter()
        run()
        seconds[name].append(time.perf_counter() - start)


def warm_up(runs):
    """Seconds and peak bytes of {name: run}, each run once under torch's profiler."""
    seconds, peaks = {}, {}
    for name, run in runs.items():
        start = time.perf_counter()
        peaks[name] = measure(run)[0]
        seconds[name] = time.perf_counter() - start
    return seconds, peaks


def hold(benchmark, runs, **info):
    """Time {name: run} in rounds after a warm-up; the JSON gets the seconds of every round and the peak bytes.

    A warm-up of more than LONG seconds stands for the rounds of that contestant, who is seen to be slow.
    """
    keep_freed_memory()
    first, peaks = warm_up(runs)
    short = {name: run for name, run in runs.items() if first[name] <= LONG}
    seconds = {name: [] for name in short}
    benchmark.pedantic(play, (short, seconds), rounds=ROUNDS)
    benchmark.extra_info |= info | {"threads": torch.get_num_threads()}
    benchmark.extra_info["seconds"] = {name: seconds.get(name, [first[name]]) for name in runs}
    benchmark.extra_info["peak_bytes"] = peaks | {name: measure(run)[0] for name, run in short.items()}
