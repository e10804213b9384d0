"""The tile engine behind the public ops: every plan gives the reference's numbers, and no plan needs more memory."""

import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shapes import DTYPES, ONE_COLUMN_LEFT

from bench.memory import measure
from mopo_kernels import linear_logprob, mopo_loss, token_logprob, win_rate_from_pairs
from mopo_kernels.backends import memory as backend_memory
from mopo_kernels.backends.native import cpu
from mopo_kernels.head import plan, tiles

pytestmark = pytest.mark.skipif(bool(cpu.UNAVAILABLE), reason=cpu.UNAVAILABLE)


@pytest.fixture(params=[False, True], ids=["panels", "bf16 products"])
def multiplies_bfloat16(request, monkeypatch):
    widened = {torch.float16} if request.param else {torch.float16, torch.bfloat16}
    monkeypatch.setattr(plan.native, "multiplies", lambda dtype: dtype not in widened)


@pytest.fixture
def poisoned():
    """Fresh memory holds NaN, so that reading what nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def make(n, h, v, dtype, *, seed=0, with_bias=False, ignored=0.3):
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(0, v, (n,), generator=generator)
    target[torch.rand(n, generator=generator) < ignored] = -100
    shapes = [(n, h), (v, h), (v,)]
    hidden, weight, bias = (torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes)
    return hidden, weight, bias if with_bias else None, target


def values_and_gradients(inputs, target, upstream, backend, **options):
    hidden, weight, bias = inputs
    logp = linear_logprob(hidden, weight, target, bias=bias, backend=backend, **options)
    differentiable = [x for x in inputs if x is not None]
    return [logp.detach(), *torch.autograd.grad(logp, differentiable, upstream.to(logp.dtype))]


def exact(inputs, target, upstream, **options):
    wide = [None if x is None else x.detach().double().requires_grad_() for x in inputs]
    return values_and_gradients(wide, target, upstream, "reference", **options)


def eager(inputs, target, upstream, **options):
    """What the plain composition gives in the inputs' own dtype: the yardstick for errors."""
    return values_and_gradients(inputs, target, upstream, "reference", **options)


def relative_error(got, truth):
    return ((got.double() - truth).norm() / truth.norm().clamp(min=1e-30)).item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("workspace", [3_000, 60_000, None], ids=["columns", "rows", "kept"])
def test_as_accurate_as_eager(dtype, workspace, multiplies_bfloat16, poisoned):
    inputs = make(150, 24, 700, dtype)
    *tensors, target = inputs
    upstream = torch.randn(150)
    options = {"temperature": 0.9, "logit_scale": 0.2}
    truth = exact(tensors, target, upstream, **options)
    ours = values_and_gradients(tensors, target, upstream, "cpu", workspace_bytes=workspace, **options)
    theirs = eager(tensors, target, upstream, **options)
    floor = 4 * torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    for got, yardstick, expected in zip(ours, theirs, truth, strict=True):
        assert relative_error(got, expected) <= 1.5 * relative_error(yardstick, expected) + floor


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(0, 40),
    h=st.integers(1, 9),
    v=st.integers(1, 300),
    workspace=st.integers(1, 200_000),
    with_bias=st.booleans(),
    ignored=st.sampled_from([0.0, 0.5, 1.0]),
    frozen=st.sampled_from(["nothing", "weight", "hidden"]),
    softcap=st.sampled_from([None, 3.0]),
    seed=st.integers(0, 10**6),
)
def test_ragged_shapes_and_workspaces(n, h, v, workspace, with_bias, ignored, frozen, softcap, seed):
    hidden, weight, bias, target = make(
        n, h, v, torch.float64, seed=seed, with_bias=with_bias and frozen == "nothing", ignored=ignored
    )
    hidden.requires_grad_(frozen != "hidden")
    weight.requires_grad_(frozen != "weight")
    inputs = [x for x in (hidden, weight, bias) if x is not None and x.requires_grad]
    upstream = torch.randn(n, dtype=torch.float64)
    results = []
    for backend in ("cpu", "reference"):
        options = {"workspace_bytes": workspace} if backend == "cpu" else {}
        logp = linear_logprob(hidden, weight, target, bias=bias, softcap=softcap, backend=backend, **options)
        results.append([logp, *torch.autograd.grad(logp, inputs, upstream)])
    torch.testing.assert_close(*results, rtol=1e-11, atol=1e-11)


def test_views_and_transposes_are_read_as_they_are():
    hidden, weight, _, target = make(20, 6, 50, torch.float32)
    strided = torch.stack([hidden, hidden]).transpose(0, 1)[:, 1].detach().requires_grad_()
    transposed = weight.detach().t().contiguous().t().requires_grad_()
    upstream = torch.randn(20)
    ours = values_and_gradients((strided, transposed, None), target, upstream, "cpu")
    torch.testing.assert_close(ours, values_and_gradients((hidden, weight, None), target, upstream, "reference"))


