"""Is this tree faster than another one? Public calls, forward and backward, by one process a tree, in turn:

    python bench/cpu/in_turn.py --other /path/to/other/checkout

Each process imports its own tree's mopo_kernels and waits while the other works; who goes first changes from round to
round. Prints medians and the median and quartiles of the ratios within a round: below 1, this tree is faster.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median, quantiles

ROOT = Path(__file__).resolve().parents[2]
SIZES = {"8x32 H64 V1000": (8, 32, 64, 1000), "16x256 H512 V32768": (16, 256, 512, 32768)}  # B, L, H, V
CALLS = ("mopo_loss clone", "mopo_loss contrast", "linear_logprob sum", "linear_logprob none")
TURN = 0.1  # seconds that a turn lasts at least: short calls are repeated
MIN_ROUNDS = 3


class Worker:
    """A process that makes the calls of one tree, a line of JSON each way for every turn."""

    def __init__(self, tree: Path) -> None:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tree), str(tree / "python")])}
        command = [sys.executable, __file__, "--worker"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, cwd=tree, env=environment, **pipes)
        imported = Path(self._read())
        if not imported.is_relative_to(tree):
            sys.exit(f"in_turn: error: {tree} holds no mopo_kernels: {imported} was imported")

    def seconds(self, call: str, size: str, repeats: int) -> float:
        """Of one call, the mean of so many."""
        print(json.dumps([call, size, repeats]), file=self.process.stdin, flush=True)
        return float(self._read())

    def _read(self) -> str:
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"in_turn: error: the process of {self.process.args} ended with {self.process.wait()}")
        return line.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--other", type=Path, required=True, metavar="DIR", help="the checkout to compare with")
    parser.add_argument("--this", type=Path, default=ROOT, metavar="DIR", help="instead of the one this file is in")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--seconds", type=float, default=60, help="of a case, after which there are no more rounds")
    parser.add_argument("--size", choices=SIZES, help="one of them only")
    options = parser.parse_args()
    this, other = (Worker(tree.resolve()) for tree in (options.this, options.other))
    print(f"{'':<21}{'':<21}{'this, ms':>10}{'other, ms':>11}   ratio (quartiles)")
    for size in [options.size] if options.size else SIZES:
        for call in CALLS:
            times = rounds_of(this, other, (call, size), options)
            print(f"{call:<21}{size:<21}{summary(*times)}", flush=True)


def rounds_of(this: Worker, other: Worker, case: tuple[str, str], options: argparse.Namespace) -> list[list[float]]:
    """Seconds of either worker in every round."""
    for worker in (this, other):
        worker.seconds(*case, 1)  # warms up
    longest = max(worker.seconds(*case, 1) for worker in (this, other))
    repeats = max(1, round(TURN / longest))
    times: dict[Worker, list[float]] = {this: [], other: []}
    start = time.monotonic()
    for done in range(options.rounds):
        if done >= MIN_ROUNDS and time.monotonic() - start > options.seconds:
            break
        for worker in (this, other) if done % 2 == 0 else (other, this):
            times[worker].append(worker.seconds(*case, repeats))
    return [times[this], times[other]]


def summary(this: list[float], other: list[float]) -> str:
    ratios = [a / b for a, b in zip(this, other, strict=True)]
    low, middle, high = quantiles(ratios, n=4, method="inclusive")
    medians = f"{1e3 * median(this):10.3f}{1e3 * median(other):11.3f}"
    return f"{medians}   {middle:.3f} ({low:.3f} to {high:.3f}, {len(ratios)} rounds)"


# -------------------------------------------------------------------------------------------------------- the process


def work() -> None:
    """Answer turns until there are no more."""
    import mopo_kernels

    print(mopo_kernels.__file__, flush=True)
    calls: dict[tuple[str, str], Callable[[], None]] = {}
    for line in sys.stdin:
        call, size, repeats = json.loads(line)
        if (call, size) not in calls:
            calls = {(call, size): prepare(call, *SIZES[size])}  # one at a time: memory
        start = time.perf_counter()
        for _ in range(repeats):
            calls[call, size]()
        print((time.perf_counter() - start) / repeats, flush=True)


def prepare(call: str, sequences: int, length: int, hidden_size: int, vocab: int) -> Callable[[], None]:
    import torch

    from mopo_kernels import linear_logprob, mopo_loss

    torch.manual_seed(0)
    hidden = torch.randn(sequences, length, hidden_size, requires_grad=True)
    weight = (torch.randn(vocab, hidden_size) / hidden_size**0.5).requires_grad_()
    target = torch.randint(vocab, (sequences, length))
    labels = torch.rand(sequences, 2), torch.arange(sequences) // 4, torch.ones(2)
    op, option = call.split()
    if op == "mopo_loss":
        options = {"tau": 0.5, "policy_step": option, "ref_logp": torch.full((sequences,), -float(length))}
        loss = partial(mopo_loss, hidden, weight, target, *labels, **options)
    else:
        loss = partial(linear_logprob, hidden, weight, target, reduction=option)

    def run() -> None:
        found = loss()
        (found.loss if op == "mopo_loss" else found.sum()).backward()
        hidden.grad = weight.grad = None

    return run


if __name__ == "__main__":
    work() if sys.argv[1:] == ["--worker"] else main()
