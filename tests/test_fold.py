"""The fold kernels of the CPU backend, each instruction set against float64 torch: values, tails, poison, threads."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mopo_kernels.backends import cpu
from mopo_kernels.backends.fold import Statistics, Transform

pytestmark = pytest.mark.skipif(bool(cpu.UNAVAILABLE), reason=cpu.UNAVAILABLE)

ISAS = ["portable", "avx2", "avx512"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
TRANSFORMS = [  # plain; all scales at once; with a softcap that bites
    Transform.of(1.0, None),
    Transform.of(0.7, None, 1.5),
    Transform.of(0.7, 5.0, 1.5),
]
ULP = {torch.float32: 2**-23, torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float64: 2**-52}


@pytest.fixture(params=ISAS)
def isa(request):
    if not cpu._cpu.isa_supported(request.param):
        pytest.skip(f"this CPU has no {request.param}")
    before = cpu._cpu.isa()
    cpu._cpu.choose_isa(request.param)
    yield request.param
    cpu._cpu.choose_isa(before)


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
    y = elementwise(cpu._cpu.exp, x)
    representable = exact.float().isfinite()
    assert torch.equal(y.isfinite(), representable)
    assert ulps(y, exact)[representable].max() <= 2


def test_exp_of_special_values(isa):
    x = torch.tensor([-math.inf, math.inf, math.nan, 0.0, -0.0, -1e30, 1e30])
    y = elementwise(cpu._cpu.exp, x)
    torch.testing.assert_close(y, torch.tensor([0, math.inf, math.nan, 1, 1, 0, math.inf]), equal_nan=True)


def test_tanh_is_within_two_ulp(isa):
    x = torch.cat([torch.linspace(-12, 12, 500_001), torch.logspace(-30, 1, 10_001), torch.tensor([0.0, 50.0, -50.0])])
    assert ulps(elementwise(cpu._cpu.tanh, x), x.double().tanh()).max() <= 2
    special = elementwise(cpu._cpu.tanh, torch.tensor([math.inf, -math.inf, math.nan]))
    torch.testing.assert_close(special, torch.tensor([1.0, -1.0, math.nan]), equal_nan=True)


def exact_fold(logits, target, coefficient, transform, bias):
    """lse, z at the target, probabilities and gradient in float64."""
    x = logits.double() if bias is None else logits.double() + bias.double()
    u = transform.inner * x
    z = transform.outer * u.tanh() if transform.softcap else u
    lse = z.logsumexp(-1)
    p = (z - lse[:, None]).exp()
    slope = transform.inner * (transform.outer * (1 - u.tanh() ** 2) if transform.softcap else 1)
    onehot = torch.zeros_like(z).scatter(1, target[:, None], 1.0)
    return lse, z.gather(1, target[:, None])[:, 0], p, coefficient[:, None] * (onehot - p) * slope


def fold_in_tiles(logits, target, coefficient, transform, bias, widths):
    """Statistics over tiles of these widths, in any order, then the gradient in place."""
    statistics = Statistics.start(len(target), logits.device)
    edges = [0, *np.cumsum(widths).tolist()]
    slices = [slice(a, b) for a, b in itertools.pairwise(edges)]
    for columns in reversed(slices):
        part = None if bias is None else bias[columns]
        options = {"first_column": columns.start, "bias": part}
        cpu.fold_statistics(logits[:, columns], target, statistics, transform, **options)
    lse = statistics.lse
    for columns in slices:
        part = None if bias is None else bias[columns]
        options = {"first_column": columns.start, "bias": part}
        cpu.fold_gradient(logits[:, columns], target, lse, coefficient, transform, **options)
    return statistics


@settings(max_examples=120, deadline=None)
@given(
    rows=st.integers(1, 7),
    widths=st.lists(
        st.sampled_from([1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 100, 1023, 1024, 1025]), min_size=1, max_size=3
    ),
    padding=st.integers(0, 5),
    dtype=st.sampled_from(DTYPES),
    transform=st.sampled_from(TRANSFORMS),
    with_bias=st.booleans(),
    scale=st.sampled_from([0.1, 1.0, 30.0]),
    isa=st.sampled_from(ISAS),
    seed=st.integers(0, 10**6),
)
def test_ragged_tiles(rows, widths, padding, dtype, transform, with_bias, scale, isa, seed):
    if not cpu._cpu.isa_supported(isa):
        return
    before = cpu._cpu.isa()
    cpu._cpu.choose_isa(isa)
    try:
        check_tiles(rows, widths, padding, dtype, transform, with_bias, scale, seed)
    finally:
        cpu._cpu.choose_isa(before)


def check_tiles(rows, widths, padding, dtype, transform, with_bias, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    columns = sum(widths)
    wide = torch.full((rows, columns + padding), math.nan, dtype=dtype)  # poison around the tile
    logits = wide[:, :columns]
    logits.copy_(torch.randn(rows, columns, generator=generator) * scale)
    target = torch.randint(0, columns, (rows,), generator=generator)
    coefficient = torch.randn(rows, generator=generator, dtype=torch.float64)
    work = torch.float64 if dtype == torch.float64 else torch.float32
    bias = torch.randn(columns, generator=generator).to(work) if with_bias else None
    lse, at_target, p, gradient = exact_fold(logits, target, coefficient, transform, bias)

    statistics = fold_in_tiles(logits, target, coefficient, transform, bias, widths)

    # Arithmetic of a handful of roundings on values of the size of z; p feels the rounding of z absolutely.
    largest = (at_target.abs().max() + lse.abs().max() + 1).item()
    rounding = ULP[work] * 4 * largest * max(1, transform.inner * transform.outer)
    torch.testing.assert_close(statistics.lse, lse, rtol=0, atol=rounding)
    torch.testing.assert_close(statistics.target, at_target, rtol=0, atol=rounding)
    slope = transform.inner * transform.outer
    bound = coefficient.abs()[:, None] * slope * (p + 1e-30) * rounding * 2 + gradient.abs() * ULP[dtype]
    bound += coefficient.abs()[:, None] * slope * rounding * (gradient != 0)
    bound += torch.finfo(dtype).tiny * 2  # results below the smallest normal number
    assert ((logits.double() - gradient).abs() <= bound).all()
    assert wide[:, columns:].isnan().all()


def test_masked_vocabulary_and_huge_logits(isa):
    """−inf logits have probability 0, also in whole tiles and before the first finite one; 1e30 does not overflow."""
    logits = torch.full((4, 40), -math.inf)
    logits[0, 35] = 1.0
    logits[1, :] = torch.randn(40)
    logits[2, 5], logits[2, 30] = 1e30, -1e30
    logits[3, 2:4] = -12345.25
    target = torch.tensor([35, 3, 5, 2])
    p = logits.double().softmax(-1)
    statistics = fold_in_tiles(logits, target, torch.ones(4).double(), TRANSFORMS[0], None, [16, 16, 8])
    expected = torch.tensor([0.0, p[1, 3].log(), 0.0, math.log(0.5)], dtype=torch.float64)
    torch.testing.assert_close(statistics.logp, expected, atol=1e-6, rtol=0)
    onehot = torch.zeros_like(p).scatter(1, target[:, None], 1.0)
    torch.testing.assert_close(logits.double(), onehot - p, atol=1e-6, rtol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_infinity_are_not_swallowed(isa, bad):
    for column in (0, 7, 16, 36):
        logits = torch.full((1, 37), -math.inf)
        logits[0, column] = bad
        statistics = Statistics.start(1, logits.device)
        cpu.fold_statistics(logits, torch.tensor([3]), statistics, TRANSFORMS[0])
        assert statistics.logp.isnan().all()


def test_rows_of_coefficient_zero_become_zero_and_rows_without_target_are_skipped(isa):
    logits = torch.full((2, 19), math.nan)
    statistics = Statistics.start(2, logits.device)
    cpu.fold_statistics(logits, torch.tensor([-1, -1]), statistics, TRANSFORMS[0])
    assert (statistics.sum == 0).all()
    cpu.fold_gradient(logits, torch.tensor([3, -1]), statistics.sum, torch.zeros(2).double(), TRANSFORMS[0])
    assert (logits == 0).all()


def test_peaks_are_the_largest_probability_of_each_block(isa):
    logits = torch.randn(9, 50)
    lse = logits.double().logsumexp(-1)
    p = (logits.double() - lse[:, None]).exp()
    peaks = cpu.fold_peaks(logits, lse, TRANSFORMS[0], block=8)
    expected = torch.stack([torch.stack([b.amax() for b in rows.split(8, 1)]) for rows in p.split(8)])
    torch.testing.assert_close(peaks, expected, rtol=1e-6, atol=0)


def test_zero_rows_and_zero_columns(isa):
    for shape in [(0, 5), (3, 0), (0, 0)]:
        statistics = Statistics.start(shape[0], torch.device("cpu"))
        target = torch.zeros(shape[0], dtype=torch.int64)
        cpu.fold_statistics(torch.empty(shape), target, statistics, TRANSFORMS[0])
        cpu.fold_gradient(torch.empty(shape), target, statistics.sum, statistics.sum, TRANSFORMS[0])
        assert (statistics.sum == 0).all()


def test_runs_and_thread_counts_give_the_same_bits(isa):
    logits, target = torch.randn(33, 2100), torch.randint(0, 2100, (33,))
    coefficient = torch.randn(33, dtype=torch.float64)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            tile = logits.clone()
            statistics = fold_in_tiles(tile, target, coefficient, TRANSFORMS[2], None, [2100])
            results.append((tile, statistics.lse))
    finally:
        torch.set_num_threads(threads)
    for tile, lse in results[1:]:
        assert torch.equal(tile, results[0][0])
        assert torch.equal(lse, results[0][1])


def test_the_binding_refuses_what_the_kernels_cannot_take():
    tile = torch.zeros(2, 3)
    per_row = torch.zeros(2, dtype=torch.float64)
    with pytest.raises(ValueError, match="int32"):
        cpu.fold_gradient(tile.int(), torch.zeros(2, dtype=torch.int64), per_row, per_row, TRANSFORMS[0])
    with pytest.raises(ValueError, match="overlap"):
        cpu.fold_peaks(tile[:1].expand(2, 3), per_row, TRANSFORMS[0], block=8)
    with pytest.raises(ValueError, match="sse9"):
        cpu._cpu.choose_isa("sse9")
