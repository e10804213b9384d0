"""Policy steps: each loss from its definition, group by group, with the gradient that stands beside it."""

import itertools
import math

import pytest
import torch

from mopo_kernels.objective.steps import STEPS, StepTarget, step_target
from mopo_kernels.objective.target import label_statistics

TAU = 0.4
SIZES = (2, 3, 5)  # pairs, where (n-1)/n is its smallest; an odd group; one of many pairs
CHOICES = pytest.mark.parametrize("step", STEPS)


def batch(seed=0):
    """Labels of groups in mixed order, log-probabilities and those of the reference policy."""
    generator = torch.Generator().manual_seed(seed)
    group = torch.arange(len(SIZES)).repeat_interleave(torch.tensor(SIZES)) * 5 - 3
    group = group[torch.randperm(len(group), generator=generator)]
    win_rate = torch.rand(len(group), 2, generator=generator, dtype=torch.float64)
    labels = label_statistics(win_rate, group, torch.tensor([1.0, 0.7]), tau=TAU, backend="reference")
    logp, ref_logp = torch.randn(2, len(group), generator=generator, dtype=torch.float64)
    return labels, group, logp, ref_logp


def by_definition(step, labels, group, logp, ref_logp):
    """The loss of the docstring, in loops."""
    h, scores, weights = logp - ref_logp, labels.values.score, labels.weights
    total = 0.0
    for i in group.unique():
        members = (group == i).nonzero()[:, 0]
        n = len(members)
        if step == "clone":
            total -= (weights[members] * logp[members]).sum()
        elif step == "contrast":
            total -= (weights[members] * h[members].log_softmax(0)).sum()
        else:
            pairs = list(itertools.combinations(members.tolist(), 2))
            total += sum((h[a] - h[b] - (n - 1) / n * (scores[a] - scores[b])) ** 2 for a, b in pairs) / len(pairs)
    return total / len(group.unique())


@CHOICES
def test_the_loss_is_its_definition(step):
    labels, group, logp, ref_logp = batch()
    loss = STEPS[step].loss(logp, step_target(step, labels, ref_logp))
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, by_definition(step, labels, group, logp, ref_logp), rtol=1e-12, atol=0)


@CHOICES
def test_the_gradient_is_that_of_the_loss_and_the_loss_is_smooth(step):
    labels, _, logp, ref_logp = batch()
    target = step_target(step, labels, ref_logp)
    inputs = (logp.requires_grad_(), ref_logp.requires_grad_())

    def loss(logp, ref_logp):
        return STEPS[step].loss(logp, step_target(step, labels, ref_logp))

    (expected,) = torch.autograd.grad(loss(*inputs), logp)
    detached = StepTarget(*(x.detach() for x in target))
    torch.testing.assert_close(STEPS[step].gradient(logp.detach(), detached), expected, rtol=1e-12, atol=1e-14)
    needed = inputs if step != "clone" else inputs[:1]
    given = ref_logp.detach()
    assert torch.autograd.gradcheck(lambda x, r=given: loss(x, r), needed)
    assert torch.autograd.gradgradcheck(lambda x, r=given: loss(x, r), needed)


@CHOICES
def test_what_a_step_says_that_it_needs(step):
    """Without NEEDS_GROUP the gradient is there before any log-probability; with it, before other groups'."""
    labels, group, logp, ref_logp = batch()
    target = step_target(step, labels, ref_logp)
    mine = group == group[0]
    other = STEPS[step].gradient(torch.where(mine, logp, math.pi), target)
    torch.testing.assert_close(other[mine], STEPS[step].gradient(logp, target)[mine])
    whole = torch.equal(STEPS[step].gradient(torch.where(mine, logp * 2, logp), target)[mine], other[mine])
    assert whole != STEPS[step].NEEDS_GROUP


