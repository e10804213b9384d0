"""The cut kernels against float64 torch, interpreted or on a GPU, with blocks so small that every loop runs several
times. Inputs are parts of wider tensors of NaN, and fresh memory holds NaN, so that reading anything else shows.
"""

import math
from unittest import mock

import pytest
import torch
from fold_truth import TRANSFORMS, ULP, sparse
from hypothesis import given, settings
from hypothesis import strategies as st

from mopo_kernels.backends.triton import cut
from mopo_kernels.backends.triton.cut import Blocks, CutInputs, cut_gradients, cut_statistics

if cut.UNAVAILABLE:
    pytest.skip(cut.UNAVAILABLE, allow_module_level=True)

import triton
import triton.language as tl

from mopo_kernels.backends.triton import cut_backward, cut_forward, cut_tile

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BLOCKS = Blocks(16, 32, 32, 4, 2)
PLAIN, SCALED, CAPPED = TRANSFORMS
ALL = (True, True, True)
OWNERS = [False, True]  # of gradients: sums are atomic, or owned and deterministic


@pytest.fixture(autouse=True)
def poisoned():
    """Whatever torch allocates holds NaN until it is written."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def owned(owner):
    return mock.patch.object(torch, "are_deterministic_algorithms_enabled", return_value=owner)


def among_nan(x, padding):
    """x as the left columns of a tensor of NaN, and in front of rows of NaN."""
    around = torch.full((len(x) + 1, x.shape[1] + padding), math.nan, dtype=x.dtype, device=DEVICE)
    around[:-1, : x.shape[1]] = x
    return around[:-1, : x.shape[1]]


def problem(rows, hidden_size, vocab, dtype=torch.float32, *, with_bias=False, scale=3.0, padding=1, seed=0):
    """Inputs whose logits are about as large as scale: hidden, weight, target, coefficient, bias."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, hidden_size, generator=generator) * scale / math.sqrt(hidden_size)
    weight = torch.randn(vocab, hidden_size, generator=generator)
    target = torch.randint(0, vocab, (rows,), generator=generator)
    target[torch.rand(rows, generator=generator) < 0.1] = -100
    coefficient = torch.randn(rows, generator=generator, dtype=torch.float64)
    coefficient[torch.rand(rows, generator=generator) < 0.2] = 0
    bias = among_nan(torch.randn(1, vocab, generator=generator), 3)[0] if with_bias else None
    hidden, weight = (among_nan(x.to(dtype), padding) for x in (hidden, weight))
    return hidden, weight, target.to(DEVICE), coefficient.to(DEVICE), bias


def composed(hidden, weight, target, coefficient, bias, transform):
    """lse, z at the target, and gradients by hidden, weight and bias, by plain torch in the dtype of the inputs."""
    # torch 2.13 multiplies bfloat16 with what stands behind a row of odd length.
    hidden, weight = (x.contiguous().requires_grad_() for x in (hidden, weight))
    bias = torch.zeros(len(weight), device=DEVICE) if bias is None else bias
    bias = bias.detach().to(torch.promote_types(hidden.dtype, torch.float32)).requires_grad_()
    u = ((hidden @ weight.T).to(bias.dtype) + bias) * transform.inner
    z = torch.where(u.isinf(), u.detach(), transform.outer * u.tanh()) if transform.softcap else u
    lse = z.logsumexp(1)
    chosen = z.gather(1, target.clamp(min=0)[:, None])[:, 0]
    loss = (coefficient * (chosen.where(target >= 0, 0) - lse)).sum()
    gradients = torch.autograd.grad(loss, (hidden, weight, bias))
    return lse.detach(), chosen.detach().masked_fill(target < 0, -math.inf), *gradients


def exact(hidden, weight, *rest):
    return composed(hidden.double(), weight.double(), *rest)


def run(hidden, weight, target, coefficient, bias, transform, *, blocks=BLOCKS, owner=False, needs=ALL):
    """What composed() gives, by the kernels."""
    inputs = CutInputs(hidden, weight, target, transform, bias)
    statistics = cut_statistics(inputs, blocks=blocks)
    with owned(owner):
        gradients = cut_gradients(inputs, statistics.lse, coefficient, needs, blocks=blocks)
    return statistics.lse, statistics.chosen, *gradients


