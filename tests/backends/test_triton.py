"""The fold and batch kernels in Triton against float64 torch, interpreted or on a GPU.

The checks of fold_contract.py, where rows have several programs and programs several blocks, and what is Triton's own.
"""

import math
from unittest import mock

import fold_contract
import pytest
import torch
from fold_truth import DTYPES, TRANSFORMS, exact_fold, sparse
from hypothesis import given, settings
from hypothesis import strategies as st

from mopo_kernels.backends import triton as backend
from mopo_kernels.backends.batch import Labels, LabelValues
from mopo_kernels.backends.fold import Samples, Statistics

if backend.UNAVAILABLE:
    pytest.skip(backend.UNAVAILABLE, allow_module_level=True)

import triton
import triton.language as tl

from mopo_kernels.backends.triton import batch as triton_batch
from mopo_kernels.backends.triton import fold as triton_fold
from mopo_kernels.backends.triton import scale as triton_scale
from mopo_kernels.backends.triton.transform import tanh

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLOCK = {dtype: triton_fold.BLOCK_BYTES // max(4, dtype.itemsize) for dtype in DTYPES}  # columns
PLAIN, SCALED, CAPPED = TRANSFORMS
PROGRAMS = [1, 3, 4096]  # wanted in all: one per row, which loops over its blocks; some; one per block

on_cpu = pytest.mark.skipif(DEVICE != "cpu", reason="a test of the interpreter")


def wanting(programs):
    return mock.patch.object(triton_fold, "ENOUGH_PROGRAMS", programs)


@pytest.fixture(autouse=True)
def poisoned():
    """Whatever torch allocates holds NaN until it is written."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


# ------------------------------------------------------------------------------------------------------------- scale


@pytest.mark.parametrize("size", [0, 1, 4095, 4097, 40000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gradient_is_scaled_in_float32(size, dtype):
    x = torch.randn(size, device=DEVICE).to(dtype)
    factor = torch.tensor(1 / 3, dtype=torch.promote_types(dtype, torch.float32), device=DEVICE)
    with mock.patch.object(triton_scale, "MAX_PROGRAMS", 3):
        scaled = backend.scale_in_place(x.clone(), factor)
    expected = (x.to(factor.dtype) * factor).to(dtype)
    rounding = torch.finfo(dtype).eps if DEVICE == "cpu" else 0  # the interpreter cuts bits off
    torch.testing.assert_close(scaled, expected, rtol=rounding, atol=0)
    assert torch.equal(backend.scale_in_place(x.clone(), torch.ones_like(factor)), x)


# -------------------------------------------------------------------------------------------------------------- fold


def per_row(*values):
    return torch.tensor(values, device=DEVICE, dtype=torch.int64 if type(values[0]) is int else torch.float64)


def statistics_of(logits, target, transform, widths):
    return fold_contract.fold_statistics(backend, logits, target, transform, None, widths, entropy=True)


def write_gradient(out, lse, coefficient, logits, target, transform, widths):
    fold_contract.fold_gradient(backend, logits, target, lse, coefficient, transform, None, widths, out)


def check_tiles(rows, widths, offset, padding, out_offset, dtype, transform, with_bias=True, scale=1.0, seed=0, **more):
    options = {"with_bias": with_bias, "scale": scale, "seed": seed, **more}
    places = {"offset": offset, "padding": padding, "out_offset": out_offset}
    fold_contract.check_tiles(
        backend, DEVICE, rows=rows, widths=widths, dtype=dtype, transform=transform, **places, **options
    )


@pytest.mark.parametrize("programs", PROGRAMS)
@pytest.mark.parametrize(
    "case",
    [
        pytest.param((2, [9001], 0, 0, None, torch.float32, PLAIN, False), id="one tile in place"),
        pytest.param((3, [17, 2049, 1], 9, 1, None, torch.float32, CAPPED), id="tiles of odd widths"),
        pytest.param((2, [4096, 1000], 1, 15, 0, torch.float16, SCALED), id="float16, elsewhere at another alignment"),
        pytest.param((2, [7, 4099], 16, 1, 16, torch.bfloat16, CAPPED), id="bfloat16, elsewhere alike"),
        pytest.param((2, [1025, 30], 3, 0, 2, torch.float64, CAPPED), id="float64"),
        pytest.param((2, [2500], 5, 2, None, torch.float32, PLAIN, True, 30.0), id="one sure token"),
    ],
)
def test_ragged_tiles_at_any_alignment(programs, case):
    with wanting(programs):
        check_tiles(*case)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(
    programs=st.sampled_from(PROGRAMS),
    **fold_contract.tile_strategies(rows=3, widths=[1, 2, 7, 17, 1000, 4095, 8193, 20000]),
)
def test_many_ragged_tiles(programs, **case):
    with wanting(programs):
        check_tiles(**case)


@pytest.mark.parametrize(
    "dtype", [x if x == torch.float16 else pytest.param(x, marks=pytest.mark.slow) for x in DTYPES]
)
@pytest.mark.parametrize("programs", [1, 4096])
@pytest.mark.parametrize("around", [-15, -1, 0, 1])
def test_around_a_whole_number_of_blocks(dtype, programs, around):
    for offset, out_offset in [(0, None), (5, 5), (1, 0)]:
        with wanting(programs):
            check_tiles(2, [2 * BLOCK[dtype] + around], offset, 0, out_offset, dtype, SCALED, scale=3.0)


@pytest.mark.parametrize("programs", [1, 3])
@pytest.mark.parametrize(
    "logits",
    [
        pytest.param(torch.full((1, 131072), 0.3), id="all the same"),  # every rounding of the sum goes one way
        pytest.param(torch.linspace(-40, 30, 20001).view(1, -1), id="a new maximum in every block"),
        pytest.param(torch.linspace(30, -40, 20001).view(1, -1), id="the maximum in the first block"),
    ],
)
def test_accuracy_that_is_promised_for_float32(logits, programs):
    with wanting(programs):
        fold_contract.check_accuracy(backend, DEVICE, logits.to(DEVICE))


def test_masked_vocabulary_and_huge_logits():
    fold_contract.check_special_logits(backend, DEVICE)
    fold_contract.check_masked_tokens(backend, DEVICE)


def test_a_row_that_is_masked_as_a_whole_has_no_mass():
    logits = torch.full((1, 9000), -math.inf, device=DEVICE)
    statistics = statistics_of(logits, per_row(3), PLAIN, [4500, 4500])
    assert statistics.total.item() == 0
    assert statistics.lse.item() == statistics.chosen.item() == -math.inf


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("programs", [1, 4096])
def test_nan_and_infinity_are_not_swallowed(bad, programs):
    for column in (0, 4100, 9000):
        with wanting(programs):
            fold_contract.check_bad_logits(backend, DEVICE, bad, column, 9001)


@pytest.mark.parametrize("columns", [19, 9001])
def test_rows_that_do_not_count_are_skipped_or_become_zero(columns):
    """Negative targets: statistics stay; coefficient 0: zeros, whatever stood there. Other rows are as ever."""
    logits = torch.full((3, columns), math.nan, device=DEVICE)
    logits[1] = 0.5
    target = per_row(-1, 5, -100)
    statistics = statistics_of(logits, target, PLAIN, [columns])
    fresh = Statistics.start(3, torch.device(DEVICE), entropy=True)
    assert all(torch.equal(x[[0, 2]], y[[0, 2]]) for x, y in zip(statistics, fresh, strict=True))
    assert statistics.lse[1].item() == pytest.approx(0.5 + math.log(columns), rel=2e-6)
    write_gradient(logits, statistics.lse, per_row(0.0, 2.0, 0.0), logits, target, PLAIN, [columns])
    assert (logits[[0, 2]] == 0).all()
    assert logits[1, 5].item() == pytest.approx(2 * (1 - 1 / columns), rel=2e-5)


def test_zero_rows_and_zero_columns():
    for shape in [(0, 5), (3, 0), (0, 0)]:
        logits, zeros = torch.empty(shape, device=DEVICE), torch.zeros(shape[0], dtype=torch.float64, device=DEVICE)
        target = torch.zeros(shape[0], dtype=torch.int64, device=DEVICE)
        assert (statistics_of(logits, target, PLAIN, [shape[1]]).total == 0).all()
        write_gradient(logits, zeros, zeros, logits, target, PLAIN, [shape[1]])


@pytest.mark.parametrize("dtype", [torch.float32, *(pytest.param(x, marks=pytest.mark.slow) for x in DTYPES[1:])])
def test_in_place_or_elsewhere_and_each_time_the_bits_are_the_same(dtype):
    logits, _ = fold_contract.random_tile(3, 5011, dtype, DEVICE, offset=1)
    target, ones = per_row(3, 8, 4001), per_row(1.0, 1.0, 1.0)

    def run(out):
        statistics = statistics_of(logits, target, CAPPED, [77, 4934])
        write_gradient(out, statistics.lse, ones, logits, target, CAPPED, [77, 4934])
        return *statistics, out

    first = run(torch.full_like(logits, math.nan))
    for out in (torch.full((3, 5012), math.nan, dtype=dtype, device=DEVICE)[:, :-1], logits):
        assert all(torch.equal(x, y) for x, y in zip(run(out), first, strict=True))


@triton.jit
def tanh_kernel(x, y, size, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = place < size
    tl.store(y + place, tanh(tl.load(x + place, mask=mask)), mask=mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tanh_is_within_three_ulp(dtype):
    bounds = torch.tensor([0.0, 0.625, 50.0, math.inf, math.nan], dtype=dtype)
    x = torch.cat([torch.linspace(-12, 12, 100_001), torch.logspace(-30, 1, 10_001)]).to(dtype)
    x = torch.cat([x, bounds, -bounds]).to(DEVICE)
    y = torch.full_like(x, math.nan)
    block = 2**10 if DEVICE == "cuda" else 2**16  # programs are slow in the interpreter, wide ones in the compiler
    tanh_kernel[(triton.cdiv(len(x), block),)](x=x, y=y, size=len(x), BLOCK=block)
    # torch's own is within one ulp; an ulp of a value below 1 is a 2^-24 to 2^-23 part of it in float32.
    exact, ulp = x.double().tanh(), torch.finfo(dtype).eps
    assert torch.equal(y.isnan(), x.isnan())
    assert ((y.double() - exact).abs() <= 3 * ulp * exact.abs())[~x.isnan()].all()


@on_cpu
@pytest.mark.parametrize("stride", [2**30 + 48, 2**32 + 3], ids=["aligned", "odd"])
def test_rows_that_begin_behind_2_to_the_31_elements(stride):
    memory = sparse(3 * stride, torch.bfloat16)
    first, second = (torch.as_strided(memory, (3, 300), (stride, 1), 1000 * i) for i in range(2))
    first.copy_(torch.randn(3, 300))
    target, coefficient = per_row(0, 1, 299), torch.randn(3, dtype=torch.float64)
    lse, chosen, _, gradient = exact_fold(first, target, coefficient, PLAIN)
    statistics = statistics_of(first, target, PLAIN, [300])
    torch.testing.assert_close(statistics.lse, lse, rtol=2e-6, atol=0)
    torch.testing.assert_close(statistics.chosen, chosen, rtol=0, atol=0)
    write_gradient(second, lse, coefficient, first, target, PLAIN, [300])
    assert ((second.double() - gradient).abs() <= gradient.abs() * 2**-7 + 1e-12).all()


# ------------------------------------------------------------------------------------------------------------ samples


def check_samples(rows, widths, offset, dtype, transform, with_bias=True, masked=0.0, scale=1.0, seed=0):
    options = {"with_bias": with_bias, "masked": masked, "scale": scale, "seed": seed}
    fold_contract.check_samples(
        backend, DEVICE, rows=rows, widths=widths, offset=offset, padding=3, dtype=dtype, transform=transform, **options
    )


@pytest.mark.parametrize(
    "case",
    [  # the seed chooses the floor: 0.9, 0.25, 2^-6, 0.01, 1e-4
        pytest.param((2, [5001], 0, torch.float32, PLAIN, False, 0.0, 1.0, 2), id="one tile of several blocks"),
        pytest.param((3, [17, 2049, 1, 7], 9, torch.float32, CAPPED, True, 0.4, 1.0, 3), id="tiles of odd widths"),
        pytest.param((2, [1024, 1000], 1, torch.float16, SCALED, True, 0.0, 3.0, 12), id="float16"),
        pytest.param((2, [7, 2099], 16, torch.bfloat16, CAPPED, True, 0.4, 1.0, 7), id="bfloat16"),
        pytest.param((2, [513, 30], 3, torch.float64, CAPPED, True, 0.0, 1.0, 17), id="float64"),
        pytest.param((2, [900], 5, torch.float32, PLAIN, True, 0.0, 0.1, 4), id="all entries exact"),
        pytest.param((4, [300], 2, torch.float32, PLAIN, True, 0.0, 30.0, 0), id="a floor of almost 1"),
    ],
)
def test_samples_of_ragged_tiles(case):
    check_samples(*case)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(**fold_contract.sampled_strategies(rows=3, widths=[1, 2, 7, 17, 1000, 1025, 4097]))
def test_samples_of_many_ragged_tiles(**case):
    fold_contract.check_samples(backend, DEVICE, **case)


@pytest.mark.parametrize(
    "dtype", [x if x == torch.float32 else pytest.param(x, marks=pytest.mark.slow) for x in DTYPES]
)
@pytest.mark.parametrize("transform", [PLAIN, CAPPED], ids=["plain", "capped"])
def test_sampling_is_unbiased(dtype, transform):
    fold_contract.check_sampling_is_unbiased(backend, DEVICE, dtype, transform, draws=8)


def test_extreme_samples():
    fold_contract.check_extreme_samples(backend, DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [37, pytest.param(1500, marks=pytest.mark.slow)])
def test_products_of_samples(dtype, width):
    fold_contract.check_sample_products(backend, DEVICE, dtype, width=width)


def test_products_of_no_samples_are_zero():
    samples = Samples.start(3, 50, 0.5, torch.float32, torch.device(DEVICE))
    for product, shape in ((backend.sample_hidden, (3, 8)), (backend.sample_weight, (50, 8))):
        out = torch.full(shape, math.nan, device=DEVICE)
        product(samples, torch.full((53 - shape[0], 8), math.nan, device=DEVICE), out)
        assert (out == 0).all()


@on_cpu
def test_samples_of_rows_that_begin_behind_2_to_the_31_elements():
    logits = torch.as_strided(sparse(3 * 2**31, torch.bfloat16), (3, 300), (2**31 + 3, 1))
    logits.copy_(torch.randn(3, 300))
    target, zeros = per_row(0, 1, 299), torch.zeros(3, dtype=torch.float64)
    lse = logits.double().logsumexp(1)
    arguments = (target, lse, zeros, 2.0**-5, PLAIN, None, [300])
    far, near = (fold_contract.fold_sample(backend, x, *arguments) for x in (logits, logits.clone()))
    assert all(torch.equal(x, y) for x, y in zip((*far[0], far[1]), (*near[0], near[1]), strict=True))


# ------------------------------------------------------------------------------------------------------ sequence sums


def check_sums(logp, target):
    counts = target != -100
    sums, counted = backend.sequence_sums(logp, target, -100)
    torch.testing.assert_close(sums, torch.where(counts, logp, 0).double().sum(1), rtol=1e-12, atol=1e-12)
    assert torch.equal(counted, counts.sum(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("length", [1, 1023, 1025, 2500])
def test_sums_of_sequences(dtype, length):
    """Of strided rows; what does not count is NaN."""
    around = torch.full((5, length + 3), math.nan, dtype=dtype)
    target = torch.randint(0, 9, around.shape)[:, 2:-1]
    logp = around[:, 1:-2]
    logp.copy_(torch.randn(5, length))
    target[1] = target[2, ::3] = target[4, -1] = -100
    logp[target == -100] = math.nan
    check_sums(logp.to(DEVICE), target.to(DEVICE))
    check_sums(logp[:0].to(DEVICE), target[:0].to(DEVICE))


@on_cpu
def test_sums_of_sequences_that_begin_behind_2_to_the_31_elements():
    stride, shape = 2**30 + 5, (3, 50)
    logp, target = (torch.as_strided(sparse(3 * stride, x), shape, (stride, 1)) for x in (torch.float32, torch.int64))
    logp.copy_(torch.randn(shape))
    target[1, :20] = -100
    check_sums(logp, target)


# --------------------------------------------------------------------------------------------------- label statistics

SUMS = {"rtol": 1e-10, "atol": 1e-12}  # two float64 evaluation orders
CHI = {"rtol": 1e-7, "atol": 1e-9}  # a KL near 1e-6 cancels to 1e-10, one that saturates hardly moves with chi


def random_labels(seed, sizes, objectives=3, *, hard=False, unlabelled=0.0, lag=True, tau=0.3, eps=0.02, primary=0):
    """Groups of these sizes, in random row order and with odd ids; floats of both dtypes."""
    generator = torch.Generator().manual_seed(seed)
    count = sum(sizes)

    def floats(*shape, draw=torch.randn):
        dtype = (torch.float32, torch.float64)[int(torch.randint(2, (), generator=generator))]
        return draw(*shape, generator=generator, dtype=dtype)

    win_rate = floats(count, objectives, draw=torch.rand)
    win_rate = win_rate.round() if hard else win_rate
    win_rate[torch.rand(count, objectives, generator=generator) < unlabelled] = math.nan
    multipliers = floats(objectives, draw=torch.rand)
    multipliers[primary] = 1
    ids = torch.randperm(1000, generator=generator)[: len(sizes)] * (2**40 + 1) - 2**45
    group = ids.repeat_interleave(torch.tensor(sizes))[torch.randperm(count, generator=generator)]
    return Labels(win_rate, group, multipliers, floats(count) if lag else None, tau, eps, primary)


def run_labels(labels):
    on_device = (x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in labels)
    slot, buffer = backend.label_statistics(Labels(*on_device))
    return slot.cpu(), LabelValues.unpack(buffer.cpu(), *labels.win_rate.shape)


def robust_bound(values, masses, eps):
    """By bisection on 1/χ; KL grows with it."""
    mean = (masses * values).sum()
    if eps == 0:
        return mean, math.inf
    excess = values - values.min()
    if masses[excess == 0].sum().log() >= -eps:
        return values.min(), 0.0
    low, high = 0.0, 2.0**60
    for _ in range(100):
        t = math.sqrt(low * high) if low > 0 else high / 2**20
        q = masses * torch.exp(-t * excess)
        q /= q.sum()
        kl = -t * (q * excess).sum() - (masses * torch.exp(-t * excess)).sum().log()
        low, high = (t, high) if kl < eps else (low, t)
    return (q * values).sum(), 1 / t


def expected_labels(labels):
    """The formulas of the batch contract, group by group."""
    win_rate, group, multipliers, lag, tau, eps, _ = labels
    (count, objectives), ids = win_rate.shape, group.unique()
    members = [group == i for i in ids]
    values, labelled = torch.zeros(count, objectives).double(), torch.zeros(len(ids), objectives).bool()
    for g, member in enumerate(members):
        labelled[g] = ~win_rate[member].isnan().all(0)
        values[member] = torch.where(labelled[g], win_rate[member].double().nan_to_num(0.5), 0)
    lag = torch.zeros(count).double() if lag is None else lag.double()
    score = values @ multipliers.double() / tau
    log_ref, log_weight, size = (torch.empty(count).double() for _ in range(3))
    for member in members:
        log_ref[member] = lag[member].log_softmax(0)
        log_weight[member] = (score + lag)[member].log_softmax(0)
        size[member] = member.sum().double()
    weights = log_weight.exp()
    win_rates, bounds, chi = torch.full((3, objectives), math.nan).double()
    for k in range(objectives):
        if labelled[:, k].any():
            inside = torch.stack([member for member, has in zip(members, labelled[:, k], strict=True) if has]).any(0)
            win_rates[k] = (weights * values[:, k]).sum() / labelled[:, k].sum()
            ratio = ((log_weight - log_ref).exp() * values[:, k])[inside]
            bounds[k], chi[k] = robust_bound(ratio, log_ref.exp()[inside] / labelled[:, k].sum(), eps)
    num_groups = torch.tensor(float(len(ids))).double()
    kl = (weights * (log_weight - log_ref)).sum() / num_groups
    ess = weights.sum() ** 2 / (weights**2).sum()
    valid = torch.ones(()).double()
    return LabelValues(valid, num_groups, ess, kl, size, score, weights, win_rates, bounds, chi)


def check_labels(labels):
    slot, values = run_labels(labels)
    for name, x, y in zip(LabelValues._fields, values, expected_labels(labels), strict=True):
        tolerance = CHI if name == "chi" else SUMS
        torch.testing.assert_close(x, y, equal_nan=True, **tolerance, msg=lambda text, name=name: f"{name}: {text}")
    ids, dense = labels.group.unique(return_inverse=True)
    first = torch.stack([slot[dense == g][0] for g in range(len(ids))])
    assert torch.equal(slot, first[dense])
    assert torch.equal(first.sort().values, torch.arange(len(ids)))


@pytest.mark.parametrize(
    "labels",
    [
        pytest.param(random_labels(0, [2], 1, lag=False, eps=0.0), id="one pair"),
        pytest.param(random_labels(1, range(2, 10), unlabelled=0.3), id="sizes 2 to 9, labelled in part"),
        pytest.param(random_labels(2, [3, 2, 5, 4, 2], 4, unlabelled=0.9, eps=0.15), id="hardly any labels"),
        pytest.param(random_labels(3, [2, 2, 7], hard=True, tau=0.08, eps=1e-6), id="hard labels, a small ball"),
        pytest.param(random_labels(4, [4, 4], lag=False, tau=2.0, eps=50.0), id="a ball that holds everything"),
        pytest.param(random_labels(5, [2] * 40, hard=True, eps=0.0, primary=2), id="many pairs, another primary"),
        pytest.param(random_labels(6, [2, 90, 3, 37], unlabelled=0.2, eps=1.3), id="very unequal groups"),
    ],
)
def test_label_statistics_are_the_contracts_formulas(labels):
    check_labels(labels)


@pytest.mark.slow
@settings(deadline=None, max_examples=100)
@given(
    seed=st.integers(0, 10**6),
    sizes=st.lists(st.integers(2, 6), min_size=1, max_size=7),
    objectives=st.integers(1, 5),
    hard=st.booleans(),
    unlabelled=st.sampled_from([0.0, 0.3, 0.9]),
    lag=st.booleans(),
    tau=st.sampled_from([0.08, 0.3, 2.0]),
    eps=st.sampled_from([0.0, 1e-6, 0.01, 0.15, 1.3, 50.0]),
)
def test_many_label_statistics(**case):
    check_labels(random_labels(**case))


def test_objectives_that_nobody_labelled_have_no_estimate():
    labels = random_labels(7, [2, 3])
    labels.win_rate[:, 1] = math.nan
    values = run_labels(labels)[1]
    for x in (values.win_rates, values.lower_bounds, values.chi):
        assert x.isnan().tolist() == [False, True, False]
    assert values.valid == 1


def test_scores_of_hundreds_neither_overflow_nor_lose_the_loser():
    win_rate, multipliers = torch.tensor([[1.0, 1.0], [0.0, 0.0]]), torch.tensor([1.0, 70.0])
    labels = Labels(win_rate, torch.tensor([5, 5]), multipliers, torch.tensor([900.0, 900.0]), 0.1, 0.1, 0)
    values = run_labels(labels)[1]
    torch.testing.assert_close(values.weights.log(), torch.tensor([0.0, -710.0]).double(), rtol=1e-12, atol=1e-12)
    assert values.lower_bounds.isfinite().all()


@pytest.mark.slow
def test_the_largest_batch():
    check_labels(random_labels(0, [16] * (triton_batch.MAX_RESPONSES // 16), unlabelled=0.2, eps=0.15))


def test_a_batch_that_is_too_large_is_refused():
    labels = random_labels(0, [2])._replace(win_rate=torch.zeros(triton_batch.MAX_RESPONSES + 2, 1))
    with pytest.raises(ValueError, match=r"win_rate has 8194 responses, and the Triton kernel takes 8192: split"):
        backend.label_statistics(labels)


@pytest.mark.parametrize(
    ("field", "index", "value"),
    [
        pytest.param("win_rate", (4, 2), 1.0000001, id="win rate above 1"),
        pytest.param("win_rate", (0, 0), -1e-9, id="win rate below 0"),
        pytest.param("win_rate", (2, 1), math.inf, id="win rate inf"),
        pytest.param("group", 0, 7, id="a group of one"),
        pytest.param("multipliers", 2, -0.1, id="multiplier below 0"),
        pytest.param("multipliers", 1, math.inf, id="multiplier inf"),
        pytest.param("multipliers", 1, math.nan, id="multiplier NaN"),
        pytest.param("multipliers", 0, 1.5, id="multiplier of the primary"),
        pytest.param("lag_log_ratio", 2, math.nan, id="lag NaN"),
        pytest.param("lag_log_ratio", 4, -math.inf, id="lag -inf"),
    ],
)
def test_values_that_are_refused_are_flagged(field, index, value):
    labels = random_labels(6, [2, 3])
    assert run_labels(labels)[1].valid == 1
    getattr(labels, field)[index] = value
    assert run_labels(labels)[1].valid == 0


def test_more_objectives_than_responses_are_all_checked():
    labels = random_labels(7, [2], objectives=6)
    labels.multipliers[5] = -1
    assert run_labels(labels)[1].valid == 0


def test_the_same_labels_give_the_same_bits():
    labels = random_labels(5, [2, 3, 5] * 4, unlabelled=0.2)
    (slot, values), (other_slot, others) = run_labels(labels), run_labels(labels)
    assert torch.equal(slot, other_slot)
    assert all(torch.equal(x, y) for x, y in zip(values, others, strict=True))
