"""How long does the exact dual take on a data set of a million pairs with four objectives?

Hard labels leave few different groups, which are solved once each; lag weights leave none alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bench import harness
from mopo_kernels import DualSolution, solve_dual, win_rate_from_pairs
from mopo_kernels.measure.workloads import TAU

PAIRS = 1_000_000
THRESHOLDS = [0.5, 0.55, 0.5]  # all three bind; attainable at either eps


def entries() -> Iterator[dict[str, Any]]:
    for kind in ("hard", "unlabelled", "lag"):
        win_rate = win_rate_from_pairs(conflicting_pairs(PAIRS, unlabelled=0.1 if kind == "unlabelled" else 0.0))
        generator = torch.Generator().manual_seed(1)
        lag = 0.1 * torch.randn(2 * PAIRS, generator=generator, dtype=torch.float64) if kind == "lag" else None
        for eps in (0.0, 0.01):
            yield solved(f"solve_dual {kind} eps={eps}", win_rate, eps, lag)


def conflicting_pairs(num_pairs: int, *, unlabelled: float) -> Tensor:
    """Hard labels [P, 4] of three secondaries that lean against the primary."""
    generator = torch.Generator().manual_seed(0)
    quality = torch.randn(num_pairs, 4, generator=generator, dtype=torch.float64)
    quality[:, 1:] -= 0.3 * quality[:, :1]
    preference = (quality > 0).double()
    preference[torch.rand(num_pairs, 4, generator=generator) < unlabelled] = torch.nan
    return preference


def solved(name: str, win_rate: Tensor, eps: float, lag: Tensor | None) -> dict[str, Any]:
    group = torch.arange(PAIRS).repeat(2)
    found: list[DualSolution] = []

    def solve() -> None:
        found[:] = [solve_dual(win_rate, group, THRESHOLDS, tau=TAU, eps=eps, lag_log_ratio=lag)]

    entry = harness.entry(name, {"solve_dual": lambda: solve})
    (solution,) = found
    slack = solution.lower_bounds[1:] - torch.tensor(THRESHOLDS, dtype=torch.float64)
    residual = torch.minimum(solution.multipliers[1:], slack).abs().max().item()
    if residual > 1e-8:
        raise RuntimeError(f"{name} is not solved: the conditions of optimality are off by {residual:.1e}")
    entry["extra_info"] |= {"residual": residual, "iterations": solution.iterations}
    return entry