def error(got, truth, floor=0.0):
    """Relative, by norms; where the truth cancels out, relative to the floor."""
    finite = truth.isfinite()
    assert torch.equal(got[~finite], truth[~finite].to(got.dtype))
    return ((got - truth)[finite].norm() / truth[finite].norm().clamp(min=max(floor, 1e-300))).item()


def check(results, inputs, transform, *, forward=2e-6, backward=2e-5):
    """Float32: within what is promised. 16 bits: at most twice as far from the truth as plain torch is, or an ulp."""
    hidden, weight, _, coefficient, _ = inputs
    truth = exact(*inputs, transform)
    # What terms that may cancel are as large as.
    slope = coefficient.norm().item() * transform.inner * transform.outer
    widest = [x.double().norm(dim=1).max().item() for x in (weight, hidden)]
    floors = [math.sqrt(len(hidden)), math.sqrt(len(hidden)), *(0.1 * slope * x for x in (*widest, 1.0))]
    bounds = [forward, forward, backward, backward, backward]
    if hidden.dtype != torch.float32:
        yardstick = composed(*inputs, transform)
        ulps = [forward, forward, *[ULP[hidden.dtype]] * 3]  # plain torch is lucky where there are few numbers
        bounds = [
            max(2 * error(x, y, floor), ulp) for x, y, floor, ulp in zip(yardstick, truth, floors, ulps, strict=True)
        ]
    for got, expected, floor, bound in zip(results, truth, floors, bounds, strict=True):
        assert error(got, expected, floor) <= bound


# ------------------------------------------------------------------------------------------- shapes, dtypes, transforms


def check_ragged(rows, hidden_size, vocab, dtype, transform, with_bias, padding, owner, programs, seed=0):
    """`programs` wanted in all: a block of rows has one part of the vocabulary, or more."""
    inputs = problem(rows, hidden_size, vocab, dtype, with_bias=with_bias, padding=padding, seed=seed)
    with (
        mock.patch.object(cut_forward, "ENOUGH_PROGRAMS", programs),
        mock.patch.object(cut_backward, "ENOUGH_PROGRAMS", programs),
    ):
        check(run(*inputs, transform, owner=owner), inputs, transform)


@pytest.mark.parametrize("owner", OWNERS)
@pytest.mark.parametrize(
    "case",
    [
        pytest.param((1, 1, 1, torch.float32, PLAIN, False, 0), id="one of all"),
        pytest.param((33, 31, 100, torch.float32, CAPPED, True, 1), id="rests in all blocks, a softcap and a bias"),
        pytest.param((20, 70, 129, torch.float16, SCALED, True, 16), id="float16"),
        pytest.param((17, 33, 64, torch.bfloat16, CAPPED, False, 1), id="bfloat16"),
        pytest.param((40, 32, 32, torch.float32, PLAIN, True, 0), id="whole blocks"),
    ],
)
@pytest.mark.parametrize("programs", [1, 1024])
def test_ragged_shapes(case, owner, programs):
    check_ragged(*case, owner, programs)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(
    rows=st.integers(1, 40),
    hidden_size=st.sampled_from([1, 7, 31, 32, 33, 70]),
    vocab=st.sampled_from([1, 5, 31, 32, 33, 64, 100, 129]),
    dtype=st.sampled_from(DTYPES),
    transform=st.sampled_from(TRANSFORMS),
    with_bias=st.booleans(),
    padding=st.sampled_from([0, 1, 16]),
    owner=st.sampled_from(OWNERS),
    programs=st.sampled_from([1, 4, 1024]),
    seed=st.integers(0, 10**6),
)
def test_many_ragged_shapes(**case):
    check_ragged(**case)


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.float32, marks=pytest.mark.slow)])
@pytest.mark.parametrize("owner", OWNERS)
def test_blocks_of_the_table(dtype, owner):
    inputs = problem(131, 70, 300, dtype, with_bias=True)
    check(run(*inputs, SCALED, owner=owner, blocks=None), inputs, SCALED)