@CHOICES
def test_a_constant_per_group_cancels_where_responses_are_compared(step):
    labels, _, logp, ref_logp = batch()
    target = step_target(step, labels, ref_logp)
    moved = logp + torch.tensor([3.0, -2.0, 8.0])[labels.slot]
    before, after = (STEPS[step].loss(x, target) for x in (logp, moved))
    torch.testing.assert_close(after, before - (3.0 if step == "clone" else 0), rtol=0, atol=1e-10)
    gradient = STEPS[step].gradient(logp, target)
    expected = torch.full_like(gradient, -1 / 3 if step == "clone" else 0)
    torch.testing.assert_close(target.groups.sum(gradient), expected, rtol=1e-12, atol=1e-14)


def test_what_log_probabilities_are_compared_with():
    labels, group, _, ref_logp = batch()
    size = (group[:, None] == group).sum(1).double()
    assert torch.equal(step_target("clone", labels, ref_logp).shift, torch.zeros_like(ref_logp))
    assert torch.equal(step_target("clone", labels, None).shift, torch.zeros_like(ref_logp))
    assert torch.equal(step_target("contrast", labels, ref_logp).shift, ref_logp)
    shift = step_target("regress", labels, ref_logp.float()).shift
    torch.testing.assert_close(shift, ref_logp.float().double() + (size - 1) / size * labels.values.score)


def test_a_target_survives_one_tensor():
    labels, _, _, ref_logp = batch()
    target = step_target("regress", labels, ref_logp)
    packed = target.packed()
    assert packed.shape == (4 * len(ref_logp) + 1,)
    assert packed.dtype == torch.float64
    for got, expected in zip(StepTarget.unpacked(packed), target, strict=True):
        assert got.dtype == expected.dtype
        assert torch.equal(got, expected)
    assert len({x.sum().item() for x in target}) == 5  # no two fields are alike


def test_a_part_of_a_target_keeps_the_number_of_groups():
    labels, _, _, ref_logp = batch()
    target, index = step_target("regress", labels, ref_logp), torch.tensor([7, 0, 3])
    part = target.take(index)
    assert part.num_groups == 3
    for got, expected in zip(part[:4], target, strict=False):
        assert torch.equal(got, expected[index])


def test_one_sequence_in_a_group_of_its_own():
    target = StepTarget.unpacked(StepTarget.packed_one(-1.0, torch.device("cpu")))
    logp = torch.tensor([-7.0], dtype=torch.float64)
    assert STEPS["clone"].loss(logp, target) == -7
    assert STEPS["clone"].gradient(logp, target).tolist() == [1]
    assert StepTarget.unpacked(target.packed()) == target


@pytest.mark.parametrize(("step", "compared"), [("clone", "neither"), ("contrast", "first"), ("regress", "lag")])
def test_under_a_lag_the_optimum_is_relative_to_the_lag_policy(step, compared):
    """pi_lag exp(s / tau), over a table whose responses pi_ref0 draws equally; the lag counts once."""
    generator = torch.Generator().manual_seed(0)
    lag = torch.randn(5, generator=generator, dtype=torch.float64).log_softmax(0)
    first = torch.full_like(lag, -math.log(5))
    labels = label_statistics(
        torch.rand(5, 2, generator=generator, dtype=torch.float64),
        torch.zeros(5, dtype=torch.int64),
        torch.tensor([1.0, 0.7]),
        tau=TAU,
        lag_log_ratio=lag - first,
    )
    scores = labels.values.score * (4 / 5 if step == "regress" else 1)

    def gradient(logits, ref_logp):
        logits = logits.detach().requires_grad_()
        STEPS[step].loss(logits.log_softmax(0), step_target(step, labels, ref_logp)).backward()
        return logits.grad.abs().max()

    references = {"first": first, "lag": lag}
    assert gradient(lag + scores, references.get(compared)) < 1e-12
    for other in references.keys() - {compared} if step != "clone" else ():
        assert gradient(lag + scores, references[other]) > 1e-2
