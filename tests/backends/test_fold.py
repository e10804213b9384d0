"""The fold kernels of the CPU backend, each instruction set against float64 torch: values, tails, poison, threads."""

import math

import numpy as np
import pytest
import torch
from fold_truth import TRANSFORMS

from mopo_kernels.backends.fold import Statistics, Tile
from mopo_kernels.backends.native import cpu

pytestmark = pytest.mark.skipif(bool(cpu.UNAVAILABLE), reason=cpu.UNAVAILABLE)

ISAS = ["portable", "avx2", "avx512"]


@pytest.fixture(params=ISAS)
def isa(request):
    if not cpu.module.isa_supported(request.param):
        pytest.skip(f"this CPU has no {request.param}")
    before = cpu.module.isa()
    cpu.module.choose_isa(request.param)
    yield request.param
    cpu.module.choose_isa(before)


def elementwise(function, x):
    y = torch.empty_like(x)
    function(x.data_ptr(), y.data_ptr(), x.numel())
    return y


def ulps(y, exact):
    """Error in units of the last place of the float32 next to the exact value."""
    spacing = torch.from_numpy(np.spacing(exact.float().abs().clamp(max=3e38).numpy())).double()
    return (y.double() - exact).abs() / spacing


def test_exp_is_within_two_ulp_from_the_smallest_subnormal_to_overflow(isa):
    x = torch.linspace(-104.5, 89, 2_000_003)
    exact = x.double().exp()
    y = elementwise(cpu.module.exp, x)
    representable = exact.float().isfinite()
    assert torch.equal(y.isfinite(), representable)
    assert ulps(y, exact)[representable].max() <= 2


def test_exp_of_special_values(isa):
    x = torch.tensor([-math.inf, math.inf, math.nan, 0.0, -0.0, -1e30, 1e30])
    y = elementwise(cpu.module.exp, x)
    torch.testing.assert_close(y, torch.tensor([0, math.inf, math.nan, 1, 1, 0, math.inf]), equal_nan=True)


def test_tanh_is_within_two_ulp(isa):
    x = torch.cat([torch.linspace(-12, 12, 500_001), torch.logspace(-30, 1, 10_001), torch.tensor([0.0, 50.0, -50.0])])
    assert ulps(elementwise(cpu.module.tanh, x), x.double().tanh()).max() <= 2
    special = elementwise(cpu.module.tanh, torch.tensor([math.inf, -math.inf, math.nan]))
    torch.testing.assert_close(special, torch.tensor([1.0, -1.0, math.nan]), equal_nan=True)


def test_zero_rows_and_zero_columns(isa):
    for shape in [(0, 5), (3, 0), (0, 0)]:
        statistics = Statistics.start(shape[0], torch.device("cpu"))
        target = torch.zeros(shape[0], dtype=torch.int64)
        tile = Tile(torch.empty(shape), target, TRANSFORMS[0])
        cpu.fold_statistics(tile, statistics)
        cpu.fold_gradient(tile, statistics.total, statistics.total, tile.logits)
        assert (statistics.total == 0).all()


def test_runs_and_thread_counts_give_the_same_bits(isa):
    logits, target = torch.randn(33, 2100), torch.randint(0, 2100, (33,))
    coefficient = torch.randn(33, dtype=torch.float64)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            tile = Tile(logits.clone(), target, TRANSFORMS[2])
            statistics = Statistics.start(33, logits.device)
            cpu.fold_statistics(tile, statistics)
            cpu.fold_gradient(tile, statistics.lse, coefficient, tile.logits)
            results.append((tile.logits, statistics.lse))
    finally:
        torch.set_num_threads(threads)
    for tile, lse in results[1:]:
        assert torch.equal(tile, results[0][0])
        assert torch.equal(lse, results[0][1])


def test_the_binding_refuses_what_the_kernels_cannot_take():
    logits, target = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
    per_row = torch.zeros(2, dtype=torch.float64)
    with pytest.raises(KeyError, match="int32"):
        cpu.fold_gradient(Tile(logits.int(), target, TRANSFORMS[0]), per_row, per_row, logits)
    with pytest.raises(ValueError, match="overlap"):
        cpu.fold_statistics(
            Tile(logits[:1].expand(2, 3), target, TRANSFORMS[0]), Statistics.start(2, torch.device("cpu"))
        )
    with pytest.raises(ValueError, match="sse9"):
        cpu.module.choose_isa("sse9")
