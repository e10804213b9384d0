"""The cut kernels against float64 torch, interpreted or on a GPU, with blocks so small that every loop runs several
times. Inputs are parts of wider tensors of NaN, and fresh memory holds NaN, so that reading anything else shows.
"""

import math
import mmap
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mopo_kernels.backends.cut import cut_gradients, cut_statistics
from test_fold import TRANSFORMS, ULP

from mopo_kernels.backends import cut

if cut.UNAVAILABLE:
    pytest.skip(cut.UNAVAILABLE, allow_module_level=True)

import triton
import triton.language as tl
from mopo_kernels.backends.cut_tile import Blocks

from mopo_kernels.backends import cut_backward, cut_forward, cut_tile

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
    z = transform.outer * u.tanh() if transform.softcap else u
    lse = z.logsumexp(1)
    at_target = z.gather(1, target.clamp(min=0)[:, None])[:, 0]
    loss = (coefficient * (at_target.where(target >= 0, 0) - lse)).sum()
    gradients = torch.autograd.grad(loss, (hidden, weight, bias))
    return lse.detach(), at_target.detach().masked_fill(target < 0, -math.inf), *gradients


def exact(hidden, weight, *rest):
    return composed(hidden.double(), weight.double(), *rest)


def run(hidden, weight, target, coefficient, bias, transform, *, blocks=BLOCKS, owner=False, **options):
    """What composed() gives, by the kernels."""
    statistics = cut_statistics(hidden, weight, target, transform, bias=bias, blocks=blocks)
    with owned(owner):
        options = {"bias": bias, "needs": ALL, "blocks": blocks} | options
        gradients = cut_gradients(hidden, weight, target, statistics.lse, coefficient, transform, **options)
    return statistics.lse, statistics.target, *gradients


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


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    hidden_size=st.sampled_from([1, 7, 31, 32, 33, 70]),
    vocab=st.sampled_from([1, 5, 31, 32, 33, 64, 100, 129]),
    dtype=st.sampled_from(DTYPES),
    transform=st.sampled_from(TRANSFORMS),
    with_bias=st.booleans(),
    padding=st.sampled_from([0, 1, 16]),
    owner=st.sampled_from(OWNERS),
    programs=st.sampled_from([1, 4, 1024]),  # wanted in all: a block of rows has one part of the vocabulary, or more
    seed=st.integers(0, 10**6),
)
def test_ragged_shapes(rows, hidden_size, vocab, dtype, transform, with_bias, padding, owner, programs, seed):
    inputs = problem(rows, hidden_size, vocab, dtype, with_bias=with_bias, padding=padding, seed=seed)
    with (
        mock.patch.object(cut_forward, "ENOUGH_PROGRAMS", programs),
        mock.patch.object(cut_backward, "ENOUGH_PROGRAMS", programs),
    ):
        check(run(*inputs, transform, owner=owner), inputs, transform)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("owner", OWNERS)
def test_blocks_of_the_table(dtype, owner):
    inputs = problem(131, 70, 300, dtype, with_bias=True)
    check(run(*inputs, SCALED, owner=owner, blocks=None), inputs, SCALED)


def test_groups_of_row_blocks_are_swizzled_onto_all_parts():
    inputs = problem((2 * cut_tile.GROUP + 3) * BLOCKS.BLOCK_N - 1, 5, 100)
    for owner in OWNERS:
        check(run(*inputs, PLAIN, owner=owner), inputs, PLAIN)


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
    lse, at_target, *gradients = run(hidden[:rows], weight[:vocab], target, coefficient, None, PLAIN, owner=owner)
    assert torch.equal(lse, torch.full_like(lse, -math.inf))
    assert torch.equal(at_target, lse)
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
    with pytest.raises(ValueError, match="hidden is float64, which the cut kernels do not multiply: convert it"):
        cut_statistics(hidden, weight, target, PLAIN)
    with pytest.raises(ValueError, match="hidden is float64"):
        cut_gradients(hidden, weight, target, coefficient, coefficient, PLAIN, needs=ALL)


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


@pytest.mark.parametrize("blocks", [(64, 32), (32, 64)])
def test_the_same_bits_each_time(blocks):
    inputs = problem(150, 64, 300, torch.bfloat16, with_bias=True)
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
    """Whole blocks are masked, the first ones too, and with a softcap that makes them finite again."""
    inputs = problem(20, 16, 300, with_bias=True)
    bias, target = inputs[4], inputs[2]
    bias[:70] = bias[100:160] = bias[201::2] = -math.inf
    target[target >= 0] = 70 + target[target >= 0] % 30
    for owner in OWNERS:
        check(run(*inputs, transform, owner=owner), inputs, transform)


