"""How do time and memory grow with rows, with the vocabulary, with the share of rows that count?"""

import pytest
import torch
from bench_head import inputs
from contest import forward_and_backward, hold
from peers import HEADS

NAMES = ["mopo, sum", "mopo, per row", "eager", "CCE torch_compile"]
H = 512
CASES = (  # what grows, N, V, share of rows that count
    [("rows", n, 16384, 1.0) for n in (512, 1024, 2048, 4096)]
    + [("vocabulary", 1024, v, 1.0) for v in (8192, 16384, 32768, 65536)]
    + [("share of rows that count", 2048, 16384, share) for share in (0.125, 0.25, 0.5, 1.0)]
)


@pytest.mark.parametrize(("axis", "n", "v", "share"), CASES)
def bench_scaling(benchmark, axis, n, v, share):
    hidden, weight, target = inputs(n, H, v, torch.float32)
    target[torch.arange(n) >= share * n] = -100
    target = target[torch.randperm(n, generator=torch.Generator().manual_seed(1))]
    runs = {name: forward_and_backward(HEADS[name], hidden, weight, target) for name in NAMES}
    hold(benchmark, runs, group=f"against {axis}", axis=axis, share=share, N=n, H=H, V=v)
