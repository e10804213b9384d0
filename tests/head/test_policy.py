"""The fused policy step: its gradients are those of the objective, however groups fall into blocks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tiles import counted_logits

from bench.memory import measure
from mopo_kernels import mopo_loss, mopo_objective
from mopo_kernels.backends.native import cpu
from mopo_kernels.objective.steps import STEPS as POLICY_STEPS
from mopo_kernels.objective.steps import step_target
from mopo_kernels.objective.target import label_statistics

pytestmark = pytest.mark.skipif(bool(cpu.UNAVAILABLE), reason=cpu.UNAVAILABLE)

STEPS = list(POLICY_STEPS)


def labels(sizes, *, seed=0):
    """Groups of these sizes, shuffled, with two objectives of which the second labels only some groups."""
    generator = torch.Generator().manual_seed(seed)
    group = torch.repeat_interleave(torch.arange(len(sizes)) * 3 + 1, torch.tensor(sizes))
    group = group[torch.randperm(len(group), generator=generator)]
    win_rate = torch.rand(len(group), 2, generator=generator, dtype=torch.float64)
    win_rate[group == 1, 1] = float("nan")
    return win_rate, group, torch.tensor([1.0, 0.7], dtype=torch.float64)


@pytest.mark.parametrize("policy_step", STEPS)
def test_policy_gradient_is_the_derivative_of_the_objective(policy_step):
    batch = labels([2, 3, 5])
    logp = torch.randn(10, dtype=torch.float64, requires_grad=True)
    ref_logp = torch.randn(10, dtype=torch.float64)
    options = {"tau": 0.4, "ref_logp": ref_logp, "policy_step": policy_step}
    expected = torch.autograd.grad(mopo_objective(logp, *batch, **options).loss, logp)[0]
    target = step_target(policy_step, label_statistics(*batch, tau=0.4), ref_logp)
    torch.testing.assert_close(POLICY_STEPS[policy_step].gradient(logp.detach(), target), expected)


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(2, 4), min_size=1, max_size=5),
    length=st.integers(1, 6),
    workspace=st.integers(1, 60_000),
    policy_step=st.sampled_from(STEPS),
    average=st.booleans(),
    ignored=st.sampled_from([0.0, 0.4, 0.9]),
    seed=st.integers(0, 10**6),
)
def test_any_blocks_give_the_gradients_of_the_reference(sizes, length, workspace, policy_step, average, ignored, seed):
    batch = labels(sizes, seed=seed)
    sequences = sum(sizes)
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(sequences, length, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(140, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(140, generator=generator, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, 140, (sequences, length), generator=generator)
    target[torch.rand(target.shape, generator=generator) < ignored] = -100
    options = {"tau": 0.3, "eps": 0.01, "policy_step": policy_step, "average": average, "bias": bias}
    options["ref_logp"] = torch.randn(sequences, generator=generator, dtype=torch.float64)
    results = []
    for backend in ("cpu", "reference"):
        bound = {"workspace_bytes": workspace} if backend == "cpu" else {}
        output = mopo_loss(hidden, weight, target, *batch, backend=backend, **bound, **options)
        gradients = torch.autograd.grad(output.loss, (hidden, weight, bias), torch.tensor(0.5, dtype=torch.float64))
        results.append([output.loss, output.logp, *gradients])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-10, equal_nan=True)


@pytest.mark.parametrize("policy_step", STEPS)
def test_a_group_of_more_rows_than_a_block_has(policy_step):
    batch = labels([3])
    hidden = torch.randn(3, 60, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(140, 5, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, 140, (3, 60))
    results = []
    for options in ({"backend": "cpu", "workspace_bytes": 80 * 140 * 8}, {"backend": "reference"}):
        output = mopo_loss(
            *(hidden, weight, target, *batch), tau=0.3, policy_step=policy_step, ref_logp=torch.zeros(3), **options
        )
        results.append([output.loss, *torch.autograd.grad(output.loss, (hidden, weight))])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("policy_step", STEPS)
def test_groups_that_fit_a_block_have_their_logits_formed_once(policy_step, monkeypatch):
    batch = labels([2, 2, 2, 2])
    hidden, weight = torch.randn(8, 30, 5, requires_grad=True), torch.randn(140, 5, requires_grad=True)
    target = torch.randint(0, 140, (8, 30))
    formed = counted_logits(monkeypatch)
    options = {
        "policy_step": policy_step,
        "ref_logp": torch.zeros(8),
        "min_weight": 0,
        "workspace_bytes": 150 * 140 * 4,
    }
    mopo_loss(hidden, weight, target, *batch, tau=0.3, backend="cpu", **options).loss.backward()
    assert len(formed) > 1
    assert sum(formed) == 8 * 30 * 140


def test_a_frozen_heads_gradient_is_never_formed():
    batch = labels([2, 2])
    hidden, weight = torch.randn(4, 3, 8, requires_grad=True), torch.randn(3000, 8)
    target = torch.randint(0, 3000, (4, 3))
    _, largest = measure(
        lambda: mopo_loss(
            hidden, weight, target, *batch, tau=0.3, workspace_bytes=20_000, backend="cpu"
        ).loss.backward()
    )
    assert largest < weight.numel() * 4 / 2


@pytest.mark.parametrize("needed", [(True, False), (False, True)], ids=["frozen head", "frozen model"])
def test_only_the_gradients_that_are_needed_are_formed(needed):
    batch = labels([2, 2])
    hidden = torch.randn(4, 3, 5, requires_grad=needed[0])
    weight = torch.randn(30, 5, requires_grad=needed[1])
    target = torch.randint(0, 30, (4, 3))
    for backend in ("cpu", "reference"):
        mopo_loss(hidden, weight, target, *batch, tau=0.3, backend=backend).loss.backward()
    for x, need in zip((hidden, weight), needed, strict=True):
        assert (x.grad is not None) == need


def test_without_grad_nothing_is_formed_and_the_values_are_the_same():
    batch = labels([2, 2])
    hidden, weight = torch.randn(4, 3, 5, requires_grad=True), torch.randn(30, 5, requires_grad=True)
    target = torch.randint(0, 30, (4, 3))
    with_gradients = mopo_loss(hidden, weight, target, *batch, tau=0.3)
    with torch.no_grad():
        without = mopo_loss(hidden, weight, target, *batch, tau=0.3)
    assert not without.loss.requires_grad
    torch.testing.assert_close(without.loss, with_gradients.loss.detach())


def test_the_weight_gradient_is_summed_in_float32():
    """Many blocks of equal bfloat16 contributions: a bfloat16 sum would stop growing after 256 of them."""
    sequences, length = 64, 16
    hidden = torch.ones(sequences, length, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    win_rate = torch.full((sequences, 1), 0.5)
    group = torch.arange(sequences // 2).repeat(2)
    target = torch.zeros(sequences, length, dtype=torch.int64)
    loss = mopo_loss(hidden, weight, target, win_rate, group, torch.ones(1), tau=1.0, workspace_bytes=64).loss
    (loss * (sequences // 2)).backward()  # every token contributes −w/2 = −1/4
    torch.testing.assert_close(weight.grad, torch.tensor([[-256.0], [256.0]], dtype=torch.bfloat16))