def test_groups_of_row_blocks_are_swizzled_onto_all_parts():
    inputs = problem((cut_tile.GROUP + 3) * BLOCKS.BLOCK_N - 1, 5, 70)
    check(run(*inputs, PLAIN), inputs, PLAIN)


@given(column_blocks=st.integers(0, 5000), wanted=st.integers(0, 5000))
def test_parts_cover_all_column_blocks_and_none_is_empty(column_blocks, wanted):
    parts, part_blocks = cut_tile.parts_of(column_blocks, wanted)
    assert 1 <= parts <= max(1, wanted)
    assert (parts - 1) * part_blocks < max(1, column_blocks) <= parts * part_blocks


@pytest.mark.parametrize("owner", OWNERS)
def test_rows_may_lie_anyhow(owner):
    hidden, weight, *rest = problem(20, 33, 70)
    truth = run(hidden, weight, *rest, PLAIN, owner=owner)
    by_columns = (x.t().contiguous().t() for x in (hidden, weight))
    for got, expected in zip(run(*by_columns, *rest, PLAIN, owner=owner), truth, strict=True):
        torch.testing.assert_close(got, expected)
    inputs = hidden[:1].expand(20, -1), weight, *rest
    check(run(*inputs, PLAIN, owner=owner), inputs, PLAIN)


@pytest.mark.parametrize("shape", [(0, 8, 30), (5, 8, 0), (0, 8, 0)], ids=str)
@pytest.mark.parametrize("owner", OWNERS)
def test_no_rows_or_no_columns(shape, owner):
    hidden, weight, target, *rest = problem(*map(max, shape, (1, 1, 1)))
    (rows, _, vocab), target = shape, target[: shape[0]] * 0
    coefficient = rest[0][:rows]
    lse, chosen, *gradients = run(hidden[:rows], weight[:vocab], target, coefficient, None, PLAIN, owner=owner)
    assert torch.equal(lse, torch.full_like(lse, -math.inf))
    assert torch.equal(chosen, lse)
    for got, x in zip(gradients, (hidden[:rows], weight[:vocab], weight[:vocab, 0]), strict=True):
        assert torch.equal(got, torch.zeros_like(x, dtype=torch.float32))


@pytest.mark.parametrize("owner", OWNERS)
@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True), (False,) * 3])
def test_only_what_is_needed_is_computed(needs, owner):
    inputs = problem(20, 16, 70, with_bias=True)
    everything = run(*inputs, CAPPED, owner=owner)[2:]
    some = run(*inputs, CAPPED, owner=owner, needs=needs)[2:]
    for got, expected, need in zip(some, everything, needs, strict=True):
        if need:
            torch.testing.assert_close(got, expected)
        else:
            assert got is None


def test_float64_is_refused():
    hidden, weight, target, coefficient, _ = problem(3, 4, 5, torch.float64)
    inputs = CutInputs(hidden, weight, target, PLAIN)
    with pytest.raises(ValueError, match="hidden is float64, which the cut kernels do not multiply: convert it"):
        cut_statistics(inputs)
    with pytest.raises(ValueError, match="hidden is float64"):
        cut_gradients(inputs, coefficient, coefficient, ALL)


def test_tf32_is_used_where_torch_may():
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        for name, setting, precision in [
            ("allow_tf32", False, "ieee"),
            ("allow_tf32", True, "tf32"),
            ("fp32_precision", "ieee", "ieee"),
            ("fp32_precision", "tf32", "tf32"),
        ]:
            setattr(matmul, name, setting)
            assert cut_tile.dot_precision(torch.float32) == precision
            assert cut_tile.dot_precision(torch.bfloat16) == "ieee"
    finally:
        matmul.fp32_precision = before


