"""How far is the LM head's forward and backward from the matrix products alone, and how do the peers fare?"""

import pytest
import torch
from contest import forward_and_backward, hold
from mopo_kernels.head_ops import plan_for
from mopo_kernels.plan import CPU_WORKSPACE
from peers import HEADS

SIZES = {  # N, H, V
    "2048x512x32768": (2048, 512, 32768),
    "2048x576x49152": (2048, 576, 49152),  # SmolLM2-135M
    "256x2048x128256": (256, 2048, 128256),  # Llama 3 1B
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CEILING = "products alone"
TWICE = "the products, logits formed twice"  # the bound of what knows neither coefficients nor has memory for logits


def inputs(n, h, v, dtype):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, h, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(v, h, generator=generator) / h**0.5).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, v, (n,), generator=generator)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def bench_head(benchmark, size, dtype):
    n, h, v = SIZES[size]
    tensors = inputs(n, h, v, DTYPES[dtype])
    runs = {name: forward_and_backward(function, *tensors) for name, function in HEADS.items()}
    # 16-bit products are the machine's slowest where it has no instructions for them, so the ceiling is float32's.
    hidden, weight = (x.detach().float() for x in tensors[:2])
    for rows in (256, 512):
        for columns in (8192, v):
            if rows <= n:
                runs[f"{CEILING}, {rows} x {columns}"] = products_alone(hidden, weight, rows, columns)
    runs[TWICE] = products_alone(hidden, weight, min(n, 512), v, logits=2)
    ours = plan_for(slice(0, n), tensors[1], "cpu", CPU_WORKSPACE, "fused").row_block
    runs[f"the products in our {ours} rows"] = products_alone(hidden, weight, ours, v)  # what 64 MiB have room for
    hold(benchmark, runs, group=f"head {size} {dtype}", N=n, H=h, V=v)


def products_alone(hidden, weight, rows, columns, logits=1):
    """The ceiling: logits, grad_hidden and grad_weight of blocks of rows × columns, with nothing between them."""
    (n, h), v = hidden.shape, len(weight)
    tile = torch.empty(rows, v).normal_(std=1e-3)
    grad_hidden, grad_weight = torch.empty(rows, h), torch.empty_like(weight)
    blocks = [slice(first, min(first + columns, v)) for first in range(0, v, columns)]

    def run():
        for first in range(0, n, rows):
            block = hidden[first : first + rows]
            part, grad_part = tile[: len(block)], grad_hidden[: len(block)]
            for c in blocks * logits:
                torch.mm(block, weight[c].t(), out=part[:, c])
            for c in blocks:
                grad_part.addmm_(part[:, c], weight[c], beta=0 if c.start == 0 else 1)
                grad_weight[c].addmm_(part[:, c].t(), block, beta=0 if first == 0 else 1)

    return run
