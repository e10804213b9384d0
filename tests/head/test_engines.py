"""The engines' protocol, and when the tile engine forms logits again: whenever its tile may hold anything else."""

import itertools
from dataclasses import replace

import pytest
import torch

from mopo_kernels import backends
from mopo_kernels.backends.fold import Transform
from mopo_kernels.backends.native import cpu
from mopo_kernels.backends.triton import cut
from mopo_kernels.head import engines, products
from mopo_kernels.head.call import HeadCall, HeadInputs, Outputs
from mopo_kernels.head.cut import CutEngine
from mopo_kernels.head.engines import fused_gradients, make_engine
from mopo_kernels.head.plan import Plan
from mopo_kernels.head.products import add_product
from mopo_kernels.head.rates import Rates
from mopo_kernels.head.rows import count
from mopo_kernels.head.tiles import TileEngine

N, H, V = 12, 5, 300
TRANSFORM = Transform(0.5, 2.0, True)
ALL = (True, True, True)
PLANS = {  # rows × columns of a block, whether whole rows are held, and in the memory of weight's gradient
    "resident, one block": (12, 300, True, False),
    "resident, ragged blocks and columns": (5, 128, True, False),
    "resident, where weight's gradient will stand": (5, 300, True, True),
    "resident there, ragged blocks and columns": (4, 128, True, True),
    "streamed": (5, 128, False, False),
    "streamed, one column at the end": (4, 299, False, False),
}
BLOCKS = {
    "slices": lambda size: [slice(first, min(first + size, N)) for first in range(0, N, size)],
    "gathered": lambda size: list(torch.tensor([7, 0, 2, 3, 11, 5, 1, 10]).split(size)),
}

needs_cpu = pytest.mark.skipif(bool(cpu.UNAVAILABLE), reason=cpu.UNAVAILABLE)


