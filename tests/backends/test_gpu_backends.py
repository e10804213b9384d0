"""The public functions on the backends for GPUs, whole: on a GPU, or interpreted where there is none.

Kernels are tested one by one in test_triton.py, test_cut.py and test_cuda_*.py; here is what the engine makes of them.
"""

import math

import pytest
import torch
from test_policy import STEPS, labels
from test_tiles import exact, make, relative_error, values_and_gradients

from mopo_kernels import backends, linear_logprob, mopo_loss, token_logprob
from mopo_kernels.backends.fold import Transform
from mopo_kernels.backends.triton import cut
from mopo_kernels.head.call import HeadCall
from mopo_kernels.head.plan import plan_for
from mopo_kernels.head.rates import Rates

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["triton", "cut", "cuda"]
OPTIONS = [{}, {"softcap": 4.0, "temperature": 0.8, "logit_scale": 0.5}]


@pytest.fixture(params=BACKENDS)
def backend(request):
    try:
        return backends.choose("linear_logprob", DEVICE, request.param).backend
    except ValueError as error:
        pytest.skip(str(error))


@pytest.fixture(autouse=True)
def poisoned():
    """Fresh memory holds NaN, so that reading what nobody wrote shows; and sums are bitwise the same every time."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def inputs_of(n, h, v, dtype=torch.float32, **options):
    hidden, weight, bias, target = make(n, h, v, dtype, **options)
    return [None if x is None else x.detach().to(DEVICE).requires_grad_() for x in (hidden, weight, bias)], target.to(
        DEVICE
    )


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "softcap"])
@pytest.mark.parametrize("workspace", [4_000, None], ids=["streamed", "kept"])
def test_log_probs_and_their_gradients(backend, options, workspace):
    inputs, target = inputs_of(37, 24, 300, with_bias=True)
    upstream = torch.randn(37, device=DEVICE)
    ours = values_and_gradients(inputs, target, upstream, backend, workspace_bytes=workspace, **options)
    for got, truth, bound in zip(ours, exact(inputs, target, upstream, **options), (2e-6, *[2e-5] * 3), strict=True):
        assert relative_error(got, truth) <= bound


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bits_are_as_accurate_as_eager(backend, dtype):
    inputs, target = inputs_of(37, 24, 300, dtype)
    upstream = torch.randn(37, device=DEVICE)
    truth = exact(inputs, target, upstream)
    ours = values_and_gradients(inputs, target, upstream, backend)
    theirs = values_and_gradients(inputs, target, upstream, "reference")
    for got, yardstick, expected in zip(ours, theirs, truth, strict=True):
        assert relative_error(got, expected) <= 2 * relative_error(yardstick, expected) + 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("retain", [False, True], ids=["once", "graph kept"])
def test_an_upstream_gradient_is_not_rounded_to_16_bits(backend, dtype, retain):
    inputs, target = inputs_of(40, 24, 300, dtype)
    results = []
    for upstream in (torch.tensor(1.0, device=DEVICE), torch.tensor(1 / 3, device=DEVICE)):
        total = linear_logprob(*inputs[:2], target, reduction="sum", backend=backend)
        results.append(torch.autograd.grad(total, inputs[:2], upstream, retain_graph=retain))
    for whole, third in zip(*results, strict=True):
        assert torch.equal(third, (whole.float() * upstream).to(dtype))


@pytest.mark.skipif(DEVICE == "cpu", reason="a CPU has its tile in the workspace")
@pytest.mark.parametrize("rows", [60, 200], ids=["one block", "blocks"])
def test_a_tile_in_the_memory_of_weights_gradient(backend, rows, monkeypatch):
    if backend == "cut":
        pytest.skip("the cut kernels have no tile")
    inputs, target = inputs_of(rows, 64, 300, torch.bfloat16, ignored=0.0)
    plans = []
    monkeypatch.setattr("mopo_kernels.head.engines.plan_for", lambda *x: plans.append(plan_for(*x)) or plans[-1])
    total = linear_logprob(*inputs[:2], target, reduction="sum", backend=backend, workspace_bytes=25_000)
    assert [plan.lent for plan in plans] == [True]
    truth = exact(inputs, target, torch.ones(rows, device=DEVICE))[1:]
    for got, expected in zip(torch.autograd.grad(total, inputs[:2]), truth, strict=False):
        assert relative_error(got, expected) <= 2 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("policy_step", STEPS)
@pytest.mark.parametrize("workspace", [6_000, None], ids=["a group at a time", "one block"])
def test_the_loss_and_its_gradients(backend, policy_step, workspace):
    batch = [x.to(DEVICE) for x in labels([2, 3])]
    (hidden, weight, bias), target = inputs_of(5 * 6, 16, 200, with_bias=True)
    ref_logp = torch.randn(5, dtype=torch.float64, device=DEVICE)
    results = []
    for name, dtype in ((backend, torch.float32), ("reference", torch.float64)):
        inputs = [x.detach().to(dtype).requires_grad_() for x in (hidden.reshape(5, 6, 16), weight, bias)]
        output = mopo_loss(
            *(*inputs[:2], target.reshape(5, 6), *batch),
            **{"bias": inputs[2], "tau": 0.3, "ref_logp": ref_logp, "policy_step": policy_step, "backend": name},
            workspace_bytes=None if name == "reference" else workspace,
        )
        results.append([output.loss.detach(), output.logp, *torch.autograd.grad(output.loss, inputs)])
    for got, truth, bound in zip(*results, (2e-6, 2e-6, *[2e-5] * 3), strict=True):
        assert relative_error(got.nan_to_num(), truth.nan_to_num()) <= bound


@pytest.mark.parametrize(
    ("reduction", "workspace"),
    [pytest.param("none", 20_000, id="per row, streamed"), pytest.param("sum", None, id="the sum, resident")],
)
def test_sampled_gradients_are_those_of_the_reference(backend, reduction, workspace):
    """Of the same random numbers; a step that rounding moves goes to the next token."""
    if backend == "cut":
        pytest.skip("the cut kernels have no logits to draw from")
    inputs, target = inputs_of(37, 24, 300, with_bias=True)
    results = []
    for name in (backend, "reference"):
        torch.manual_seed(3)
        logp = linear_logprob(
            *(*inputs[:2], target),
            **{"bias": inputs[2], "reduction": reduction, "grad_sampling": 2.0**-4, "backend": name},
            workspace_bytes=None if name == "reference" else workspace,
        )
        results.append([logp.detach(), *torch.autograd.grad(logp.sum(), inputs)])
    for got, truth, bound in zip(*results, (2e-6, *[5e-2] * 3), strict=True):
        assert relative_error(got, truth) <= bound


def test_a_frozen_head_has_no_gradient(backend):
    (hidden, weight, _), target = inputs_of(20, 16, 150)
    upstream = torch.randn(20, device=DEVICE)
    logp = linear_logprob(hidden, weight.detach(), target, backend=backend)
    (gradient,) = torch.autograd.grad(logp, hidden, upstream)
    assert relative_error(gradient, exact((hidden, weight, None), target, upstream)[1]) <= 2e-5


@pytest.mark.parametrize("rows", [0, 4], ids=["no rows", "all ignored"])
def test_nothing_counts(backend, rows):
    (hidden, weight, bias), target = inputs_of(rows, 8, 30, with_bias=True, ignored=1.1)
    ours = values_and_gradients((hidden, weight, bias), target, torch.ones(rows, device=DEVICE), backend)
    assert all(torch.equal(x, torch.zeros_like(x)) for x in ours)


def test_opcheck_and_compile(backend):
    (hidden, weight, _), target = inputs_of(12, 16, 90, ignored=0.0)  # kept logits of other rows are not written

    def loss_of(hidden, weight):
        return linear_logprob(hidden, weight, target, backend=backend).sum()

    results = []
    for function in (loss_of, torch.compile(loss_of, fullgraph=True, backend="aot_eager")):
        results.append(torch.autograd.grad(function(hidden, weight), (hidden, weight)))
    torch.testing.assert_close(*results)
    save = "nothing" if backend == "cut" else "logits"
    call = HeadCall(Transform.of(1.0), -100, backend, 2**20, (True, True, False)).flat()
    arguments = (hidden, weight, None, target, call, save)
    tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if backend != "cut":  # which has no gradient of lse, that this one asks for
        tests.append("test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.mopo_kernels.linear_logprob.default, arguments, test_utils=tests)


@pytest.mark.parametrize("overwrite", [False, True], ids=["beside", "in place"])
def test_token_log_probs(backend, overwrite):
    if backend == "cut":
        pytest.skip("the cut kernels start from hidden states")
    logits = torch.randn(9, 77, device=DEVICE, requires_grad=True)
    target = torch.randint(0, 77, (9,), device=DEVICE)
    target[3] = -100
    results = []
    for name in (backend, "reference"):
        given = logits * 1
        logp = token_logprob(given, target, temperature=0.7, overwrite_logits=overwrite, backend=name)
        results.append([logp, *torch.autograd.grad(logp, logits, torch.arange(9.0, device=DEVICE))])
        assert torch.equal(given, logits) != (overwrite and name != "reference")
    torch.testing.assert_close(*results, rtol=2e-5, atol=1e-6)


def test_the_cut_kernels_form_no_tile(monkeypatch):
    if cut.UNAVAILABLE:
        pytest.skip(cut.UNAVAILABLE)
    monkeypatch.setattr("mopo_kernels.head.tiles.TileEngine._form", None)
    inputs, target = inputs_of(20, 16, 150)
    gradients = values_and_gradients(inputs, target, torch.ones(20, device=DEVICE), "cut")[1:]
    assert all(x.isfinite().all() for x in gradients)


@pytest.mark.parametrize(("cut_rate", "expected"), [(2e14, False), (9e14, True)], ids=["slow", "fast"])
def test_measured_rates_choose_the_cut_kernels(monkeypatch, cut_rate, expected):
    if cut.UNAVAILABLE:
        pytest.skip(cut.UNAVAILABLE)
    rates = Rates(gemm=6e14, copy=math.inf, cut_statistics=cut_rate, cut_gradients=cut_rate)
    monkeypatch.delenv("MOPO_BACKEND", raising=False)
    monkeypatch.setattr("mopo_kernels.head.engines.rates_of", lambda device, dtype: rates)
    (hidden, weight, _), target = inputs_of(20, 16, 150)
    monkeypatch.setattr(cut, "cut_statistics", None)
    if expected:
        with pytest.raises(TypeError, match="NoneType"):
            linear_logprob(hidden, weight, target)
    else:
        linear_logprob(hidden, weight, target)
    torch._dynamo.reset()  # after so many compilations, in other tests, it would run the function as it is
    torch.compile(linear_logprob, backend="eager")(hidden, weight, target)  # a choice by sizes would compile for each
    default = backends.choose("linear_logprob", DEVICE).backend
    assert linear_logprob(hidden, weight, target, backend=default).isfinite().all()  # asked for: rates decide nothing


def test_infinite_biases_mask_tokens(backend):
    (hidden, weight, bias), target = inputs_of(12, 16, 90, with_bias=True, ignored=0.0)
    with torch.no_grad():
        bias[::3] = -math.inf
    target = target // 3 * 3 + 1
    ours = values_and_gradients((hidden, weight, bias), target, torch.ones(12, device=DEVICE), backend)
    truth = exact((hidden, weight, bias), target, torch.ones(12, device=DEVICE))
    for got, expected in zip(ours, truth, strict=True):
        assert relative_error(got, expected) <= 2e-5