def loss_of(hidden, weight, target, policy_step, **options):
    pairs = len(target) // 2
    output = mopo_loss(
        hidden,
        weight,
        target,
        win_rate_from_pairs(torch.linspace(0.3, 0.7, pairs, dtype=torch.float64)[:, None]),
        torch.arange(pairs).repeat(2),
        torch.ones(1, dtype=torch.float64),
        tau=0.5,
        policy_step=policy_step,
        ref_logp=torch.linspace(-9, -5, 2 * pairs),
        **options,
    )
    return output.loss


def step(policy_step, hidden, weight, target, *, scale=1.0, **options):
    def run():
        (loss_of(hidden, weight, target, policy_step, **options) * scale).backward()
        hidden.grad = weight.grad = None

    run()  # whatever is allocated once is not the function's
    return run


@pytest.mark.parametrize("policy_step", ["clone", "contrast", "regress"])
@pytest.mark.parametrize("workspace", [2**20, 4 * 2**20], ids=["recompute", "one pass"])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_memory_of_the_loss_is_workspace_plus_gradients_whatever_the_rows(policy_step, workspace, scale):
    h, v = 64, 4096
    weight = torch.randn(v, h, requires_grad=True)
    for sequences in (8, 32):
        hidden = torch.randn(sequences, 64, h, requires_grad=True)
        target = torch.randint(0, v, (sequences, 64))
        run = step(policy_step, hidden, weight, target, scale=scale, workspace_bytes=workspace)
        peak, largest = measure(run)
        gradients = 4 * (hidden.numel() + weight.numel())
        assert peak <= 1.1 * (workspace + gradients)
        assert largest < sequences * 64 * v * 4  # no tensor of all logits, or of half their bytes
        assert largest <= max(workspace, 4 * weight.numel(), 4 * hidden.numel())