@pytest.fixture(autouse=True)
def poisoned():
    """Fresh memory holds NaN, so that reading what nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def inputs_of(dtype=torch.float64, *, bias=True):
    generator = torch.Generator().manual_seed(0)
    hidden, weight, b = (torch.randn(shape, generator=generator).to(dtype) for shape in ((N, H), (V, H), (V,)))
    target = torch.randint(0, V, (N,), generator=generator)
    target[0] = V - 1
    return HeadInputs(hidden, weight, b if bias else None, target)


def call_of(needs=ALL, backend="cpu"):
    return HeadCall(TRANSFORM, -100, backend, needs=needs)


def plan_of(name, dtype=torch.float64):
    *blocks, lent = PLANS[name]
    return Plan(*blocks, dtype, 0, "a test asks for it", lent=lent)


def truth(inputs, rows, coefficient, lse_coefficient=0):
    """Log-probabilities, lse and the gradients of Σ coefficient · logp + lse_coefficient · lse over `rows`: float64."""
    hidden, weight, bias = (x.detach().double().requires_grad_() for x in inputs[:3])
    z = 2.0 * torch.tanh(0.5 * (hidden @ weight.T + bias))
    logp = z.log_softmax(-1).gather(1, inputs.target[:, None])[:, 0]
    loss = (coefficient * logp + lse_coefficient * z.logsumexp(-1))[rows].sum()
    gradients = torch.autograd.grad(loss, (hidden, weight, bias))
    return logp.detach(), z.detach().logsumexp(-1), gradients


def counted(monkeypatch):
    """A list that gets the size of every tile of logits that is formed."""
    formed, form = [], TileEngine._form

    def counting(engine, hidden, columns, logits):
        formed.append(logits.numel())
        form(engine, hidden, columns, logits)

    monkeypatch.setattr(TileEngine, "_form", counting)
    return formed


@needs_cpu
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("kind", BLOCKS)
def test_statistics_then_add_for_each_block(plan, kind, monkeypatch):
    inputs, plan = inputs_of(), plan_of(plan)
    blocks = BLOCKS[kind](plan.row_block)
    coefficient = torch.linspace(-1, 2, N, dtype=torch.float64)
    everything = torch.cat([torch.arange(N)[block] for block in blocks])
    logp, lse, expected = truth(inputs, everything, coefficient)
    formed = counted(monkeypatch)
    engine = TileEngine(inputs, call_of(), plan, blocks=blocks)
    for block in blocks:
        statistics = engine.statistics(block)
        torch.testing.assert_close(statistics.logp, logp[block])
        torch.testing.assert_close(statistics.lse, lse[block])
        engine.add(block, statistics.lse, coefficient[block])
    torch.testing.assert_close(engine.finish(), expected)
    assert sum(formed) == len(everything) * V * (1 if plan.resident else 2)


@needs_cpu
def test_logits_are_formed_again_where_the_tile_holds_other_rows(monkeypatch):
    """Statistics of all blocks before anything is added, and adding a block twice: its logits were overwritten."""
    inputs, plan = inputs_of(), plan_of("resident, ragged blocks and columns")
    blocks = BLOCKS["slices"](plan.row_block)
    coefficient = torch.ones(N, dtype=torch.float64)
    formed = counted(monkeypatch)
    engine = TileEngine(inputs, call_of(), plan, blocks=blocks)
    lse = torch.cat([engine.statistics(block).lse for block in blocks])
    for block in (*blocks, *blocks):
        engine.add(block, lse[block], coefficient[block])
    _, grad_weight, grad_bias = engine.finish()
    _, _, expected = truth(inputs, slice(None), 2 * coefficient)
    torch.testing.assert_close((grad_weight, grad_bias), expected[1:])
    assert sum(formed) == 3 * N * V


@needs_cpu
@pytest.mark.parametrize("needs", [ALL, (True, False, False)])
def test_kept_logits_are_read_and_left_as_they_are(needs, monkeypatch):
    inputs, plan, rows = inputs_of(), plan_of("resident, one block"), slice(0, N)
    kept = inputs.weight.new_empty(N, V)
    forward = TileEngine(inputs, call_of((False,) * 3), plan, blocks=[rows], kept=kept)
    lse = forward.statistics(rows).lse
    logits, coefficient = kept.clone(), torch.linspace(-1, 2, N, dtype=torch.float64)
    torch.testing.assert_close(logits, inputs.hidden @ inputs.weight.T)  # raw: bias and softcap come with the fold
    formed = counted(monkeypatch)
    narrow = Plan(12, 128, True, torch.float64, 0, "columns a few at a time")
    backward = TileEngine(inputs, call_of(needs), narrow, blocks=[rows], kept=kept, holds=rows)
    backward.add(rows, lse, coefficient)
    for got, expected, need in zip(backward.finish(), truth(inputs, rows, coefficient)[2], needs, strict=True):
        assert (got is not None) == need
        if need:
            torch.testing.assert_close(got, expected)
    TileEngine(inputs, call_of(needs), narrow, blocks=[rows], kept=kept, holds=rows).add(rows, lse, coefficient)
    assert torch.equal(kept, logits)
    assert not formed


@needs_cpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_nothing_added_is_a_gradient_of_zeros(dtype):
    inputs = inputs_of(dtype)
    engine = TileEngine(inputs, call_of(), plan_of("streamed", dtype), blocks=[])
    for x, gradient in zip(inputs, engine.finish(), strict=False):
        assert torch.equal(gradient, torch.zeros_like(x))
    without = TileEngine(inputs._replace(bias=None), call_of(), plan_of("streamed", dtype), blocks=[])
    assert without.finish()[2] is None


@needs_cpu
@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)])
def test_gradients_that_nobody_needs_are_not_formed(needs):
    inputs, plan = inputs_of(), plan_of("resident, ragged blocks and columns")
    blocks = BLOCKS["slices"](plan.row_block)
    engine = TileEngine(inputs, call_of(needs), plan, blocks=blocks)
    ones = torch.ones(N, dtype=torch.float64)
    for block in blocks:
        engine.add(block, engine.statistics(block).lse, ones[block])
    for gradient, expected, need in zip(engine.finish(), truth(inputs, slice(None), ones)[2], needs, strict=True):
        assert (gradient is not None) == need
        if need:
            torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("backend", ["cpu", "cut"])
def test_both_engines_have_one_protocol(backend):
    module = {"cpu": cpu, "cut": cut}[backend]
    if module.UNAVAILABLE:
        pytest.skip(module.UNAVAILABLE)
    inputs, rows = inputs_of(torch.float32), torch.tensor([0, 3, 11])
    engine, blocks = make_engine(inputs, call_of(backend=backend), rows, "fused")
    assert isinstance(engine, CutEngine if backend == "cut" else TileEngine)
    coefficient = torch.linspace(-1, 2, N, dtype=torch.float64)
    logp = fused_gradients(engine, inputs.target, blocks, lambda block, _: coefficient[block])
    expected, _, gradients = truth(inputs, rows, coefficient)
    torch.testing.assert_close(logp[rows], expected[rows], rtol=2e-6, atol=2e-6)
    assert logp[1] == 0
    assert sum(map(count, blocks)) == 3
    for gradient, x in zip(engine.finish(), gradients, strict=True):
        torch.testing.assert_close(gradient.double(), x, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_the_tile_engine_has_entropies_hits_and_the_gradient_of_lse(backend):
    module = backends.BACKENDS[backend]
    if module.UNAVAILABLE:
        pytest.skip(module.UNAVAILABLE)
    inputs, rows = inputs_of(torch.float32), torch.tensor([0, 3, 7, 11])
    call = replace(call_of(backend=backend), outputs=Outputs(True, True, True))
    engine, (block,) = make_engine(inputs, call, rows, "fused")
    statistics = engine.statistics(block)
    z = 2.0 * torch.tanh(0.5 * (inputs.hidden @ inputs.weight.T + inputs.bias)).double()[rows]
    torch.testing.assert_close(statistics.entropy, torch.special.entr(z.softmax(-1)).sum(-1), rtol=2e-6, atol=0)
    assert torch.equal(statistics.hit, z.argmax(-1) == inputs.target[rows])
    coefficient = torch.linspace(-1, 2, N, dtype=torch.float64), torch.linspace(3, 0, N, dtype=torch.float64)
    engine.add(block, statistics.lse, *(x[rows] for x in coefficient))
    for gradient, x in zip(engine.finish(), truth(inputs, rows, *coefficient)[2], strict=True):
        torch.testing.assert_close(gradient.double(), x, rtol=2e-5, atol=2e-5)


@pytest.mark.skipif(bool(cut.UNAVAILABLE), reason=cut.UNAVAILABLE)
def test_the_cut_engine_has_hits_and_refuses_what_it_cannot():
    inputs, rows = inputs_of(torch.float32), torch.tensor([0, 3, 7, 11])
    engine, (block,) = make_engine(inputs, call_of(backend="cut"), rows, "fused")
    statistics = engine.statistics(block)
    z = (inputs.hidden @ inputs.weight.T + inputs.bias)[rows]
    assert torch.equal(statistics.hit, z.argmax(-1) == inputs.target[rows])
    with pytest.raises(ValueError, match="not started for entropies"):
        statistics.entropy.sum()
    with pytest.raises(NotImplementedError, match="no gradient of lse"):
        engine.add(block, statistics.lse, statistics.lse, statistics.lse)


@pytest.mark.skipif(bool(cut.UNAVAILABLE), reason=cut.UNAVAILABLE)
def test_entropies_and_lse_go_from_the_cut_kernels_to_the_tiles_of_triton(monkeypatch):
    """Whether the cut kernels are asked for, or rates are for them."""
    inputs = inputs_of(torch.float32)
    monkeypatch.setattr(
        engines, "rates_of", lambda *_: Rates(gemm=1.0, copy=1.0, cut_statistics=9e9, cut_gradients=9e9)
    )
    monkeypatch.delenv("MOPO_BACKEND", raising=False)
    for outputs in (Outputs(*x) for x in itertools.product((False, True), repeat=3)):
        call = replace(call_of(), outputs=outputs)
        is_beyond_cut = outputs.lse or outputs.entropy
        assert engines.choose_backend(inputs, call, "cut") == ("triton" if is_beyond_cut else "cut")
        assert engines.choose_backend(inputs, call, None) == ("cpu" if is_beyond_cut else "cut")


@needs_cpu
def test_a_block_of_more_rows_than_the_tile_has_is_taken_in_parts():
    """Coefficients of a group's rows are known after all of its parts, whose logits are then formed again."""
    inputs, plan, rows = inputs_of(), plan_of("resident, ragged blocks and columns"), torch.arange(1, N)
    asked = []

    def coefficient(block, logp):
        asked.append(len(block))
        return logp - logp.mean()

    engine = TileEngine(inputs, call_of(), plan, blocks=[rows])
    logp = fused_gradients(engine, inputs.target, [rows], coefficient)
    exact = truth(inputs, rows, torch.ones(N))[0]
    weights = torch.zeros(N, dtype=torch.float64).index_copy(0, rows, exact[rows] - exact[rows].mean())
    torch.testing.assert_close(logp[rows], exact[rows])
    torch.testing.assert_close(engine.finish(), truth(inputs, rows, weights)[2])
    assert asked == [N - 1]


