"""Sampled gradients behind the public ops: exact values, unbiased gradients, the same entries whatever the blocks."""

import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.memory import measure
from mopo_kernels import checks, linear_logprob, mopo_loss, sequence_logprob, win_rate_from_pairs
from mopo_kernels.backends.native import cpu
from mopo_kernels.head import plan
from mopo_kernels.head.call import HeadCall, Outputs
from mopo_kernels.head.sampled import sampled_gradients, sampled_logprob

pytestmark = pytest.mark.skipif(bool(cpu.UNAVAILABLE), reason=cpu.UNAVAILABLE)


@pytest.fixture(autouse=True, scope="module")
def any_floor():
    """The limit of exact gradients lies below what users may ask for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checks, "LEAST_GRAD_SAMPLING", 0.0)
        yield


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
OPTIONS = [{}, {"softcap": 4.0}, {"temperature": 0.7, "logit_scale": 1.5}, {"softcap": 3.0, "temperature": 0.8}]
TINY = 1e-7  # below every probability here: gradients are exact
EVERYTHING = {"return_lse": True, "return_entropy": True, "return_hit": True}


def make(n, h, v, dtype=torch.float32, *, seed=0, ignored=0.3, frozen=()):
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(0, v, (n,), generator=generator)
    target[torch.rand(n, generator=generator) < ignored] = -100
    named = [("hidden", (n, h)), ("weight", (v, h)), ("bias", (v,))]
    tensors = [torch.randn(shape, generator=generator).to(dtype) for _, shape in named]
    return *(x.requires_grad_(name not in frozen) for x, (name, _) in zip(tensors, named, strict=True)), target


def gradients(hidden, weight, bias, target, *, upstream=None, lse_upstream=None, **options):
    """logp and the gradients of those that have one."""
    logp, *more = linear_logprob(
        hidden, weight, target, bias=bias, **{"return_entropy": True, "return_lse": lse_upstream is not None, **options}
    )
    loss = (logp * (1 if upstream is None else upstream)).sum()
    if lse_upstream is not None:
        loss = loss + (more[0] * lse_upstream).sum()
    inputs = [x for x in (hidden, weight, bias) if x is not None and x.requires_grad]
    return [logp.detach(), *torch.autograd.grad(loss, inputs)]


def loss_of(hidden, weight, target, policy_step="clone", **options):
    pairs = len(target) // 2
    labels = (win_rate_from_pairs(torch.linspace(0.3, 0.7, pairs)[:, None]), torch.arange(pairs).repeat(2))
    options = {"ref_logp": torch.linspace(-9, -5, 2 * pairs), "policy_step": policy_step, **options}
    return mopo_loss(hidden, weight, target, *labels, torch.ones(1), tau=0.5, **options)


# ----------------------------------------------------------------------------------------------------------- unbiased


def check_unbiased(draws, exact, *, rare, rounding):
    """The mean of draws [D, P] is `exact` within its own standard error, and more precise than it is wrong.

    `rare`: six entries that no draw may have had.
    """
    draws, exact = draws.double(), exact.double()
    error = draws.std(0) / len(draws) ** 0.5
    off = (draws.mean(0) - exact).abs()
    assert (off <= 4.5 * error + rare / len(draws) + rounding).all()
    assert error.norm() < 0.3 * exact.norm()
    assert (draws.std(0) > 0).any()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("options", OPTIONS)
def test_the_mean_of_many_draws_is_the_exact_gradient_within_its_standard_error(options, backend):
    """A row many times over, with a random number each: its gradients are many draws of one."""
    copies, floor, v = 32, 0.2, 40
    for dtype in DTYPES if backend == "cpu" else [torch.float32]:
        torch.manual_seed(0)
        hidden, weight, bias, target = make(1, 6, v, dtype, ignored=0.0)
        bias = bias.detach().index_fill(0, (target + 3) % v, -math.inf).requires_grad_()
        hidden = hidden.detach().repeat(copies, 1).requires_grad_()
        call = {"upstream": 2.0, "lse_upstream": -0.5, **options}
        draws = []
        for _ in range(40 if backend == "cpu" else 15):
            draw = gradients(hidden, weight, bias, target.repeat(copies), grad_sampling=floor, backend=backend, **call)
            draws.append(draw[1:])
        wide = [x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
        exact = gradients(*wide, target.repeat(copies), backend="reference", **call)[1:]
        of_hidden, of_weight, of_bias = (torch.stack(x) for x in zip(*draws, strict=True))
        rare, eps = 6 * floor * 2.5 * options.get("logit_scale", 1), torch.finfo(dtype).eps
        size = weight.detach().double().norm(dim=1).max().item()
        eps_of = [max(2 * eps, 2e-6) * x.abs().max().item() for x in exact]
        check_unbiased(of_hidden.flatten(0, 1), exact[0][0], rare=rare * size, rounding=eps_of[0])
        check_unbiased(of_weight.flatten(1), exact[1].flatten(), rare=rare * size, rounding=eps_of[1])
        check_unbiased(of_bias, exact[2], rare=rare, rounding=eps_of[2])


@pytest.mark.parametrize("policy_step", ["clone", "contrast", "regress"])
def test_losses_and_coefficients_are_exact_and_gradients_unbiased(policy_step):
    torch.manual_seed(0)
    hidden, weight, _, target = make(4 * 8, 6, 60)
    hidden, target = hidden.detach().view(4, 8, 6).requires_grad_(), target.view(4, 8)
    exact = loss_of(hidden, weight, target, policy_step)
    wanted = torch.autograd.grad(exact.loss, (hidden, weight))
    tiny = loss_of(hidden, weight, target, policy_step, grad_sampling=TINY)
    torch.testing.assert_close(torch.autograd.grad(tiny.loss, (hidden, weight)), wanted, rtol=1e-3, atol=1e-4)
    draws = []
    for _ in range(60):
        sampled = loss_of(hidden, weight, target, policy_step, grad_sampling=0.1)
        torch.testing.assert_close(sampled.loss, exact.loss, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(sampled.logp, exact.logp, rtol=1e-6, atol=1e-6, equal_nan=True)
        draws.append(torch.cat([x.flatten() for x in torch.autograd.grad(sampled.loss, (hidden, weight))]))
    draws, wanted = torch.stack(draws), torch.cat([x.flatten() for x in wanted])
    check_unbiased(draws, wanted, rare=draws.abs().max().item(), rounding=2e-6 * wanted.abs().max().item())


# ------------------------------------------------------------------------------------------------------------- values


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(0, 40),
    v=st.integers(1, 300),
    workspace=st.integers(1, 200_000),
    ignored=st.sampled_from([0.0, 0.5, 1.0]),
    frozen=st.sampled_from([(), ("weight",), ("hidden", "bias"), ("weight", "bias"), ("hidden", "weight")]),
    options=st.sampled_from(OPTIONS),
    lse=st.booleans(),
    backend=st.sampled_from(["cpu", "reference"]),
    seed=st.integers(0, 10**6),
)
def test_a_floor_below_every_probability_gives_exact_gradients(
    n, v, workspace, ignored, frozen, options, lse, backend, seed
):
    """Whatever the blocks, the rows that count, what is frozen and what else is asked for."""
    inputs = make(n, 5, v, torch.float64, seed=seed, ignored=ignored, frozen=frozen)
    generator = torch.Generator().manual_seed(seed)
    upstream, of_lse = torch.randn(2, n, generator=generator, dtype=torch.float64)
    call = {"upstream": upstream, "lse_upstream": of_lse if lse else None, "workspace_bytes": workspace, **options}
    got = gradients(*inputs, **call, grad_sampling=1e-12, backend=backend)
    torch.testing.assert_close(got, gradients(*inputs, **call, backend="reference"), rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("ignore_index", [-100, -1])
def test_an_upstream_gradient_of_nan_where_a_row_does_not_count_is_none(backend, ignore_index):
    """A ratio that is masked after it was taken: 0 · ∞ and 0/0 of rows that do not count."""
    *inputs, target = make(30, 5, 40, torch.float64)
    counts = target != -100
    upstream = torch.where(counts, 1.5, torch.where(torch.arange(30) % 2 == 0, math.nan, math.inf))
    target = target.where(counts, ignore_index)
    call = {"upstream": upstream, "ignore_index": ignore_index}
    got = gradients(*inputs, target, grad_sampling=1e-12, backend=backend, **call)
    wanted = gradients(*inputs, target, backend="reference", upstream=1.5, ignore_index=ignore_index)
    torch.testing.assert_close(got[1:], wanted[1:], rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize("dtype", DTYPES)
def test_16_bits_are_summed_in_float32_and_rounded_once(dtype):
    inputs = make(64, 24, 400, dtype)
    got = gradients(*inputs, grad_sampling=1e-12)
    *wide, target = inputs
    exact = gradients(*(x.detach().double().requires_grad_() for x in wide), target)
    for ours, truth in zip(got[1:], exact[1:], strict=True):
        assert ours.dtype == dtype
        bound = max(torch.finfo(dtype).eps, 2e-5 if dtype != torch.float64 else 1e-11)
        assert (ours.double() - truth).norm() <= bound * truth.norm()


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_values_have_the_same_bits_as_without(reduction):
    hidden, weight, bias, target = make(50, 12, 500)
    plain = linear_logprob(hidden.detach(), weight, target, bias=bias, reduction=reduction, **EVERYTHING)
    sampled = linear_logprob(
        hidden.detach(), weight, target, bias=bias, reduction=reduction, grad_sampling=0.1, **EVERYTHING
    )
    assert all(torch.equal(x, y) for x, y in zip(plain, sampled, strict=True))


def test_masked_targets_and_certain_tokens():
    """A target of probability 0 and rows with all mass in one token: finite gradients, and those of the exact op."""
    hidden = torch.tensor([[50.0, 1.0], [50.0, -1.0], [1.0, 1.0]], requires_grad=True)
    weight = torch.tensor([[2.0, 0.0], [0.0, 0.0], [0.0, 1.0], [0.0, -1.0]], requires_grad=True)
    bias = torch.tensor([0.0, 0.0, 0.0, -math.inf], requires_grad=True)
    target, of_lse = torch.tensor([0, 1, 3]), torch.tensor([0.3, -0.2, 0.1])
    for softcap, floor in ((None, 0.01), (5.0, TINY)):
        options = {"softcap": softcap, "lse_upstream": of_lse}
        got = gradients(hidden, weight, bias, target, grad_sampling=floor, **options)
        torch.testing.assert_close(got[1][:2], gradients(hidden, weight, bias, target, **options)[1][:2])
        assert all(x.isfinite().all() for x in got[1:])


# ------------------------------------------------------------------------------------------------------- same numbers


def drawn(hidden, weight, bias, target, uniform, *, backend="cpu", workspace=None, floor=0.05, softcap=None):
    call = HeadCall.of(
        temperature=1.0, softcap=softcap, ignore_index=-100, workspace_bytes=workspace, grad_sampling=floor
    )
    return sampled_logprob(hidden, weight, bias, target, uniform, call.on(backend).flat())[4:7]


@pytest.mark.parametrize("softcap", [None, 20.0])
def test_blocks_of_rows_and_columns_and_backends_draw_the_same_entries(softcap):
    """Of small whole numbers, whose products no order of summation rounds."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randint(-2, 3, (64, 8), generator=generator).float()
    weight = torch.randint(-1, 2, (2000, 8), generator=generator).float()
    target = torch.randint(0, 2000, (64,), generator=generator).index_fill(0, torch.tensor([3, 60]), -100)
    uniform = torch.rand(64, generator=generator, dtype=torch.float64)
    draw = functools.partial(drawn, hidden, weight, None, target, uniform, softcap=softcap)
    whole = draw(workspace=2**26)
    assert whole[2].tolist() == [0 if y < 0 else n for y, n in zip(target.tolist(), whole[2].tolist(), strict=True)]
    assert whole[2].float().mean() > 10
    for workspace in (2**19, 2**17, 2**14):
        planned = plan.make_plan(plan.HeadSizes(62, 8, 2000, torch.float32, torch.float32), workspace, "fused")
        assert planned.resident == (workspace == 2**19)
        torch.testing.assert_close(draw(workspace=workspace), whole, rtol=1e-5, atol=1e-8)  # lse has rounding
    torch.testing.assert_close(draw(backend="reference"), whole, rtol=1e-5, atol=1e-8)


