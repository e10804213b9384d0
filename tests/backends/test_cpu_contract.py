"""The shared checks of fold_contract.py on the CPU backend, each instruction set; 16 bits narrowed and widened."""

import itertools
import math

import fold_contract
import pytest
import torch
from fold_truth import DTYPES, TRANSFORMS
from hypothesis import given, settings
from hypothesis import strategies as st
from test_fold import ISAS, isa

from mopo_kernels.backends.fold import Statistics, Tile, Transform
from mopo_kernels.backends.native import cpu

pytestmark = pytest.mark.skipif(bool(cpu.UNAVAILABLE), reason=cpu.UNAVAILABLE)
__all__ = ["isa"]  # a fixture


@settings(max_examples=120, deadline=None)
@given(name=st.sampled_from(ISAS), **fold_contract.tile_strategies(rows=5, widths=[1, 7, 8, 16, 17, 100, 1025]))
def test_ragged_tiles_at_any_alignment_in_place_and_beside(name, **case):
    if not cpu.module.isa_supported(name):
        return
    before = cpu.module.isa()
    cpu.module.choose_isa(name)
    try:
        fold_contract.check_tiles(cpu, "cpu", **case)
    finally:
        cpu.module.choose_isa(before)


@settings(max_examples=120, deadline=None)
@given(name=st.sampled_from(ISAS), **fold_contract.sampled_strategies(rows=4, widths=[1, 7, 32, 64, 100, 1025]))
def test_samples_of_ragged_tiles(name, **case):
    if not cpu.module.isa_supported(name):
        return
    before = cpu.module.isa()
    cpu.module.choose_isa(name)
    try:
        fold_contract.check_samples(cpu, "cpu", **case)
    finally:
        cpu.module.choose_isa(before)


def test_sampling_is_unbiased(isa):
    for dtype, transform in itertools.product(DTYPES, TRANSFORMS):
        fold_contract.check_sampling_is_unbiased(cpu, "cpu", dtype, transform)


def test_extreme_samples_and_products(isa):
    fold_contract.check_extreme_samples(cpu, "cpu")
    for dtype in DTYPES:
        fold_contract.check_sample_products(cpu, "cpu", dtype)


def test_special_logits_and_rows(isa):
    fold_contract.check_special_logits(cpu, "cpu")
    fold_contract.check_masked_tokens(cpu, "cpu")
    for column in (0, 8, 16, 36):
        fold_contract.check_bad_logits(cpu, "cpu", math.nan, column, 37)
        fold_contract.check_bad_logits(cpu, "cpu", math.inf, column, 37)
    for dtype in DTYPES:
        fold_contract.check_rows_that_do_not_count(cpu, "cpu", 37, dtype)
    fold_contract.check_long_rows_of_one_block(cpu, "cpu", 3000)


def test_accuracy_of_a_large_vocabulary(isa):
    logits = torch.randn(4, 151_937, generator=torch.Generator().manual_seed(0)) * 4
    fold_contract.check_accuracy(cpu, "cpu", logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_results_of_16_bits_are_rounded_as_torch_rounds(isa, dtype):
    """To the nearest, ties to even; NaN, infinities and subnormal numbers too. A target of probability 0 shows them."""
    ties = 1 + (2 * torch.arange(8.0) + 1) * torch.finfo(dtype).eps / 2  # half way between neighbours
    odd = [math.nan, math.inf, -math.inf, 65519.0, 65520.0, 1e30, 6e-8, -3e-8, 1e-40, 5e-5]
    values = torch.cat([ties, -ties, torch.tensor(odd), torch.randn(30, generator=torch.Generator().manual_seed(0))])
    columns = len(values)
    tile = torch.full((columns, columns), -math.inf, dtype=dtype)
    lse = torch.full((columns,), 100.0, dtype=torch.float64)
    cpu.fold_gradient(Tile(tile, torch.arange(columns), Transform.of(1.0)), lse, values.double(), tile)
    assert torch.equal(tile.diagonal().isnan(), values.isnan())
    assert torch.equal(tile.diagonal().nan_to_num(7), values.to(dtype).nan_to_num(7))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_logit_is_read_exactly(isa, dtype):
    logits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    logits = logits[logits.isfinite() & (logits.float().abs() < 2.0**40)]
    rows = logits[: len(logits) // 32 * 32].reshape(-1, 32)  # wide enough for whole vectors of any instruction set
    statistics = Statistics.start(len(rows), rows.device)
    scale = Transform.of(1.0, None, 2.0**24)  # the smallest subnormal number of float16 is 1
    cpu.fold_statistics(Tile(rows, torch.zeros(len(rows), dtype=torch.int64), scale), statistics)
    assert torch.equal(statistics.maximum.float(), (rows.float() * 2.0**24).amax(1))
    assert torch.equal(statistics.chosen.float(), rows[:, 0].float() * 2.0**24)
