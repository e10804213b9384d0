"""How do time and memory grow with rows, with the vocabulary, with the share of rows that count?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from bench import harness, peers
from mopo_kernels.measure.workloads import Sizes, head_inputs

LOSSES = {name: peers.OURS[name] for name in ("mopo, sum", "mopo, per row")} | {"eager": peers.eager} | peers.CPU_HEADS
H = 512
CASES = (  # what grows, N, V, share of rows that count
    [("rows", n, 16384, 1.0) for n in (512, 1024, 2048, 4096)]
    + [("vocabulary", 1024, v, 1.0) for v in (8192, 16384, 32768, 65536)]
    + [("share of rows that count", 2048, 16384, share) for share in (0.125, 0.25, 0.5, 1.0)]
)


def entries() -> Iterator[dict[str, Any]]:
    contestants = {name: harness.pass_of(loss) for name, loss in LOSSES.items()}
    for axis, n, v, share in CASES:
        hidden, weight, target = head_inputs(Sizes(n, H, v, torch.float32, harness.CPU))
        target[torch.randperm(n)[int(share * n) :]] = -100
        sizes = {"N": n, "H": H, "V": v}
        yield harness.entry(f"against {axis}", contestants, (hidden, weight, target), axis=axis, share=share, **sizes)