def test_a_row_that_is_masked_as_a_whole_has_no_mass():
    hidden, weight, target, *_ = problem(3, 16, 100)
    bias = torch.full((100,), -math.inf, device=DEVICE)
    statistics = cut_statistics(hidden, weight, target.clamp(min=0), PLAIN, bias=bias, blocks=BLOCKS)
    assert (statistics.sum == 0).all()
    assert (statistics.lse == -math.inf).all()
    assert (statistics.target == -math.inf).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_huge_logits(dtype):
    weight = torch.randn(100, 1)
    weight[50], weight[70] = 1e30, -1e30
    hidden = torch.tensor([[1.0], [-1.0], [1e-30]])
    hidden, weight = (among_nan(x.to(dtype), 1) for x in (hidden, weight))
    target, ones = torch.tensor([50, 70, 3], device=DEVICE), torch.ones(3, dtype=torch.float64, device=DEVICE)
    for owner in OWNERS:
        lse, at_target, *gradients = run(hidden, weight, target, ones, None, PLAIN, owner=owner)
        expected = exact(hidden, weight, target, ones, None, PLAIN)
        torch.testing.assert_close(at_target - lse, expected[1] - expected[0], rtol=2e-6, atol=0)
        # The third row's logits are ±1 and 0.
        torch.testing.assert_close(gradients[2].double(), expected[4], rtol=2e-5, atol=1e-7)


