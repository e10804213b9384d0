"""How much faster is an LM head with sampled gradients than with exact ones and than the peers, trained and frozen?

Contestants take turns at one size, dtype and kind of head. Sizes come with growing work, and who took all patience at
one sits out the larger ones: on a CPU without instructions for 16 bits most peers multiply them at a fiftieth of the
speed of 32. The bound is one product, that of the logits in the blocks that the planner chooses, in float32.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bench import harness, peers
from bench.cpu import head
from mopo_kernels.head.plan import CPU_COLUMNS
from mopo_kernels.measure.roofline import Run
from mopo_kernels.measure.workloads import Sizes, head_inputs

SIZES = head.SIZES | {"1024x2048x151936": (1024, 2048, 151936)}  # Qwen 2.5 3B
OURS = ("mopo, sampled 1/64", "mopo, sum", "mopo, per row")
LIMITS = harness.ON_CPU._replace(patience=60)


def entries() -> Iterator[dict[str, Any]]:
    for (dtype_name, dtype), kind in itertools.product(head.DTYPES.items(), ("trained", "frozen")):
        sits_out: dict[str, str] = {}
        for size, (n, h, v) in SIZES.items():
            inputs = head_inputs(Sizes(n, h, v, dtype, harness.CPU))
            losses = {name: peers.OURS[name] for name in OURS} | peers.heads() | peers.CPU_HEADS
            contestants = {
                name: harness.pass_of(loss if kind == "trained" else frozen(loss))
                for name, loss in losses.items()
                if name not in sits_out
            }
            contestants[f"{head.CEILING}: the logits'"] = logits_alone
            found = harness.entry(
                f"sampled, {kind} head {size} {dtype_name}", contestants, inputs, LIMITS, N=n, H=h, V=v
            )
            info = found["extra_info"]
            info["errors"] |= sits_out
            took = {name: rounds[0] for name, rounds in info["seconds"].items() if len(rounds) == 1}
            sits_out |= {name: f"not run: took {seconds:.0f} s at {size}" for name, seconds in took.items()}
            yield found


def frozen(loss: peers.Loss) -> peers.Loss:
    return lambda hidden, weight, target: loss(hidden, weight.detach(), target)


def logits_alone(hidden: Tensor, weight: Tensor, target: Tensor) -> Run:
    rows = head.our_rows(hidden, weight, target)
    hidden, weight = hidden.detach().float(), weight.detach().float()
    tile = torch.empty(rows, len(weight))

    def run() -> None:
        for block in hidden.split(rows):
            for panel, columns in zip(weight.split(CPU_COLUMNS), tile[: len(block)].split(CPU_COLUMNS, 1), strict=True):
                torch.mm(block, panel.t(), out=columns)

    return run
