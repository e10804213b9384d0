"""What does a preference loss cost over its LM head? 8 pairs × 256 tokens, the first half of each a prompt."""

import pytest
import torch
from contest import forward_and_backward, hold
from peers import PAIRS

PAIR_COUNT, LENGTH = 8, 256
SIZES = {"512x32768": (512, 32768), "576x49152": (576, 49152)}  # H, V


@pytest.mark.parametrize("size", SIZES)
def bench_loss(benchmark, size):
    h, v = SIZES[size]
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2 * PAIR_COUNT, LENGTH, h, generator=generator).requires_grad_()
    weight = (torch.randn(v, h, generator=generator) / h**0.5).requires_grad_()
    target = torch.randint(0, v, hidden.shape[:2], generator=generator)
    target[:, : LENGTH // 2] = -100
    ref_logp = torch.full((2 * PAIR_COUNT,), -1000.0)
    runs = {name: forward_and_backward(function, hidden, weight, target, ref_logp) for name, function in PAIRS.items()}
    hold(benchmark, runs, group=f"loss {PAIR_COUNT} pairs x {LENGTH} {size} float32", N=target.numel(), H=h, V=v)
