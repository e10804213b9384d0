"""How fast are the products of an LM head by rows and columns of a block? What the CPU planner's constants stand on.

    python -m bench.cpu.products > bench/results/cpu/products.md

GFLOP/s, medians of three rounds in turn: logits of C columns at a time, the gradient of hidden, weight's added to.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor

HEADS = ((512, 32768), (576, 49152), (2048, 65536))  # H, V
ROWS = (64, 128, 256, 512, 1024)
COLUMNS = (1024, 2048, 4096, 8192)
ROUNDS = 3


def main() -> None:
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, float32\n")
    print(f"| H, V | rows | product | {' | '.join(map(str, COLUMNS))} | all |")
    print("|---|--:|---|" + "--:|" * (len(COLUMNS) + 1))
    for hidden_size, vocab in HEADS:
        for rows in ROWS:
            for name, speeds in measure(rows, hidden_size, vocab).items():
                cells = [f"{hidden_size}, {vocab}", str(rows), name, *(f"{speed:.0f}" for speed in speeds)]
                print(f"| {' | '.join(cells)} |", flush=True)


def measure(rows: int, hidden_size: int, vocab: int) -> dict[str, list[float]]:
    hidden, weight, tile = (torch.randn(*shape) for shape in ((rows, hidden_size), (vocab, hidden_size), (rows, vocab)))
    grad_hidden, grad_weight = torch.zeros_like(hidden), torch.zeros_like(weight)
    calls: dict[str, Callable[[slice], Tensor]] = {
        "logits": lambda block: torch.mm(hidden, weight[block].t(), out=tile[:, block]),
        "grad_hidden": lambda block: grad_hidden.addmm_(tile[:, block], weight[block]),
        "grad_weight": lambda block: grad_weight[block].addmm_(tile[:, block].t(), hidden),
    }
    seconds: dict[tuple[str, int], list[float]] = {(name, c): [] for name in calls for c in (*COLUMNS, vocab)}
    for _ in range(ROUNDS):
        for (name, columns), found in seconds.items():
            start = time.perf_counter()
            for first in range(0, vocab, columns):
                calls[name](slice(first, first + columns))
            found.append(time.perf_counter() - start)
    work = 2e-9 * rows * hidden_size * vocab
    return {name: [work / median(seconds[name, c]) for c in (*COLUMNS, vocab)] for name in calls}


if __name__ == "__main__":
    main()