# ------------------------------------------------------------------------------------------------------------ products


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_products_are_added_or_written(overwrite, dtype, autocast):
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(4, 6, generator=generator).to(dtype), torch.randn(6, 3, generator=generator).to(dtype)
    total = torch.full((4, 3), torch.nan if overwrite else 1000.0)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        add_product(total, left, right, overwrite=overwrite)
    expected = (left @ right).float() + (0 if overwrite else 1000)
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=0)


class OnGPU(torch.Tensor):
    """A tensor that says it is on a GPU."""

    is_cuda = True


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("has_it", [False, True])
def test_gpus_add_16_bit_products_in_float32_where_torch_can(overwrite, has_it, monkeypatch):
    asked = []

    def addmm(total, left, right, *, beta, out_dtype, out):
        asked.append(out_dtype)
        product = left.as_subclass(torch.Tensor).to(out_dtype) @ right.as_subclass(torch.Tensor).to(out_dtype)
        return out.copy_(product if beta == 0 else total + product)

    monkeypatch.setattr(torch, "addmm", addmm)
    monkeypatch.setattr(products, "sums_in", lambda *_: has_it)
    left, right = (torch.full(shape, 1 + 2**-7).bfloat16().as_subclass(OnGPU) for shape in ((2, 2), (2, 3)))
    total = torch.full((2, 3), torch.nan if overwrite else 1.0)
    add_product(total, left, right, overwrite=overwrite)
    exact = 2 * (1 + 2**-7) ** 2 + (0 if overwrite else 1)
    assert bool((total == exact).all()) == has_it  # the product has more than 8 bits
    assert asked == [torch.float32] * has_it


def sums(total, left, right, *, out_dtype, out, rounded=False, in_place=True):
    product = (left @ right).to(out_dtype) if rounded else left.to(out_dtype) @ right.to(out_dtype)
    return out.copy_(total + product) if in_place else total + product


def missing(*_, **__):
    raise TypeError("addmm() got an unexpected keyword argument 'out_dtype'")


def not_for_it(*_, **__):
    raise NotImplementedError("out_dtype")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("addmm", "expected"),
    [
        (sums, True),
        (lambda *x, **y: sums(*x, **y, rounded=True), False),
        (lambda *x, **y: sums(*x, **y, in_place=False), False),
        (lambda total, *x, **y: sums(0 * total, *x, **y), False),
        (missing, False),
        (not_for_it, False),
    ],
    ids=["sums", "rounds the product", "elsewhere", "overwrites", "missing", "not for it"],
)
def test_whether_torch_sums_in_float32_is_tried_out(addmm, expected, dtype, monkeypatch):
    monkeypatch.setattr(torch, "addmm", addmm)
    assert products.sums_in.__wrapped__(torch.float32, dtype, torch.device("cpu")) is expected
