"""How far is the LM head's forward and backward from the matrix products alone, and how do the peers fare?"""

import pytest
import torch
from memory import measure
from peers import HEADS

SIZES = {  # N, H, V
    "2048x512x32768": (2048, 512, 32768),
    "2048x576x49152": (2048, 576, 49152),  # SmolLM2-135M
    "256x2048x128256": (256, 2048, 128256),  # Llama 3 1B
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ROUNDS = 5


def inputs(n, h, v, dtype):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, h, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(v, h, generator=generator) / h**0.5).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, v, (n,), generator=generator)


def forward_and_backward(function, hidden, weight, *others):
    def run():
        function(hidden, weight, *others).backward()
        hidden.grad = weight.grad = None

    return run


def record(benchmark, run, n, h, v, dtype):
    benchmark.extra_info |= {"N": n, "H": h, "V": v, "dtype": str(dtype), "threads": torch.get_num_threads()}
    run()
    benchmark.pedantic(run, rounds=ROUNDS, iterations=1)
    if benchmark.enabled:
        benchmark.extra_info["peak_bytes"], _ = measure(run)


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def bench_head(benchmark, size, dtype, name):
    n, h, v = SIZES[size]
    benchmark.group = f"head {size} {dtype}"
    run = forward_and_backward(HEADS[name], *inputs(n, h, v, DTYPES[dtype]))
    record(benchmark, run, n, h, v, DTYPES[dtype])


@pytest.mark.parametrize("rows", [128, 256, 512])
@pytest.mark.parametrize("columns", [8192, None], ids=["8192 columns", "all columns"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def bench_products_alone(benchmark, size, dtype, columns, rows):
    """The ceiling: logits, grad_hidden and grad_weight of blocks of rows × columns, with nothing between them."""
    n, h, v = SIZES[size]
    if rows > n:
        pytest.skip("fewer rows than that")
    hidden, weight, _ = (x.detach() for x in inputs(n, h, v, DTYPES[dtype]))
    tile = torch.empty(rows, v, dtype=hidden.dtype)
    grad_hidden, grad_weight = torch.empty(rows, h, dtype=hidden.dtype), torch.empty_like(weight)
    blocks = [slice(c, min(c + (columns or v), v)) for c in range(0, v, columns or v)]

    def run():
        for first in range(0, n, rows):
            block = hidden[first : first + rows]
            for c in blocks:
                torch.mm(block, weight[c].t(), out=tile[:, c])
            for c in blocks:
                grad_hidden.addmm_(tile[:, c], weight[c], beta=0 if c.start == 0 else 1)
                grad_weight[c].addmm_(tile[:, c].t(), block, beta=0 if first == 0 else 1)

    benchmark.group = f"head {size} {dtype}"
    tile.normal_(std=1e-3)
    record(benchmark, run, n, h, v, DTYPES[dtype])
