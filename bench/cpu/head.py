"""How far is the LM head's forward and backward from the matrix products alone, and how do the peers fare?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bench import harness, peers
from mopo_kernels.head.call import HeadCall, HeadInputs
from mopo_kernels.head.plan import plan_for
from mopo_kernels.measure.roofline import Run
from mopo_kernels.measure.workloads import Sizes, head_inputs

SIZES = {  # N, H, V
    "2048x512x32768": (2048, 512, 32768),
    "2048x576x49152": (2048, 576, 49152),  # SmolLM2-135M
    "256x2048x128256": (256, 2048, 128256),  # Llama 3 1B
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CEILING = "products alone"
TWICE = "the products, logits formed twice"  # the bound of what knows neither coefficients nor has memory for logits


def entries() -> Iterator[dict[str, Any]]:
    for dtype_name, dtype in DTYPES.items():
        for size, (n, h, v) in SIZES.items():
            inputs = head_inputs(Sizes(n, h, v, dtype, harness.CPU))
            losses = peers.OURS | peers.heads() | peers.CPU_HEADS
            contestants = {name: harness.pass_of(loss) for name, loss in losses.items()} | ceilings(*inputs)
            yield harness.entry(f"head {size} {dtype_name}", contestants, inputs, N=n, H=h, V=v)


def ceilings(hidden: Tensor, weight: Tensor, target: Tensor) -> dict[str, Callable[..., Run]]:
    """Products in blocks of several sizes, and in those that 64 MiB have room for.

    16-bit products are the machine's slowest where it has no instructions for them, so the ceiling is float32's.
    """
    n, v, ours = len(hidden), len(weight), our_rows(hidden, weight, target)
    blocks = {
        f"{CEILING}, {rows} x {columns}": (rows, columns, 1)
        for rows in (256, 512)
        for columns in (8192, v)
        if rows <= n
    }
    blocks |= {TWICE: (min(n, 512), v, 2), f"the products in our {ours} rows": (ours, v, 1)}
    hidden, weight = hidden.detach().float(), weight.detach().float()
    return {name: lambda *_, block=block: products_alone(hidden, weight, *block) for name, block in blocks.items()}


def our_rows(hidden: Tensor, weight: Tensor, target: Tensor) -> int:
    """Of a block, as the planner has it by default."""
    call = HeadCall.of(temperature=1.0, ignore_index=-100)
    return plan_for(HeadInputs(hidden, weight, None, target), slice(0, len(hidden)), call, "fused").row_block


def products_alone(hidden: Tensor, weight: Tensor, rows: int, columns: int, logits: int) -> Run:
    """Logits, grad_hidden and grad_weight of blocks of rows × columns, with nothing between them."""
    (n, h), v = hidden.shape, len(weight)
    tile = torch.empty(rows, v).normal_(std=1e-3)
    grad_hidden, grad_weight = torch.empty(rows, h), torch.empty_like(weight)
    blocks = [slice(first, min(first + columns, v)) for first in range(0, v, columns)]

    def run() -> None:
        for first in range(0, n, rows):
            block = hidden[first : first + rows]
            part, grad_part = tile[: len(block)], grad_hidden[: len(block)]
            for c in blocks * logits:
                torch.mm(block, weight[c].t(), out=part[:, c])
            for c in blocks:
                grad_part.addmm_(part[:, c], weight[c], beta=0 if c.start == 0 else 1)
                grad_weight[c].addmm_(part[:, c].t(), block, beta=0 if first == 0 else 1)

    return run
