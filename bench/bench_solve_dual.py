"""How long the exact dual takes on a data set of a million pairs with four objectives.

Hard labels leave few different groups, which are solved once each; lag weights leave none alike. Run by `make bench`.
"""

import pytest
import torch

from mopo_kernels import solve_dual, win_rate_from_pairs

PAIRS = 1_000_000
THRESHOLDS = [0.5, 0.55, 0.5]  # all three bind; attainable at either eps


def conflicting_pairs(num_pairs: int, *, unlabelled: float) -> torch.Tensor:
    """Hard labels [P, 4] of three secondaries that lean against the primary."""
    generator = torch.Generator().manual_seed(0)
    quality = torch.randn(num_pairs, 4, generator=generator, dtype=torch.float64)
    quality[:, 1:] -= 0.3 * quality[:, :1]
    preference = (quality > 0).double()
    preference[torch.rand(num_pairs, 4, generator=generator) < unlabelled] = torch.nan
    return preference


@pytest.mark.parametrize("eps", [0.0, 0.01])
@pytest.mark.parametrize("kind", ["hard", "unlabelled", "lag"])
def bench_solve_dual(benchmark, kind, eps):
    win_rate = win_rate_from_pairs(conflicting_pairs(PAIRS, unlabelled=0.1 if kind == "unlabelled" else 0.0))
    group = torch.arange(PAIRS).repeat(2)
    generator = torch.Generator().manual_seed(1)
    lag = 0.1 * torch.randn(2 * PAIRS, generator=generator, dtype=torch.float64) if kind == "lag" else None

    def solve():
        return solve_dual(win_rate, group, THRESHOLDS, tau=0.08, eps=eps, lag_log_ratio=lag)

    solution = benchmark.pedantic(solve, rounds=1 if kind == "lag" else 5, warmup_rounds=1)
    slack = solution.lower_bounds[1:] - torch.tensor(THRESHOLDS, dtype=torch.float64)
    residual = torch.minimum(solution.multipliers[1:], slack).abs().max().item()
    benchmark.extra_info |= {"residual": residual, "iterations": solution.iterations}
    assert residual <= 1e-8
