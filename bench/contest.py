"""Contestants timed in turn: every round runs each once, so that other work on the machine falls on all alike."""

import time

import torch
from memory import measure

ROUNDS = 5


def forward_and_backward(function, hidden, weight, *others):
    def run():
        function(hidden, weight, *others).backward()
        hidden.grad = weight.grad = None

    return run


def hold(benchmark, runs, **info):
    """Time {name: run} in rounds after a warm-up; the JSON gets the seconds of every round and the peak bytes."""
    seconds = {name: [] for name in runs}

    def every_contestant():
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)

    benchmark.pedantic(every_contestant, rounds=ROUNDS, warmup_rounds=1)
    benchmark.extra_info |= info | {"threads": torch.get_num_threads()}
    benchmark.extra_info["seconds"] = {name: times[1:] for name, times in seconds.items()}
    benchmark.extra_info["peak_bytes"] = {name: measure(run)[0] for name, run in runs.items()}
