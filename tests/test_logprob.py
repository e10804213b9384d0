"""linear_logprob, token_logprob, sequence_logprob against an independent float64 formula, and their errors."""

import functools
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shapes import SHAPES

from mopo_kernels import linear_logprob, sequence_logprob, token_logprob
from mopo_kernels.backends import triton

OPTIONS = [  # each option alone, then all together
    {},
    {"bias": True},
    {"temperature": 0.7},
    {"softcap": 5.0},
    {"logit_scale": 0.25},
    {"bias": True, "temperature": 1.6, "softcap": 8.0, "logit_scale": 2.0},
]


def make(n, h, v, *, dtype=torch.float64, seed=0, bias=False):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, h, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(v, h, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    b = torch.randn(v, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() if bias else None
    target = torch.randint(0, v, (n,), generator=generator)
    target[1::4] = -100
    return hidden, weight, b, target


def formula(hidden, weight, bias, target, *, temperature=1.0, softcap=None, logit_scale=1.0):
    """Row by row, in float64, without any trick."""
    rows = []
    for h, t in zip(hidden.double(), target.tolist(), strict=True):
        if t == -100:
            rows.append(h.sum() * 0)
            continue
        z = (weight.double() * h).sum(-1)
        z = (z + (0 if bias is None else bias.double())) * logit_scale
        z = z if softcap is None else torch.where(z.isinf(), z.detach(), softcap * torch.tanh(z / softcap))
        p = torch.softmax(z / temperature, -1)
        rows.append(p[t].log())
    return torch.stack(rows)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("options", OPTIONS)
def test_forward_and_gradients_match_the_formula(shape, options):
    options = dict(options)
    hidden, weight, bias, target = make(*shape, bias=options.pop("bias", False))
    upstream = torch.randn(shape[0], dtype=torch.float64)
    inputs = [x for x in (hidden, weight, bias) if x is not None]
    logp = linear_logprob(hidden, weight, target, bias=bias, **options)
    expected = formula(hidden, weight, bias, target, **options)
    torch.testing.assert_close(logp, expected, rtol=1e-12, atol=1e-12)
    ours = torch.autograd.grad(logp, inputs, upstream)
    theirs = torch.autograd.grad(expected, inputs, upstream)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_gradcheck():
    hidden, weight, bias, target = make(6, 4, 7, bias=True)
    assert torch.autograd.gradcheck(
        lambda h, w, b: linear_logprob(h, w, target, bias=b, softcap=3.0, temperature=0.8), (hidden, weight, bias)
    )
    assert torch.autograd.gradcheck(lambda z: token_logprob(z, target, softcap=3.0), (make(6, 7, 1)[0],))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_stays_within_twice_the_error_of_eager(dtype):
    hidden, weight, _, target = make(64, 32, 300, dtype=dtype)
    truth = formula(hidden, weight, None, target)
    eager = torch.log_softmax(torch.nn.functional.linear(hidden, weight), -1)
    eager = eager.gather(-1, target.clamp(min=0)[:, None])[:, 0].where(target != -100, 0)
    logp = linear_logprob(hidden, weight, target)
    assert logp.dtype == torch.float32

    def error(x):
        return (x.double() - truth).norm() / truth.norm()

    assert error(logp) <= max(2 * error(eager), 2e-6)
    if dtype == torch.float32:
        assert error(logp) <= 2e-6


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(0, 9),
    h=st.integers(1, 7),
    v=st.integers(1, 40),
    seed=st.integers(0, 10**6),
    block=st.integers(1, 200),
)
def test_blocks_of_rows_change_nothing(n, h, v, seed, block):
    hidden, weight, _, target = make(n, h, v, seed=seed)
    whole = linear_logprob(hidden, weight, target)
    parts = linear_logprob(hidden, weight, target, workspace_bytes=block * 8)
    torch.testing.assert_close(parts, whole, rtol=1e-13, atol=1e-13)
    upstream = torch.randn(n, dtype=torch.float64)
    for ours, theirs in zip(
        torch.autograd.grad(parts, (hidden, weight), upstream),
        torch.autograd.grad(whole, (hidden, weight), upstream),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(shift=st.floats(-1e4, 1e4), seed=st.integers(0, 10**6))
def test_shifting_all_logits_of_a_row_changes_nothing(shift, seed):
    logits = make(5, 11, 1, seed=seed)[0].detach()
    target = torch.tensor([0, 10, -100, 5, 3])
    torch.testing.assert_close(token_logprob(logits + shift, target), token_logprob(logits, target), rtol=0, atol=1e-9)


def test_ignored_rows_are_zero_and_never_read():
    hidden, weight, _, target = make(8, 4, 9)
    poisoned = hidden.detach().clone()
    poisoned[target == -100] = float("nan")
    poisoned.requires_grad_()
    logp = linear_logprob(poisoned, weight, target)
    assert (logp[target == -100] == 0).all()
    grad_hidden, grad_weight = torch.autograd.grad(logp.sum(), (poisoned, weight))
    assert (grad_hidden[target == -100] == 0).all()
    assert grad_weight.isfinite().all()


def test_all_rows_ignored():
    hidden, weight, _, target = make(4, 3, 5)
    logp = linear_logprob(hidden, weight, torch.full_like(target, -100))
    assert (logp == 0).all()
    assert all((g == 0).all() for g in torch.autograd.grad(logp.sum(), (hidden, weight)))


EVERYTHING = {"return_lse": True, "return_entropy": True, "return_hit": True}
needs_triton = pytest.mark.skipif(bool(triton.UNAVAILABLE), reason=triton.UNAVAILABLE)
of_backends = pytest.mark.parametrize("backend", [None, "reference", pytest.param("triton", marks=needs_triton)])


@pytest.mark.parametrize("options", OPTIONS)
@of_backends
def test_lse_entropy_and_hit_are_those_of_the_softmax(options, backend):
    options = {**options, "backend": backend}
    hidden, weight, bias, target = make(12, 4, 9, bias=options.pop("bias", False))
    inputs = [x for x in (hidden, weight, bias) if x is not None]
    logp, lse, entropy, hit = linear_logprob(
        hidden.view(3, 4, 4), weight, target.view(3, 4), bias=bias, **options, **EVERYTHING
    )
    z = (hidden @ weight.T + (0 if bias is None else bias)) * options.get("logit_scale", 1.0)
    softcap, counts = options.get("softcap"), target.view(3, 4) != -100
    z = (z if softcap is None else softcap * torch.tanh(z / softcap)) / options.get("temperature", 1.0)
    z = z.view(3, 4, 9)
    expected = z.logsumexp(-1).where(counts, 0)
    torch.testing.assert_close(lse, expected)
    torch.testing.assert_close(entropy, torch.special.entr(z.softmax(-1)).sum(-1).where(counts, 0))
    assert torch.equal(hit, (z.argmax(-1) == target.view(3, 4)) & counts)
    torch.testing.assert_close(logp, linear_logprob(hidden, weight, target, bias=bias, **options).view(3, 4))
    assert not entropy.requires_grad

    mine = (logp * 0.3 + lse**2).sum()
    theirs = (z.log_softmax(-1).gather(-1, target.view(3, 4, 1).clamp(min=0))[..., 0] * 0.3).where(counts, 0).sum()
    theirs = theirs + (expected**2).sum()
    ours, exact = (torch.autograd.grad(loss, inputs, retain_graph=True) for loss in (mine, theirs))
    torch.testing.assert_close(ours, exact)

    logits = ((hidden @ weight.T + (0 if bias is None else bias)) * options.pop("logit_scale", 1.0)).detach()
    of_logits = token_logprob(logits.requires_grad_(), target, **options, **EVERYTHING)
    torch.testing.assert_close(of_logits, tuple(x.flatten() for x in (logp, lse, entropy, hit)))
    assert [x.requires_grad for x in of_logits] == [True, True, False, False]


@of_backends
def test_a_tuple_holds_what_is_asked_for_in_its_order(backend):
    hidden, weight, _, target = make(6, 4, 9)
    everything = linear_logprob(hidden, weight, target, backend=backend, **EVERYTHING)
    of_logits = token_logprob(hidden @ weight.T, target, backend=backend, **EVERYTHING)
    for asked in itertools.product((False, True), repeat=3):
        options = {**dict(zip(EVERYTHING, asked, strict=True)), "backend": backend}
        kept = [everything[0], *itertools.compress(everything[1:], asked)]
        some = linear_logprob(hidden, weight, target, **options)
        torch.testing.assert_close(list(some) if any(asked) else [some], kept)
        some = token_logprob(hidden @ weight.T, target, **options)
        torch.testing.assert_close(list(some) if any(asked) else [some], [of_logits[0], *kept[1:]])


@of_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reductions_leave_what_else_is_returned_per_row(backend, dtype):
    hidden, weight, _, target = make(6, 4, 9, dtype=dtype)
    options = {"backend": backend, **EVERYTHING}
    logp, *rows = linear_logprob(hidden, weight, target, **options)
    assert [x.dtype for x in (logp, *rows)] == [torch.float32] * 3 + [torch.bool]
    for reduction, expected in (("sum", logp.sum()), ("mean", logp.sum() / (target != -100).sum())):
        total, *others = linear_logprob(hidden, weight, target, reduction=reduction, **options)
        torch.testing.assert_close([total, *others], [expected, *rows])
        losses = (-x + 1e-2 * (y**2).sum() for x, y in ((total, others[0]), (expected, rows[0])))
        ours, theirs = (torch.autograd.grad(x, (hidden, weight), retain_graph=True) for x in losses)
        torch.testing.assert_close(ours, theirs)


@of_backends
def test_ties_are_hits_masked_tokens_have_no_entropy_and_ignored_rows_nothing(backend):
    logits = torch.tensor([[2.0, 2.0, -math.inf, 1.0]] * 5)
    target = torch.tensor([0, 1, 2, 3, -100])
    logp, lse, entropy, hit = token_logprob(logits, target, backend=backend, **EVERYTHING)
    p = logits[0].softmax(-1)
    assert hit.tolist() == [True, True, False, False, False]
    torch.testing.assert_close(entropy, torch.tensor([torch.special.entr(p).sum()] * 4 + [0.0]))
    assert lse[4] == logp[4] == 0
    nothing = torch.full((5,), -100)
    hidden, weight, _, _ = make(5, 4, 9)
    results = linear_logprob(hidden, weight, nothing, backend=backend, **EVERYTHING)
    assert all((x == 0).all() for x in results)
    assert all((x == 0).all() for x in torch.autograd.grad(results[1].sum(), (hidden, weight)))


@of_backends
def test_gradcheck_of_lse(backend):
    rows = 2 if backend == "triton" else 6  # interpreted
    hidden, weight, bias, target = make(rows, 2, rows + 1, bias=True)

    def values(h, w, b):
        return linear_logprob(h, w, target, bias=b, softcap=3.0, temperature=0.8, backend=backend, return_lse=True)

    frozen = functools.partial(values, w=weight.detach(), b=None)
    assert values(hidden, weight, bias)[1].requires_grad  # else gradcheck passes over it
    assert frozen(hidden)[1].requires_grad
    assert torch.autograd.gradcheck(values, (hidden, weight, bias))
    assert torch.autograd.gradcheck(frozen, (hidden,))
    assert torch.autograd.gradcheck(
        lambda z: token_logprob(z, target, softcap=3.0, backend=backend, return_lse=True), (make(rows, rows + 1, 1)[0],)
    )


@pytest.mark.parametrize("backend", [None, "reference"])
@settings(max_examples=40, deadline=None)
@given(
    vocab=st.integers(1, 40),
    scale=st.sampled_from([0.0, 1.0, 30.0, 300.0]),
    softcap=st.sampled_from([None, 5.0]),
    temperature=st.sampled_from([1.0, 0.5]),
    masked=st.sampled_from([0.0, 0.5]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    seed=st.integers(0, 10**6),
)
def test_one_row_with_every_token_as_its_target(backend, vocab, scale, softcap, temperature, masked, dtype, seed):
    """All log-probabilities of a softmax say what its lse, entropy and hits are."""
    generator = torch.Generator().manual_seed(seed)
    row = torch.randn(vocab, generator=generator) * scale
    row[torch.rand(vocab, generator=generator) < masked] = -math.inf
    row[0] = scale
    logits = row.to(dtype).expand(vocab, vocab).clone().requires_grad_()
    target, options = torch.arange(vocab), {"softcap": softcap, "temperature": temperature, "backend": backend}
    logp, lse, entropy, hit = token_logprob(logits, target, **options, **EVERYTHING)
    p = logp.detach().double().exp()
    tolerance = {"rtol": 2e-5, "atol": 2e-5 * max(1.0, lse[0].item())}
    torch.testing.assert_close(p.sum(), torch.tensor(1.0).double(), **tolerance)
    torch.testing.assert_close(entropy.double(), torch.special.entr(p).sum().expand(vocab), **tolerance)
    assert (entropy >= -tolerance["atol"]).all()
    assert (lse == lse[0]).all()
    z = logits[0].detach().double() if softcap is None else softcap * (logits[0].detach().double() / softcap).tanh()
    z = torch.where(logits[0].isinf(), -math.inf, z) / temperature
    torch.testing.assert_close(lse[0].double(), z.logsumexp(0), **tolerance)
    assert torch.equal(hit, logp == logp.max())
    (gradient,) = torch.autograd.grad(lse.sum(), logits)
    bend = 1 if softcap is None else 1 - (logits[0].detach().double() / softcap).tanh() ** 2
    tolerance["rtol"] += torch.finfo(dtype).eps
    torch.testing.assert_close(gradient.double(), (p * bend / temperature).expand(vocab, vocab), **tolerance)


@needs_triton
def test_the_cut_kernels_say_hits_and_leave_lse_and_entropy_to_tiles():
    hidden, weight, bias, target = make(6, 4, 9, bias=True, dtype=torch.float32)
    results = []
    for backend in ("cut", "reference"):
        options = {"bias": bias, "softcap": 3.0, "backend": backend}
        logp, *rows = linear_logprob(hidden, weight, target, **options, **EVERYTHING)
        _, hit = linear_logprob(hidden, weight, target, return_hit=True, **options)
        gradients = torch.autograd.grad((logp + rows[0] ** 2).sum(), (hidden, weight, bias))
        results.append([logp, *rows, hit, *gradients])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def test_lse_is_differentiable_once_by_an_engine_and_again_by_the_reference():
    hidden, weight, _, target = make(6, 4, 9)
    for backend in (None, "reference"):
        lse = linear_logprob(hidden, weight, target, backend=backend, return_lse=True)[1]
        gradient = torch.autograd.grad((lse**2).sum(), weight, create_graph=True)[0]
        if backend == "reference":
            assert torch.autograd.grad(gradient.sum(), weight)[0].abs().sum() > 0
        else:
            with pytest.raises(RuntimeError, match=r"differentiable once.*backend='reference'"):
                torch.autograd.grad(gradient.sum(), weight)


def test_batched_gradients_and_a_bounded_reference_under_a_transform():
    hidden, weight, _, target = make(3, 4, 9)
    for reduction in ("none", "sum"):
        results = []
        for backend in (None, "reference"):
            logp = linear_logprob(hidden, weight, target, backend=backend, reduction=reduction)
            upstream = torch.arange(float(2 * logp.numel()), dtype=torch.float64).view(2, *logp.shape)
            results.append(torch.autograd.grad(logp, (hidden, weight), upstream, is_grads_batched=True))
        torch.testing.assert_close(*results)
    bounded = functools.partial(linear_logprob, target=target, backend="reference", workspace_bytes=60)
    got = torch.func.grad(lambda w: bounded(hidden, w).sum())(weight.detach())
    torch.testing.assert_close(got, torch.autograd.grad(bounded(hidden, weight).sum(), weight)[0])


def test_gradients_do_not_feel_the_rounding_of_a_large_lse():
    weight, target = torch.tensor([[12345.25], [12345.25], [0.0]], requires_grad=True), torch.tensor([0])
    for logp in (linear_logprob(torch.ones(1, 1), weight, target), token_logprob(weight.T, target)):
        (gradient,) = torch.autograd.grad(logp.sum(), weight)
        torch.testing.assert_close(gradient[:, 0], torch.tensor([0.5, -0.5, 0.0]), atol=1e-6, rtol=0)


def test_infinite_and_huge_logits():
    logits = torch.tensor([[-math.inf, 0.0, 1.0], [3e38, 0.0, -3e38], [-math.inf, 2.0, -math.inf]], requires_grad=True)
    logp = token_logprob(logits, torch.tensor([2, 0, 1]))
    torch.testing.assert_close(logp, torch.tensor([-math.log1p(math.exp(-1)), 0.0, 0.0]))
    assert torch.autograd.grad(logp.sum(), logits)[0].isfinite().all()
    assert token_logprob(logits, torch.tensor([0, 0, 1]))[0] == -math.inf


def test_masked_vocabulary_through_the_bias():
    hidden, weight, _, target = make(6, 4, 5)
    target = target.where(target != 2, 1)
    bias = torch.zeros(5, dtype=torch.float64).index_fill(0, torch.tensor([2]), -math.inf)
    others = torch.tensor([0, 1, 3, 4])
    renumbered = target.where(target < 2, target - 1).where(target != -100, -100)
    torch.testing.assert_close(
        linear_logprob(hidden, weight, target, bias=bias), linear_logprob(hidden, weight[others], renumbered)
    )


MASKED = torch.tensor([2, 7, 8])  # the first is a target


@pytest.mark.parametrize("options", OPTIONS)
@of_backends
def test_a_masked_token_has_probability_zero_and_no_gradient_whatever_the_options(options, backend):
    """And the others share the mass as a head without it would: its target alone has the log-probability −∞."""
    hidden, weight, _, target = make(6, 4, 9)
    target = torch.tensor([0, 1, -100, 3, 4, 2])
    options = {**options, "backend": backend}
    free = torch.randn(9, dtype=torch.float64) * bool(options.pop("bias", False))
    bias = free.index_fill(0, MASKED, -math.inf).requires_grad_()
    logits = (hidden @ weight.T + bias).detach()
    left = torch.tensor([0, 1, 3, 4, 5, 6])
    renumbered = torch.tensor([0, 1, -100, 2, 3, -100])
    expected = linear_logprob(hidden, weight[left], renumbered, bias=free[left], **options)
    logp = linear_logprob(hidden, weight, target, bias=bias, **options)
    torch.testing.assert_close(logp[:5], expected[:5])
    assert logp[5] == -math.inf
    ours = torch.autograd.grad(logp[:5].sum(), (hidden, weight, bias))
    theirs = torch.autograd.grad(expected[:5].sum(), (hidden, weight))
    torch.testing.assert_close(ours[:2], theirs)
    assert (ours[1][MASKED] == 0).all()
    assert (ours[2][MASKED] == 0).all()
    of_target = torch.autograd.grad(linear_logprob(hidden, weight, target, bias=bias, **options)[5], (hidden, bias))
    assert all(x.isfinite().all() for x in of_target)
    assert of_target[1][2] == 0 or not options.get("softcap")

    scale = options.pop("logit_scale", 1.0)
    z = (logits * scale).requires_grad_()
    of_logits = token_logprob(z, target, **options)
    torch.testing.assert_close(of_logits, logp.detach())
    assert (torch.autograd.grad(of_logits[:5].sum(), z)[0][:, MASKED] == 0).all()


@pytest.mark.parametrize("softcap", [None, 3.0])
@of_backends
def test_what_is_not_finite_is_named_under_a_softcap_too(softcap, backend):
    hidden, weight, _, target = make(3, 4, 9)
    options = {"softcap": softcap, "backend": backend}
    nothing = torch.full((9,), -math.inf, dtype=torch.float64)
    with pytest.raises(ValueError, match="bias masks every token of a row that counts"):
        linear_logprob(hidden, weight, target, bias=nothing, **options)
    logits = torch.zeros(3, 9).index_fill(0, torch.tensor([2]), -math.inf)
    with pytest.raises(ValueError, match=r"logits masks every token of a row that counts .* ignore its target"):
        token_logprob(logits, torch.tensor([0, 1, 2]), **options)
    assert token_logprob(logits, torch.tensor([0, 1, -100]), **options).isfinite().all()
    with pytest.raises(ValueError, match="hidden holds infinity"):
        linear_logprob(torch.full_like(hidden, math.inf), weight, target, bias=nothing.clone().fill_(0), **options)
    with pytest.raises(ValueError, match="bias holds infinity"):
        linear_logprob(hidden, weight, target, bias=nothing.index_fill(0, torch.tensor([4]), math.inf), **options)
    with pytest.raises(ValueError, match="logits holds infinity"):
        token_logprob(logits.abs(), torch.tensor([0, 1, 2]), **options)
    masked = nothing.clone().fill_(0).index_fill(0, torch.tensor([4]), -math.inf)
    with pytest.raises(ValueError, match="logits of hidden, weight, bias overflow"):
        linear_logprob(hidden * 1e200, weight * 1e200, target, bias=masked, **options)


def test_leading_dimensions_and_strides():
    hidden, weight, _, target = make(12, 4, 9)
    flat = linear_logprob(hidden, weight, target)
    assert linear_logprob(hidden.view(2, 3, 2, 4), weight, target.view(2, 3, 2)).shape == (2, 3, 2)
    strided = torch.empty(12, 8, dtype=torch.float64)[:, ::2].copy_(hidden.detach())
    transposed = weight.detach().T.contiguous().T
    torch.testing.assert_close(linear_logprob(strided, transposed, target), flat.detach())


@pytest.mark.parametrize("options", OPTIONS)
def test_sequence_logprob_takes_the_options_of_its_rows(options):
    """And an ignore_index that could be a token."""
    options = dict(options)
    hidden, weight, bias, target = make(12, 4, 9, bias=options.pop("bias", False))
    options |= {"bias": bias, "ignore_index": 7}
    target = target.masked_fill(target == -100, 7)
    rows = linear_logprob(hidden, weight, target, **options)
    sums = sequence_logprob(hidden.view(3, 4, 4), weight, target.view(3, 4), **options)
    torch.testing.assert_close(sums, rows.view(3, 4).sum(-1))
    upstream = torch.tensor([1.0, 2.0, 3.0]).double()
    ours = torch.autograd.grad(sums, (hidden, weight), upstream)
    torch.testing.assert_close(ours, torch.autograd.grad(rows, (hidden, weight), upstream.repeat_interleave(4)))


def test_sequence_logprob_sums_and_averages():
    hidden, weight, _, target = make(12, 4, 9)
    target[8:] = -100
    rows = linear_logprob(hidden, weight, target).view(3, 4)
    counts = (target.view(3, 4) != -100).sum(-1)
    total = sequence_logprob(hidden.view(3, 4, 4), weight, target.view(3, 4))
    torch.testing.assert_close(total, rows.sum(-1))
    mean = sequence_logprob(hidden.view(3, 4, 4), weight, target.view(3, 4), average=True)
    torch.testing.assert_close(mean[:2], rows.sum(-1)[:2] / counts[:2])
    assert mean[2] == 0


BAD = [
    ({"hidden": torch.tensor([[1.0, 2, 3, 4], [float("nan"), 0, 0, 0], [0, 0, 0, 0]])}, "hidden holds NaN"),
    ({"hidden": torch.full((3, 4), math.inf)}, "hidden holds infinity"),
    ({"weight": torch.full((9, 4), float("nan"))}, "weight holds NaN"),
    ({"bias": torch.full((9,), float("nan"))}, "bias holds NaN"),
    (
        {"hidden": torch.full((3, 4), 1e30), "weight": torch.full((9, 4), 1e30)},
        "logits of hidden, .* overflow",
    ),
]


@pytest.mark.parametrize("reduction", ["none", "sum"])
@of_backends
@pytest.mark.parametrize(("wrong", "message"), BAD, ids=[message[:30] for _, message in BAD])
def test_inputs_that_are_not_finite_are_named(wrong, message, backend, reduction):
    good = {"hidden": torch.randn(3, 4, requires_grad=True), "weight": torch.randn(9, 4)}
    good |= {"target": torch.tensor([0, 8, -100]), "backend": backend, "reduction": reduction}
    linear_logprob(**good)
    with pytest.raises(ValueError, match=message):
        linear_logprob(**{**good, **wrong})


def test_environment_names_the_backend(monkeypatch):
    monkeypatch.setenv("MOPO_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="MOPO_BACKEND='nonsense' cannot run"):
        token_logprob(torch.randn(2, 3), torch.tensor([0, 1]))


TRANSFORMED = {
    "grad": lambda f, x: torch.func.grad(lambda x: f(x).sum())(x),
    "vjp": lambda f, x: torch.func.vjp(f, x)[1](torch.ones(3, dtype=x.dtype))[0],
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,))[1],
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "hessian": lambda f, x: torch.func.hessian(lambda x: f(x).sum())(x),
}


@pytest.mark.parametrize("transform", TRANSFORMED)
def test_transforms_of_torch_func_are_refused_with_the_backend_that_has_them(transform):
    """Forward mode would give zeros otherwise."""
    transformed, (hidden, weight, _, target) = TRANSFORMED[transform], make(3, 4, 9)
    hidden, weight = hidden.detach(), weight.detach()
    expected = transformed(lambda x: formula(x, weight, None, target), hidden)
    assert expected.abs().sum() > 0
    for op in (
        lambda x, backend: linear_logprob(x, weight, target, backend=backend),
        lambda x, backend: sequence_logprob(x[:, None], weight, target[:, None], backend=backend),
        lambda x, backend: token_logprob(x @ weight.T, target, backend=backend),
    ):
        torch.testing.assert_close(transformed(functools.partial(op, backend="reference"), hidden), expected)
        with pytest.raises(RuntimeError, match=r"^(linear|token)_logprob of backend='cpu' .* give it backend='ref"):
            transformed(functools.partial(op, backend="cpu"), hidden)


@pytest.mark.parametrize("transform", ["grad", "jvp", "jacfwd"])
def test_transforms_within_a_compiled_function_are_refused_too(transform):
    """Dynamo traces forward mode, of which an operator knows nothing: zeros."""
    hidden, weight, _, target = (x if x is None else x.detach() for x in make(3, 4, 9))

    def compiled(op, *others, **options):
        function = functools.partial(op, **options)
        transformed = torch.compile(
            lambda x: TRANSFORMED[transform](lambda x: function(x, *others, target), x), backend="aot_eager"
        )
        return transformed(hidden)

    expected = TRANSFORMED[transform](lambda x: formula(x, weight, None, target), hidden)
    torch.testing.assert_close(compiled(linear_logprob, weight, backend="reference"), expected)
    for op, *others in [(linear_logprob, weight), (token_logprob,)]:
        with pytest.raises(RuntimeError, match=r"^(linear|token)_logprob of backend='cpu' .* give it backend='ref"):
            compiled(op, *others, backend="cpu")


def test_forward_mode_is_refused_too():
    hidden, weight, _, target = (x if x is None else x.detach() for x in make(3, 4, 9))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(hidden, hidden)
        with pytest.raises(RuntimeError, match="give it backend='reference'"):
            linear_logprob(dual, weight, target, backend="cpu")
        assert torch.autograd.forward_ad.unpack_dual(
            linear_logprob(dual, weight, target, backend="reference")
        ).tangent.any()


@of_backends
def test_vmap_is_refused_by_the_name_of_the_op(backend):
    hidden, weight, _, target = (x if x is None else x.detach() for x in make(3, 4, 9))
    linear = functools.partial(linear_logprob, backend=backend)
    with pytest.raises(RuntimeError, match=r"linear_logprob .* torch.func.vmap hides; call it once with all rows"):
        torch.func.vmap(linear, (0, None, 0))(hidden[:, None], weight, target[:, None])
    with pytest.raises(RuntimeError, match=r"linear_logprob .* torch.func.vmap hides"):
        torch.func.vmap(linear, (None, 0, None))(hidden, weight.repeat(2, 1, 1), target)
    per_sample = torch.func.grad(lambda h, t: linear(h, weight, t).sum())
    with pytest.raises(RuntimeError, match=r"linear_logprob .* torch.func.vmap hides"):
        torch.func.vmap(per_sample)(hidden[:, None], target[:, None])
    with pytest.raises(RuntimeError, match=r"token_logprob .* torch.func.vmap hides"):
        torch.func.vmap(functools.partial(token_logprob, backend=backend))(hidden[:, None], target[:, None])


def test_functional_call_needs_no_transform_and_its_gradient_the_reference():
    hidden, weight, _, target = make(3, 4, 9)

    class Head(torch.nn.Linear):
        def forward(self, x, backend):
            return linear_logprob(x, self.weight, target, bias=self.bias, backend=backend).sum()

    head = Head(4, 9, dtype=torch.float64)
    parameters = {"weight": weight, "bias": torch.zeros(9, dtype=torch.float64)}
    loss = torch.func.functional_call(head, parameters, (hidden, None))
    torch.testing.assert_close(loss, formula(hidden, weight, None, target).sum())
    by_name = torch.func.grad(lambda p: torch.func.functional_call(head, p, (hidden.detach(), "reference")))(parameters)
    torch.testing.assert_close(by_name["weight"], torch.autograd.grad(loss, weight)[0])
