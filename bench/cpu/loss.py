"""What does a preference loss cost over its LM head? 8 pairs × 256 tokens, the first half of each a prompt."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from bench import harness, peers
from mopo_kernels.measure.workloads import Sizes, head_inputs

PAIR_COUNT, LENGTH = 8, 256
SIZES = {"512x32768": (512, 32768), "576x49152": (576, 49152)}  # H, V


def entries() -> Iterator[dict[str, Any]]:
    n = 2 * PAIR_COUNT * LENGTH
    for size, (h, v) in SIZES.items():
        hidden, weight, target = head_inputs(Sizes(n, h, v, torch.float32, harness.CPU))
        hidden = hidden.detach().view(2 * PAIR_COUNT, LENGTH, h).requires_grad_()
        target = target.view(2 * PAIR_COUNT, LENGTH)
        target[:, : LENGTH // 2] = -100
        inputs = hidden, weight, target, torch.full((2 * PAIR_COUNT,), -1000.0)
        contestants = {name: harness.pass_of(loss) for name, loss in peers.PAIRS.items()}
        yield harness.entry(f"loss {PAIR_COUNT} pairs x {LENGTH} {size} float32", contestants, inputs, N=n, H=h, V=v)