@pytest.mark.parametrize("blocks", [(32, 16), pytest.param((16, 32), marks=pytest.mark.slow)])
def test_the_same_bits_each_time(blocks):
    inputs = problem(40, 17, 70, torch.bfloat16, with_bias=True)
    blocks = BLOCKS._replace(BLOCK_N=blocks[0], BLOCK_V=blocks[1])
    first, second = (run(*inputs, CAPPED, owner=True, blocks=blocks) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_owners_need_no_atomics():
    with mock.patch.object(tl, "atomic_add", None):
        inputs = problem(20, 16, 70)
        check(run(*inputs, PLAIN, owner=True), inputs, PLAIN)


# ------------------------------------------------------------------------------------------------------ special values


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_masked_vocabulary(transform):
    """Whole blocks are masked, the first ones too, with a softcap as without."""
    inputs = problem(20, 16, 200, with_bias=True)
    bias, target = inputs[4], inputs[2]
    bias[:70] = bias[100:140] = bias[171::2] = -math.inf
    target[target >= 0] = 70 + target[target >= 0] % 30
    for owner in OWNERS:
        results = run(*inputs, transform, owner=owner)
        check(results, inputs, transform)
        assert (results[4][bias == -math.inf] == 0).all()


def test_a_masked_target_has_no_probability_and_no_slope_under_a_softcap():
    hidden, weight, target, coefficient, _ = problem(20, 16, 40)
    bias, target = (
        torch.zeros(40, device=DEVICE).index_fill(0, torch.tensor([5], device=DEVICE), -math.inf),
        target * 0 + 5,
    )
    expected = exact(hidden, weight, target, coefficient, bias, CAPPED)
    for owner in OWNERS:
        lse, chosen, *gradients = run(hidden, weight, target, coefficient, bias, CAPPED, owner=owner)
        torch.testing.assert_close(lse, expected[0], rtol=2e-6, atol=0)
        assert (chosen == -math.inf).all()
        assert gradients[2][5] == 0
        for got, truth in zip(gradients, expected[2:], strict=True):
            torch.testing.assert_close(got.double(), truth, rtol=2e-5, atol=2e-5)


def test_a_row_that_is_masked_as_a_whole_has_no_mass():
    hidden, weight, target, *_ = problem(3, 16, 100)
    bias = torch.full((100,), -math.inf, device=DEVICE)
    statistics = cut_statistics(CutInputs(hidden, weight, target.clamp(min=0), PLAIN, bias), blocks=BLOCKS)
    assert (statistics.total == 0).all()
    assert (statistics.lse == -math.inf).all()
    assert (statistics.chosen == -math.inf).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_huge_logits(dtype):
    weight = torch.randn(100, 1)
    weight[50], weight[70] = 1e30, -1e30
    hidden = torch.tensor([[1.0], [-1.0], [1e-30]])
    hidden, weight = (among_nan(x.to(dtype), 1) for x in (hidden, weight))
    target, ones = torch.tensor([50, 70, 3], device=DEVICE), torch.ones(3, dtype=torch.float64, device=DEVICE)
    for owner in OWNERS:
        lse, chosen, *gradients = run(hidden, weight, target, ones, None, PLAIN, owner=owner)
        expected = exact(hidden, weight, target, ones, None, PLAIN)
        torch.testing.assert_close(chosen - lse, expected[1] - expected[0], rtol=2e-6, atol=0)
        # The third row's logits are ±1 and 0.
        torch.testing.assert_close(gradients[2].double(), expected[4], rtol=2e-5, atol=1e-7)


def test_sums_whose_roundings_all_go_one_way():
    """Every block adds the same, which float32 sums of hundreds of them would round the same way."""
    blocks = Blocks(16, 64, 16, 4, 1)
    weight = torch.full((2**14, 1), -8.7, device=DEVICE)
    weight[0] = -8.0
    hidden, target = torch.ones(1, 1, device=DEVICE), torch.tensor([5], device=DEVICE)
    with mock.patch.object(cut_forward, "ENOUGH_PROGRAMS", 1):
        lse = cut_statistics(CutInputs(hidden, weight, target, PLAIN), blocks=blocks).lse
    torch.testing.assert_close(lse, weight[:, 0].double().logsumexp(0)[None], rtol=2e-7, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("programs", [1, 1024])
def test_nan_and_infinity_are_not_swallowed(bad, programs):
    for column in (0, 40, 99):
        hidden, weight, target, *_ = problem(20, 16, 100)
        bias = torch.zeros(100, device=DEVICE)
        bias[column] = bad
        with mock.patch.object(cut_forward, "ENOUGH_PROGRAMS", programs):
            of_all = [cut_statistics(CutInputs(hidden, weight, target, x, bias), blocks=BLOCKS) for x in TRANSFORMS]
            hidden[3] = math.nan
            of_one = cut_statistics(CutInputs(hidden, weight, target, PLAIN), blocks=BLOCKS)
        assert all(x.lse.isnan().all() for x in of_all)
        assert of_one.lse.isnan().nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize("owner", OWNERS)
def test_rows_of_coefficient_zero_are_nothing_whatever_they_hold(owner):
    hidden, weight, target, coefficient, bias = problem(40, 16, 70, with_bias=True)
    coefficient = coefficient.abs() + 0.1
    skipped = torch.tensor([0, 3, 17, *range(22, 40)], device=DEVICE)  # a block of rows as a whole
    coefficient[skipped] = 0
    kept = coefficient != 0
    inputs = [x[kept] for x in (hidden, target, coefficient)]
    truth = run(inputs[0], weight, *inputs[1:], bias, CAPPED, owner=owner)[2:]
    hidden[skipped] = math.nan
    grad_hidden, *others = run(hidden, weight, target, coefficient, bias, CAPPED, owner=owner)[2:]
    assert (grad_hidden[skipped] == 0).all()
    for got, expected in zip((grad_hidden[kept], *others), truth, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


SCALES = [(torch.float16, 1e-9), (torch.float16, 1e9), (torch.bfloat16, 1e30), (torch.float32, 1e-30)]


@pytest.mark.parametrize(("dtype", "scale"), SCALES)
def test_gradients_scale_with_the_loss(dtype, scale):
    """float16 holds neither 1e-9 nor 1e9."""
    hidden, weight, target, coefficient, bias = problem(20, 16, 40, dtype, with_bias=True)
    truth = run(hidden, weight, target, coefficient, bias, SCALED)[2:]
    scaled = run(hidden, weight, target, coefficient * scale, bias, SCALED)[2:]
    for got, expected in zip(scaled, truth, strict=True):
        assert error(got.double() / scale, expected.double()) <= 1e-6


def test_no_coefficient_at_all():
    hidden, weight, target, coefficient, bias = problem(20, 16, 70, with_bias=True)
    for owner in OWNERS:
        gradients = run(hidden, weight, target, coefficient * 0, bias, PLAIN, owner=owner)[2:]
        assert all((x == 0).all() for x in gradients)


# ------------------------------------------------------------------------------------- addresses of more than 31 bits


on_cpu = pytest.mark.skipif(DEVICE != "cpu", reason="a test of the interpreter")


@on_cpu
@pytest.mark.parametrize("owner", OWNERS)
def test_rows_that_begin_behind_2_to_the_31_elements(owner):
    stride, size = 2**30 + 48, 20
    hidden, weight, *rest = problem(3, size, 3)
    memory = sparse(3 * stride, torch.float32)
    wide = [torch.as_strided(memory, (3, size), (stride, 1), 1000 * i) for i in range(2)]
    for x, values in zip(wide, (hidden, weight), strict=True):
        x.copy_(values)
    inputs = *wide, *rest
    check(run(*inputs, PLAIN, owner=owner), inputs, PLAIN)


@triton.jit
def accumulate_product_kernel(sums, left, right, row, rows, hidden_size, BLOCK: tl.constexpr, BLOCK_H: tl.constexpr):
    place = tl.arange(0, BLOCK)
    left = tl.load(left + place[:, None] * BLOCK + place[None, :])
    right_rows = right + place * hidden_size
    cut_backward.accumulate_product(
        sums, left, right_rows, place < BLOCK, 1.0, row + place, rows, hidden_size, False, BLOCK_H, "ieee"
    )


@on_cpu
def test_gradients_of_more_than_2_to_the_31_elements():
    vocab, hidden_size = 2**18, 2**14 + 16
    sums, left, right = sparse(vocab * hidden_size, torch.float32), torch.randn(16, 16), torch.randn(16, hidden_size)
    accumulate_product_kernel[(1,)](
        sums=sums, left=left, right=right, row=vocab - 10, rows=vocab, hidden_size=hidden_size, BLOCK=16, BLOCK_H=4096
    )
    last = sums.view(vocab, hidden_size)[-10:]
    torch.testing.assert_close(last, (left @ right)[:10], rtol=1e-5, atol=1e-5)
