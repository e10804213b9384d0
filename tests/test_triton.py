"""The Triton kernels against float64 torch, interpreted or on a GPU: the checks of fold_contract.py, with several
programs per row and several blocks per program; the objective on golden and random batches (the rest is test_batch.py).
"""

import math
import mmap
import os
import re
import subprocess
import sys
from unittest import mock

import fold_contract
import pytest
import test_batch
import test_objective
import torch
from fold_contract import fold_statistics, random_tile
from golden_cases import golden
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_fold import DTYPES, TRANSFORMS, exact_fold

from mopo_kernels.backends import reference
from mopo_kernels.backends import triton as backend

if backend.UNAVAILABLE:
    pytest.skip(backend.UNAVAILABLE, allow_module_level=True)

import triton
import triton.language as tl

from mopo_kernels.backends import triton_batch, triton_fold

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLOCK = {dtype: triton_fold.BLOCK_BYTES // max(4, dtype.itemsize) for dtype in DTYPES}  # columns
PLAIN, _, CAPPED = TRANSFORMS
PROGRAMS = [1, 3, 4096]  # wanted in all: one per row, which loops over its blocks; some; one per block

on_cpu = pytest.mark.skipif(DEVICE != "cpu", reason="a test of the interpreter")


def wanting(programs):
    return mock.patch.object(triton_fold, "ENOUGH_PROGRAMS", programs)


# -------------------------------------------------------------------------------------------------------------- fold


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 3),
    widths=st.lists(st.sampled_from([1, 2, 7, 17, 1000, 4095, 8193, 20000]), min_size=1, max_size=3),
    offset=st.sampled_from([0, 1, 9, 16]),
    padding=st.sampled_from([0, 1, 15]),
    out_offset=st.one_of(st.none(), st.integers(0, 3)),
    dtype=st.sampled_from(DTYPES),
    transform=st.sampled_from(TRANSFORMS),
    with_bias=st.booleans(),
    scale=st.sampled_from([0.1, 1.0, 30.0]),
    programs=st.sampled_from(PROGRAMS),
    seed=st.integers(0, 10**6),
)
def test_ragged_tiles_at_any_alignment(programs, **case):
    with wanting(programs):
        fold_contract.check_tiles(backend, DEVICE, **case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("programs", PROGRAMS)
@pytest.mark.parametrize("around", [-15, -1, 0, 1])
def test_around_a_whole_number_of_blocks(dtype, programs, around):
    case = {"rows": 2, "padding": 0, "dtype": dtype, "transform": TRANSFORMS[1], "scale": 3.0, "seed": around}
    for offset, out_offset in [(0, None), (5, 5), (1, 0)]:
        case |= {"widths": [3 * BLOCK[dtype] + around], "offset": offset, "out_offset": out_offset, "with_bias": True}
        with wanting(programs):
            fold_contract.check_tiles(backend, DEVICE, **case)


@pytest.mark.parametrize("programs", PROGRAMS)
@pytest.mark.parametrize(
    "logits",
    [
        pytest.param(torch.randn(2, 70001) * 3, id="normal"),
        pytest.param(torch.full((1, 262144), 0.3), id="all the same"),  # every rounding of the sum goes one way
        pytest.param(torch.linspace(-40, 30, 70001).view(1, -1), id="a new maximum in every block"),
        pytest.param(torch.linspace(30, -40, 70001).view(1, -1), id="the maximum in the first block"),
    ],
)
def test_accuracy_that_is_promised_for_float32(logits, programs):
    with wanting(programs):
        fold_contract.check_accuracy(backend, DEVICE, logits.to(DEVICE))


def test_masked_vocabulary_and_huge_logits():
    fold_contract.check_special_logits(backend, DEVICE)


def test_a_row_that_is_masked_as_a_whole_has_no_mass():
    logits = torch.full((1, 9000), -math.inf, device=DEVICE)
    statistics = fold_statistics(backend, logits, torch.tensor([3], device=DEVICE), PLAIN, None, [4500, 4500])
    assert statistics.sum.item() == 0
    assert statistics.lse.item() == statistics.target.item() == -math.inf


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("programs", PROGRAMS)
def test_nan_and_infinity_are_not_swallowed(bad, programs):
    with wanting(programs):
        for column in (0, 7, 4100, 9000):
            fold_contract.check_bad_logits(backend, DEVICE, bad, column, 9001)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [19, 9001])