def test_runs_and_thread_counts_give_the_same_bits():
    hidden, weight, bias, target = make(70, 33, 3000)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            torch.manual_seed(3)
            call = HeadCall.of(temperature=1.0, ignore_index=-100, grad_sampling=0.01).on("cpu", (True, True, True))
            columns, values, counts = drawn(
                hidden, weight, bias, target, torch.rand(70, dtype=torch.float64), floor=0.01
            )
            results.append([columns, *sampled_gradients(columns, values, counts, hidden, weight, bias, call.flat())])
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(results[1], results[2], rtol=0, atol=0)
    samples = columns, values, counts
    try:  # the same samples: the products of the logits may differ between numbers of threads
        for count in (1, 2):
            torch.set_num_threads(count)
            got = sampled_gradients(*samples, hidden, weight, bias, call.flat())
            assert all(torch.equal(x, y) for x, y in zip(got, results[2][1:], strict=True))
    finally:
        torch.set_num_threads(threads)


def test_manual_seed_decides_and_evaluation_draws_nothing():
    hidden, weight, _, target = make(20, 6, 300)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(gradients(hidden, weight, None, target, grad_sampling=0.1)[1:])
    assert all(torch.equal(x, y) for x, y in zip(*results[:2], strict=True))
    assert not torch.equal(results[0][0], results[2][0])
    before = torch.get_rng_state()
    with torch.no_grad():
        linear_logprob(hidden, weight, target, grad_sampling=0.1)
    linear_logprob(hidden.detach(), weight.detach(), target, grad_sampling=0.1)
    linear_logprob(hidden, weight, target)
    assert torch.equal(torch.get_rng_state(), before)