EVERYTHING = {"return_lse": True, "return_entropy": True, "return_hit": True}


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(0, 40),
    v=st.integers(1, 300),
    workspace=st.integers(1, 200_000),
    ignored=st.sampled_from([0.0, 0.5, 1.0]),
    frozen=st.sampled_from(["nothing", "weight", "hidden"]),
    softcap=st.sampled_from([None, 3.0]),
    upstream=st.sampled_from([(1, 1), (0, 1), (1, None), (None, 1)]),
    seed=st.integers(0, 10**6),
)
def test_what_else_is_returned_in_ragged_shapes_and_workspaces(
    n, v, workspace, ignored, frozen, softcap, upstream, seed
):
    """lse has its own upstream gradient: beside logp's, against it, or alone."""
    hidden, weight, _, target = make(n, 5, v, torch.float64, seed=seed, ignored=ignored)
    inputs = [x.requires_grad_(name != frozen) for name, x in (("hidden", hidden), ("weight", weight))]
    inputs = [x for x in inputs if x.requires_grad]
    gradients = torch.randn(2, n, dtype=torch.float64)
    results = []
    for backend in ("cpu", "reference"):
        options = {"softcap": softcap, "backend": backend, "workspace_bytes": workspace}
        logp, lse, entropy, hit = linear_logprob(hidden, weight, target, **options, **EVERYTHING)
        asked = [(x, g * y) for x, g, y in zip((logp, lse), gradients, upstream, strict=True) if y is not None]
        values, upstreams = zip(*asked, strict=True)
        results.append([logp, lse, entropy, hit, *torch.autograd.grad(values, inputs, upstreams)])
    torch.testing.assert_close(*results, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", DTYPES)
def test_lse_and_entropy_are_as_accurate_as_eager(dtype, multiplies_bfloat16):
    hidden, weight, _, target = make(150, 24, 700, dtype)

    def run(hidden, weight, backend, **options):
        logp, lse, entropy = linear_logprob(
            hidden, weight, target, backend=backend, return_lse=True, return_entropy=True, **options
        )
        return lse, entropy, *torch.autograd.grad((logp + 0.1 * lse**2).sum(), (hidden, weight))

    truth = run(*(x.detach().double().requires_grad_() for x in (hidden, weight)), "reference")
    theirs = run(hidden, weight, "reference")
    for workspace in (3_000, 60_000, None):
        ours = run(hidden, weight, "cpu", workspace_bytes=workspace)
        for got, yardstick, expected, bound in zip(ours, theirs, truth, [2e-6, 2e-6, 2e-5, 2e-5], strict=True):
            assert relative_error(got, expected) <= max(2 * relative_error(yardstick, expected), bound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("more", [{}, EVERYTHING], ids=["logp", "everything"])
def test_memory_of_the_log_probs(dtype, frozen, more, monkeypatch):
    """bfloat16 through float32 panels: the weight is never widened as a whole; a frozen one has no gradient at all."""
    monkeypatch.setattr(plan.native, "multiplies", lambda dtype: dtype != torch.bfloat16)
    n, h, v, workspace = 1024, 128, 8192, 2**20
    hidden, weight, _, target = make(n, h, v, dtype)
    weight.requires_grad_(not frozen)

    def run():
        results = linear_logprob(hidden, weight, target, workspace_bytes=workspace, **more)
        (sum(x.sum() for x in results[:2]) if more else results.sum()).backward()
        hidden.grad = weight.grad = None

    run()
    peak, largest = measure(run)
    size = dtype.itemsize
    # A 16-bit weight's gradient is summed in float32 where more than one block adds to it.
    weight_gradient = 0 if frozen else weight.numel() * (4 if size == 4 else 4 + size)
    assert peak <= 1.1 * (workspace + n * h * size + weight_gradient)
    assert largest < n * v * size
    if frozen:
        assert largest <= workspace


@pytest.mark.parametrize("policy_step", ["clone", "contrast"])
def test_runs_agree_bitwise_and_thread_counts_to_rounding(policy_step):
    hidden = torch.randn(8, 40, 32, requires_grad=True)
    weight = torch.randn(3000, 32, requires_grad=True)
    target = torch.randint(0, 3000, (8, 40))
    threads, results = torch.get_num_threads(), []
    try:
        for count in (2, 2, 1):
            torch.set_num_threads(count)
            loss = loss_of(hidden, weight, target, policy_step, workspace_bytes=2**20)
            results.append([loss.detach(), *torch.autograd.grad(loss, (hidden, weight))])
    finally:
        torch.set_num_threads(threads)
    for first, again, alone in zip(*results, strict=True):
        assert torch.equal(first, again)
        torch.testing.assert_close(alone, first, rtol=1e-4, atol=1e-5 * first.abs().max().item())


def test_large_memory_is_advised_to_lie_on_huge_pages():
    smaps = Path("/proc/self/smaps")
    if not smaps.exists() or "VmFlags" not in smaps.read_text():
        pytest.skip("needs a Linux kernel that lists the flags of memory")
    x = backend_memory.new_empty(torch.empty(0), (2**24,), torch.float32)  # 64 MiB, which malloc maps alone
    middle = x.data_ptr() + 2**25
    for area in re.finditer(r"^([0-9a-f]+)-([0-9a-f]+) .*\n(?:[A-Z].*\n)*?VmFlags: (.*)$", smaps.read_text(), re.M):
        if int(area[1], 16) <= middle < int(area[2], 16):
            assert "hg" in area[3].split()  # huge pages advised
            break
    else:
        pytest.fail("the tensor's memory is not listed")
    for shape in ((0,), (3,)):
        assert backend_memory.new_empty(torch.empty(0), shape, torch.float64).shape == shape


# ---------------------------------------------------------------------------------------------------------- reductions


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 40),
    ignored=st.sampled_from([0.0, 0.5, 1.1]),
    workspace=st.sampled_from([3_000, 20_000, None]),
    reduction=st.sampled_from(["sum", "mean"]),
    needs=st.sampled_from([(True, True), (True, False), (False, True), (False, False)]),
    options=st.sampled_from([{}, {"softcap": 4.0, "temperature": 0.8, "logit_scale": 0.5}]),
    seed=st.integers(0, 10**6),
)
def test_a_reduction_is_that_of_the_rows(rows, ignored, workspace, reduction, needs, options, seed):
    hidden, weight, bias, target = make(rows, 7, 150, torch.float64, with_bias=True, ignored=ignored, seed=seed)
    hidden, weight = (x.detach().requires_grad_(need) for x, need in zip((hidden, weight), needs, strict=True))
    bias = bias.detach()
    inputs = [x for x in (hidden, weight) if x.requires_grad]

    def value_and_gradients(value):
        return [value, *(torch.autograd.grad(3 * value, inputs) if inputs else ())]

    one = linear_logprob(
        hidden, weight, target, bias=bias, reduction=reduction, workspace_bytes=workspace, backend="cpu", **options
    )
    assert one.shape == ()
    logp = linear_logprob(hidden, weight, target, bias=bias, backend="reference", **options)
    counted = (target != -100).sum().clamp(min=1) if reduction == "mean" else 1
    expected = value_and_gradients(logp.sum() / counted)
    torch.testing.assert_close(value_and_gradients(one), expected, rtol=1e-9, atol=1e-10)


def counted_logits(monkeypatch):
    """A list that gets the size of every product of hidden and weight from now on."""
    formed, form = [], tiles.TileEngine._form

    def counting(engine, hidden, columns, logits):
        formed.append(logits.numel())
        return form(engine, hidden, columns, logits)

    monkeypatch.setattr(tiles.TileEngine, "_form", counting)
    return formed