def test_sums_whose_roundings_all_go_one_way():
    """Every block adds the same, which float32 sums of hundreds of them would round the same way."""
    blocks = Blocks(16, 64, 16, 4, 1)
    weight = torch.full((2**15, 1), -8.7, device=DEVICE)
    weight[0] = -8.0
    hidden, target = torch.ones(1, 1, device=DEVICE), torch.tensor([5], device=DEVICE)
    with mock.patch.object(cut_forward, "ENOUGH_PROGRAMS", 1):
        lse = cut_statistics(hidden, weight, target, PLAIN, blocks=blocks).lse
    torch.testing.assert_close(lse, weight[:, 0].double().logsumexp(0)[None], rtol=2e-7, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("programs", [1, 1024])
def test_nan_and_infinity_are_not_swallowed(bad, programs):
    for column in (0, 31, 40, 99):
        hidden, weight, target, *_ = problem(20, 16, 100)
        bias = torch.zeros(100, device=DEVICE)
        bias[column] = bad
        with mock.patch.object(cut_forward, "ENOUGH_PROGRAMS", programs):
            of_all = cut_statistics(hidden, weight, target, PLAIN, bias=bias, blocks=BLOCKS)
            hidden[3] = math.nan
            of_one = cut_statistics(hidden, weight, target, PLAIN, blocks=BLOCKS)
        assert of_all.lse.isnan().all()
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


@pytest.mark.parametrize("scale", [1e-30, 1e-9, 1e9, 1e30])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_scale_with_the_loss(dtype, scale):
    """float16 holds neither 1e-9 nor 1e9."""
    hidden, weight, target, coefficient, bias = problem(20, 16, 70, dtype, with_bias=True)
    for owner in OWNERS:
        truth = run(hidden, weight, target, coefficient, bias, SCALED, owner=owner)[2:]
        scaled = run(hidden, weight, target, coefficient * scale, bias, SCALED, owner=owner)[2:]
        for got, expected in zip(scaled, truth, strict=True):
            assert error(got.double() / scale, expected.double()) <= 1e-6


def test_no_coefficient_at_all():
    hidden, weight, target, coefficient, bias = problem(20, 16, 70, with_bias=True)
    for owner in OWNERS:
        gradients = run(hidden, weight, target, coefficient * 0, bias, PLAIN, owner=owner)[2:]
        assert all((x == 0).all() for x in gradients)


# --------------------------------------------------------------------------------------------------------- grad_filter


def filtered(hidden, weight, target, coefficient, bias, transform, grad_filter):
    """Gradients from the blocks that grad_filter leaves, and which of all those are: by their size, by a target."""
    x = hidden.double() @ weight.double().T + (0 if bias is None else bias.double())
    u = transform.inner * x
    z = transform.outer * u.tanh() if transform.softcap else u
    p = z.softmax(1)
    onehot = torch.arange(len(weight), device=DEVICE) == target[:, None]
    slope = transform.inner * (transform.outer * (1 - u.tanh() ** 2) if transform.softcap else 1)
    gradient = coefficient[:, None] * (onehot.double() - p) * slope

    counts = (coefficient != 0)[:, None]
    large, has_target = (
        torch.stack([torch.stack([b.any() for b in part.split(BLOCKS.BLOCK_V, 1)]) for part in x.split(BLOCKS.BLOCK_N)])
        for x in ((p >= grad_filter) & counts, onehot & counts)
    )
    kept = (large | has_target).repeat_interleave(BLOCKS.BLOCK_N, 0).repeat_interleave(BLOCKS.BLOCK_V, 1)
    gradient = gradient * kept[: len(hidden), : len(weight)]
    return (gradient @ weight.double(), gradient.T @ hidden.double(), gradient.sum(0)), large, has_target


@pytest.mark.parametrize("owner", OWNERS)
@pytest.mark.parametrize("transform", [SCALED, CAPPED], ids=["scaled", "softcap"])
def test_grad_filter_skips_blocks_of_small_probabilities_that_no_target_needs(transform, owner):
    grad_filter = 0.05
    inputs = problem(70, 16, 300, with_bias=True, scale=1.5)
    truth, large, has_target = filtered(*inputs, transform, grad_filter)
    assert (~large & ~has_target).any()
    assert (~large & has_target).any()
    assert (large & ~has_target).any()
    assert (inputs[2] < 0).any()
    got = run(*inputs, transform, owner=owner, grad_filter=grad_filter)[2:]
    for x, expected in zip(got, truth, strict=True):
        assert error(x, expected) <= 2e-5


@pytest.mark.parametrize("owner", OWNERS)
def test_grad_filter_asks_neither_rows_nor_targets_that_do_not_count(owner):
    """With a probability above all others only blocks with a target stay: none of these has one."""
    hidden, weight, target, coefficient, _ = problem(16, 8, 64)
    target[:] = torch.tensor([-1, -100, -31, -32] * 4, device=DEVICE)
    target[5], coefficient[5] = 3, 0
    gradients = run(hidden, weight, target, coefficient, None, PLAIN, owner=owner, grad_filter=1.5)[2:]
    assert all((x == 0).all() for x in gradients)


def test_grad_filter_keeps_nan():
    hidden, weight, target, coefficient, _ = problem(16, 8, 64)
    lse = torch.full_like(coefficient, math.nan)
    options = {"needs": (True, False, False), "grad_filter": 1.5, "blocks": BLOCKS}
    grad_hidden, _, _ = cut_gradients(hidden, weight, target * 0 - 1, lse, coefficient, PLAIN, **options)
    assert grad_hidden[coefficient != 0].isnan().all()


# ------------------------------------------------------------------------------------- addresses of more than 31 bits


def sparse(size, dtype):
    """Memory that exists where it is touched."""
    no_reserve = 0x4000  # Linux's MAP_NORESERVE, which Python's mmap names since 3.12 only
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    try:
        memory = mmap.mmap(-1, size * dtype.itemsize, flags=flags)
    except OSError as failure:
        pytest.skip(f"no room for {size} elements in the address space: {failure}")
    return torch.frombuffer(memory, dtype=dtype)


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
def add_product_kernel(total, left, right, row, rows, hidden_size, BLOCK: tl.constexpr, BLOCK_H: tl.constexpr):
    place = tl.arange(0, BLOCK)
    left = tl.load(left + place[:, None] * BLOCK + place[None, :])
    right_rows = right + place * hidden_size
    cut_backward.add_product(
        *(total, left, right_rows, place < BLOCK, 1.0, row + place, rows, hidden_size, False, BLOCK, BLOCK_H, "ieee")
    )


@on_cpu
def test_gradients_of_more_than_2_to_the_31_elements():
    vocab, hidden_size = 2**18, 2**14 + 16
    total, left, right = sparse(vocab * hidden_size, torch.float32), torch.randn(16, 16), torch.randn(16, hidden_size)
    add_product_kernel[(1,)](total, left, right, vocab - 10, vocab, hidden_size, BLOCK=16, BLOCK_H=4096)
    last = total.view(vocab, hidden_size)[-10:]
    torch.testing.assert_close(last, (left @ right)[:10], rtol=1e-5, atol=1e-5)