# ------------------------------------------------------------------------------------------------------ memory, flops


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frozen", [(), ("weight",)], ids=["trained", "frozen head"])
def test_memory_is_workspace_gradients_and_entries(dtype, frozen, monkeypatch):
    """No tensor of all logits, and of a 16-bit head no float32 copy and no float32 gradient."""
    monkeypatch.setattr(plan.native, "multiplies", lambda dtype: dtype != torch.bfloat16)
    n, h, v, workspace, floor = 1024, 128, 8192, 2**20, 2.0**-5
    hidden, weight, _, target = make(n, h, v, dtype, frozen=("bias", *frozen))

    def run():
        linear_logprob(hidden, weight, target, workspace_bytes=workspace, grad_sampling=floor).sum().backward()
        hidden.grad = weight.grad = None

    run()
    peak, largest = measure(run)
    entries = n * 35 * (4 + 4)
    weight_gradient = 0 if frozen else weight.numel() * dtype.itemsize
    assert peak <= 1.1 * (workspace + n * h * dtype.itemsize + weight_gradient) + 5 * entries
    assert largest <= max(workspace, weight_gradient, 2 * entries)


@pytest.mark.parametrize("policy_step", ["clone", "contrast"])
def test_logits_are_formed_once_whatever_the_step(policy_step, monkeypatch):
    """And no product more: per-row log-probs and groups that fit no workspace would take 8·N·H·V exactly."""
    formed = []
    monkeypatch.setattr(torch, "mm", lambda a, b, out: formed.append(out.numel()) or torch.matmul(a, b, out=out))
    monkeypatch.setattr("mopo_kernels.head.tiles.add_product", lambda *_, **__: pytest.fail("a product"))
    hidden, weight, _, target = make(8 * 100, 6, 900, ignored=0.0)
    hidden = hidden.view(8, 100, 6)
    loss = loss_of(hidden, weight, target.view(8, 100), policy_step, grad_sampling=0.1, workspace_bytes=2**19).loss
    torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    assert sum(formed) == 800 * 900