@pytest.mark.parametrize(
    ("reduction", "room", "frozen", "times"),
    [
        ("sum", 0.99, False, 1),
        ("mean", 0.99, False, 1),
        ("none", 0.99, False, 2),
        ("none", 1.5, False, 1),  # kept
        ("none", 0.99, True, 1),  # LoRA: hidden's gradient needs only to be scaled row by row
    ],
)
def test_how_often_logits_are_formed(monkeypatch, reduction, room, frozen, times):
    hidden, weight, _, target = make(64, 8, 3000, torch.float32, ignored=0.0)
    weight.requires_grad_(not frozen)
    formed = counted_logits(monkeypatch)
    options = {"reduction": reduction, "backend": "cpu", "workspace_bytes": int(room * 64 * 3000 * 4)}
    linear_logprob(hidden, weight, target, **options).sum().backward()
    assert sum(formed) == times * 64 * 3000


@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize(
    "target",
    [
        torch.arange(24)[::2],
        torch.arange(12).flip(0).int(),
        torch.arange(12).to(torch.uint8),
        torch.tensor([3]).expand(12),
        torch.arange(24, dtype=torch.int16)[::2],
    ],
    ids=["every other", "int32", "uint8", "expanded", "int16, every other"],
)
def test_targets_of_any_integers_and_strides(target, reduction):
    """And an upstream gradient of stride 0, which .sum() gives."""
    hidden, weight, _, _ = make(12, 7, 60, torch.float64)
    results = []
    for backend, ids in (("cpu", target), ("reference", target.long().contiguous())):
        total = linear_logprob(hidden, weight, ids, reduction=reduction, backend=backend).sum()
        results.append([total, *torch.autograd.grad(total, (hidden, weight))])
        logits = (hidden @ weight.T).detach()
        results[-1].append(token_logprob(logits, ids, backend=backend))
    torch.testing.assert_close(*results, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_an_ignore_index_that_the_targets_dtype_cannot_hold(dtype, backend):
    """156 is what −100 becomes in uint8: a token like any other."""
    hidden, weight, _, _ = make(4, 6, 200, torch.float64)
    target = torch.tensor([156, 3, 99, 156])
    means = [
        linear_logprob(hidden.detach(), weight, x, reduction="mean", backend=backend)
        for x in (target, target.to(dtype))
    ]
    assert torch.equal(*means)
    losses = []
    for ids in (target, target.to(dtype)):
        labels = (torch.tensor([[1.0], [0.0]]), torch.zeros(2, dtype=torch.int64), torch.ones(1))
        losses.append(mopo_loss(hidden.view(2, 2, 6), weight, ids.view(2, 2), *labels, tau=0.08, backend=backend))
    assert losses[0].logp.isnan().tolist() == [False, True]  # the loser is left out
    torch.testing.assert_close(losses[0].loss, losses[1].loss, rtol=0, atol=0)


@pytest.mark.parametrize("vocab", ONE_COLUMN_LEFT)
def test_a_last_block_of_one_column(vocab):
    hidden, weight, _, target = make(9, 5, vocab, torch.float64, ignored=0.0)
    target[0] = vocab - 1
    inputs, upstream = (hidden, weight, None), torch.randn(9, dtype=torch.float64)
    ours = values_and_gradients(inputs, target, upstream, "cpu", workspace_bytes=20_000)
    torch.testing.assert_close(ours, exact(inputs, target, upstream), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("ignored", [0.0, 0.2], ids=["slices", "gathered"])
def test_sums_over_many_column_blocks_are_rounded_once(ignored, monkeypatch):
    monkeypatch.setattr(plan.native, "multiplies", lambda dtype: dtype != torch.bfloat16)
    hidden, weight, _, target = make(40, 16, 8000, torch.bfloat16, ignored=ignored)
    inputs, upstream = (hidden, weight, None), torch.randn(40)
    truth = exact(inputs, target, upstream)[1]
    (ours,) = values_and_gradients(inputs, target, upstream, "cpu", workspace_bytes=60_000)[1:2]
    assert relative_error(ours, truth) <= 1.1 * relative_error(truth.bfloat16(), truth)


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_gradients_of_several_backwards_add_up(scale):
    hidden, weight, _, target = make(30, 8, 90, torch.float32)
    for _ in range(2):
        (scale * linear_logprob(hidden, weight, target, reduction="sum", backend="cpu")).backward()
    exact_logp = linear_logprob(hidden.double(), weight.double(), target, backend="reference").sum()
    expected = torch.autograd.grad(2 * scale * exact_logp, (hidden, weight))
    for x, truth in zip((hidden, weight), expected, strict=True):
        assert relative_error(x.grad, truth) <= 2e-5