def test_rows_that_do_not_count_are_skipped_or_become_zero(columns, dtype):
    fold_contract.check_rows_that_do_not_count(backend, DEVICE, columns, dtype)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 20),
    columns=st.sampled_from([1, 50, 127, 128, 129, 300]),
    block=st.sampled_from([1, 8, 33, 128, 200]),
    dtype=st.sampled_from(DTYPES),
    transform=st.sampled_from(TRANSFORMS),
    offset=st.integers(0, 3),
    with_bias=st.booleans(),
)
def test_peaks_are_the_largest_probability_of_each_block(rows, columns, block, **case):
    assume(rows * columns <= 200 * block**2)
    fold_contract.check_peaks(backend, DEVICE, rows=rows, columns=columns, block=block, **case)


def test_zero_rows_and_zero_columns():
    for shape in [(0, 5), (3, 0), (0, 0)]:
        tile, per_row = torch.empty(shape, device=DEVICE), torch.zeros(shape[0], dtype=torch.float64, device=DEVICE)
        target = torch.zeros(shape[0], dtype=torch.int64, device=DEVICE)
        assert (fold_statistics(backend, tile, target, PLAIN, None, [shape[1]]).sum == 0).all()
        backend.fold_gradient(tile, target, per_row, per_row, PLAIN)
        assert backend.fold_peaks(tile, per_row, PLAIN, block=8).shape == (-(-shape[0] // 8), -(-shape[1] // 8))


@pytest.mark.parametrize("dtype", DTYPES)
def test_in_place_or_elsewhere_and_each_time_the_bits_are_the_same(dtype):
    logits, _ = random_tile(3, 20011, dtype, DEVICE, offset=1)
    target = torch.tensor([3, 8, 9001], device=DEVICE)
    ones = torch.ones(3, dtype=torch.float64, device=DEVICE)

    def run(out):
        statistics = fold_statistics(backend, logits, target, CAPPED, None, [77, 19934])
        backend.fold_gradient(logits, target, statistics.lse, ones, CAPPED, out=out)
        return *statistics, out

    first = run(torch.full_like(logits, math.nan))
    for out in (torch.full_like(logits, math.nan), torch.full_like(logits.T, math.nan).T.contiguous(), logits):
        assert all(torch.equal(x, y) for x, y in zip(run(out), first, strict=True))


@triton.jit
def tanh_kernel(x, y, size, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = place < size
    tl.store(y + place, triton_fold.tanh(tl.load(x + place, mask=mask)), mask=mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tanh_is_within_three_ulp(dtype):
    bounds = torch.tensor([0.0, 0.625, 50.0, math.inf, math.nan], dtype=dtype)
    x = torch.cat([torch.linspace(-12, 12, 500_001), torch.logspace(-30, 1, 10_001)]).to(dtype)
    x = torch.cat([x, bounds, -bounds]).to(DEVICE)
    y = torch.full_like(x, math.nan)
    tanh_kernel[(triton.cdiv(len(x), 2**16),)](x, y, len(x), BLOCK=2**16)
    # torch's own is within one ulp; an ulp of a value below 1 is a 2^-24 to 2^-23 part of it in float32.
    exact, ulp = x.double().tanh(), torch.finfo(dtype).eps
    assert torch.equal(y.isnan(), x.isnan())
    assert ((y.double() - exact).abs() <= 3 * ulp * exact.abs())[~x.isnan()].all()


# --------------------------------------------------------------------------------------- addresses of more than 31 bits


def sparse(size, dtype):
    """Memory that exists where it is touched."""
    no_reserve = 0x4000  # Linux's MAP_NORESERVE, which Python's mmap names since 3.12 only
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    try:
        memory = mmap.mmap(-1, size * dtype.itemsize, flags=flags)
    except OSError as error:
        pytest.skip(f"no room for {size} elements in the address space: {error}")
    return torch.frombuffer(memory, dtype=dtype)


@on_cpu
@pytest.mark.parametrize("stride", [2**30 + 48, 2**32 + 3], ids=["aligned", "odd"])
def test_rows_that_begin_behind_2_to_the_31_elements(stride):
    memory = sparse(3 * stride, torch.bfloat16)
    first, second = (torch.as_strided(memory, (3, 300), (stride, 1), 1000 * i) for i in range(2))
    first.copy_(torch.randn(3, 300))
    target, coefficient = torch.tensor([0, 1, 299]), torch.randn(3, dtype=torch.float64)
    lse, at_target, p, gradient = exact_fold(first, target, coefficient, PLAIN, None)
    statistics = fold_statistics(backend, first, target, PLAIN, None, [300])
    torch.testing.assert_close(statistics.lse, lse, rtol=2e-6, atol=0)
    torch.testing.assert_close(statistics.target, at_target, rtol=0, atol=0)
    backend.fold_gradient(first, target, lse, coefficient, PLAIN, out=second)
    assert ((second.double() - gradient).abs() <= gradient.abs() * 2**-7 + 1e-12).all()
    peaks = backend.fold_peaks(first, lse, PLAIN, block=512)
    torch.testing.assert_close(peaks, p.amax().view(1, 1), rtol=4e-6, atol=0)


@on_cpu
def test_sums_of_sequences_that_begin_behind_2_to_the_31_elements():
    stride, shape = 2**30 + 5, (3, 50)
    logp, target = (torch.as_strided(sparse(3 * stride, x), shape, (stride, 1)) for x in (torch.float32, torch.int64))
    logp.copy_(torch.randn(shape))
    target[1, :20] = -100
    sums, counts = backend.sequence_sums(logp, target, -100)
    expected, expected_counts = reference.sequence_sums(logp, target, -100)
    torch.testing.assert_close(sums, expected)
    assert torch.equal(counts, expected_counts)


# ------------------------------------------------------------------------------------------------------------- batch


@pytest.mark.parametrize("case", golden("batch"))
def test_golden_batch(case):
    for policy_step in test_objective.POLICY_STEPS:
        test_objective.test_golden_batch(case, policy_step, "triton")


@given(
    batch=test_batch.batches,
    tau=st.sampled_from([0.08, 0.3, 2.0]),
    eps=st.sampled_from([0.0, 1e-6, 0.01, 0.15, 1.3, 50.0]),
    policy_step=st.sampled_from(test_batch.STEPS),
    normalize=st.sampled_from(["group", "none"]),
)
@settings(deadline=None, max_examples=60)
def test_objective_is_what_plain_torch_computes(batch, **options):
    test_batch.assert_same(test_batch.values_of(batch, "triton", **options), test_batch.expected_of(batch, **options))


@given(seed=st.integers(0, 10**6), normalize=st.sampled_from(["group", "none"]))
@settings(deadline=None, max_examples=10)
def test_what_is_not_kept_is_neither_read_nor_counted(seed, normalize):
    batch = test_batch.random_batch(seed, [2, 3, 4, 2], kept=True, dtypes=test_batch.FLOATS)
    options = {"tau": 0.3, "eps": 0.02, "policy_step": "clone", "normalize": normalize}
    test_batch.assert_same(test_batch.values_of(batch, "triton", **options), test_batch.expected_of(batch, **options))


def test_the_largest_batch():
    batch = test_batch.random_batch(0, [16] * (triton_batch.MAX_RESPONSES // 16), unlabelled=0.2)
    options = {"tau": 0.3, "eps": 0.15, "policy_step": "clone", "normalize": "group"}
    test_batch.assert_same(test_batch.values_of(batch, "triton", **options), test_batch.expected_of(batch, **options))
    batch = test_batch.random_batch(0, [*[16] * (triton_batch.MAX_RESPONSES // 16), 2])
    with pytest.raises(ValueError, match=r"win_rate has 8194 responses, and the Triton kernel takes 8192: split"):
        test_batch.values_of(batch, "triton", **options)


# -------------------------------------------------------------------------------------------------------- compilation

COMPILE = """
import re
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from mopo_kernels.backends import triton_fold

for c in triton_fold.configurations():
    if re.match(r"(statistics|gradient)_kernel.*SOFTCAP=False.*ALIGN=16", c.name) and "bias=None" in c.name:
        source = ASTSource(c.kernel, c.signature, c.constexprs, c.attrs)
        ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=c.options).asm["ptx"]
        print(c.name, *(len(re.findall(x + r"\\.global\\S*\\.v(4\\.b32|2\\.b64)", ptx)) for x in ("ld", "st")), sep="|")
"""


def test_rows_that_begin_anywhere_are_read_and_written_16_bytes_at_a_time():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-c", COMPILE]
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    assert len(re.findall("row_stride=50257", output)) >= 2 * len(DTYPES)
    for line in output.splitlines():
        kernel, loads, stores = line.split("|")
        bits, block = int(re.search(r"fp?(\d\d)", kernel)[1]), int(re.search(r"BLOCK_V=(\d+)", kernel)[1])
        vectors = block * bits // 8 // 16 // 256  # that each of 256 threads has
        assert 1 <= vectors <= int(loads), line
        assert int(stores) >= (vectors if kernel.startswith("gradient") else 0), line