# ---------------------------------------------------------------------------------------------------- as torch sees it


CALL = HeadCall.of(temperature=2.0, softcap=2.0, ignore_index=-100, grad_sampling=0.1).on("cpu", (True, True, True))


@pytest.mark.parametrize("outputs", [Outputs(), Outputs(True, True, True)])
def test_opcheck(outputs):
    hidden, weight, bias, target = make(30, 8, 300)
    uniform = torch.rand(30, dtype=torch.float64)
    call = HeadCall.of(temperature=2.0, softcap=2.0, ignore_index=-100, grad_sampling=0.1, outputs=outputs).on("cpu")
    torch.library.opcheck(sampled_logprob, (hidden, weight, bias, target, uniform, call.flat()))
    with torch.no_grad():
        samples = drawn(hidden, weight, bias, target, uniform)
    frozen = [x.detach() for x in (hidden, weight, bias)]
    torch.library.opcheck(sampled_gradients, (*samples, *frozen, CALL.flat()))
    transposed = [x.detach().t().contiguous().t().requires_grad_() for x in (hidden, weight)]
    torch.library.opcheck(sampled_logprob, (*transposed, bias, target, uniform, call.flat()))
    torch.testing.assert_close(
        sampled_gradients(*samples, *transposed, bias, CALL.flat()),
        sampled_gradients(*samples, hidden, weight, bias, CALL.flat()),
    )


@pytest.mark.parametrize("what", ["z-loss", "clone"])
def test_it_compiles_without_graph_breaks(what):
    hidden, weight, _, target = make(8 * 5, 8, 300)
    hidden, target = hidden.detach().view(8, 5, 8).requires_grad_(), target.view(8, 5)

    def run(hidden, weight):
        if what == "clone":
            return loss_of(torch.tanh(hidden), weight, target, grad_sampling=0.1).loss
        logp, lse = linear_logprob(torch.tanh(hidden), weight, target, return_lse=True, grad_sampling=0.1)
        return (logp + lse**2).sum()

    results = []
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(0)
        loss = function(hidden, weight)
        results.append([loss.detach(), *torch.autograd.grad(loss, (hidden, weight))])
    torch.testing.assert_close(*results)


def test_sequences_autocast_and_batched_gradients():
    hidden, weight, _, target = make(30, 8, 300)
    torch.manual_seed(0)
    sums = sequence_logprob(hidden[None], weight, target[None], grad_sampling=0.1)
    torch.manual_seed(0)
    rows = linear_logprob(hidden, weight, target, grad_sampling=0.1)
    torch.testing.assert_close(sums[0], rows.sum())
    assert torch.equal(*(torch.autograd.grad(x.sum(), weight)[0] for x in (sums, rows)))
    results = []
    for inputs, enabled in (((hidden, weight), True), ((hidden.bfloat16(), weight.bfloat16()), False)):
        torch.manual_seed(0)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            logp = linear_logprob(*inputs, target, grad_sampling=0.1)
        results.append(torch.autograd.grad(logp.sum(), (hidden, weight)))
    torch.testing.assert_close(*results, rtol=0, atol=0)
    torch.manual_seed(0)
    logp = linear_logprob(hidden, weight, target, grad_sampling=0.1)
    upstream = torch.randn(2, 30)
    batched = torch.autograd.grad(logp, (hidden, weight), upstream, is_grads_batched=True, retain_graph=True)
    for i, one in enumerate(upstream):
        expected = torch.autograd.grad(logp, (hidden, weight), one, retain_graph=True)
        torch.testing.assert_close([x[i] for x in batched], list(expected))


def test_what_it_is_not_for_is_refused_by_name():
    hidden, weight, _, target = make(6, 4, 30)
    logp = linear_logprob(hidden, weight, target, grad_sampling=0.1)
    with pytest.raises(RuntimeError, match=r"differentiable once.*leave grad_sampling out"):
        torch.autograd.grad(torch.autograd.grad(logp.sum(), hidden, create_graph=True)[0].sum(), hidden)
    for backend in ("cpu", "reference"):
        linear = functools.partial(linear_logprob, target=target, grad_sampling=0.1, backend=backend)
        with pytest.raises(RuntimeError, match=r"linear_logprob with grad_sampling .* None of it"):
            torch.func.grad(lambda x, linear=linear: linear(x, weight.detach()).sum())(hidden.detach())


def test_the_cut_kernels_have_no_logits_to_draw_from():
    hidden, weight, _, target = make(6, 4, 30)
    with pytest.raises(ValueError, match=r"grad_sampling=0.1 needs logits.*backend='cut'.*tile engine"):
        linear_logprob(hidden, weight, target, grad_sampling=0.1, backend="cut")
