"""Label statistics: groups, dtypes, devices, operators; test_objective.py holds their values to the formulas."""

import math

import pytest
import torch

from mopo_kernels import MOPODual, mopo_objective, mopo_weights
from mopo_kernels.backends.batch import LabelValues
from mopo_kernels.backends.native import cpu
from mopo_kernels.objective import ops, target
from mopo_kernels.objective.target import NEUTRAL, Groups, TargetPolicy, label_statistics

BACKENDS = pytest.mark.parametrize(
    "backend", ["reference", pytest.param("cpu", marks=pytest.mark.skipif(bool(cpu.UNAVAILABLE), reason="not built"))]
)
TAU = 0.3


def labels(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    group = torch.tensor([9, -4, 9, 10**12, -4, 9, 10**12])
    win_rate = torch.rand(7, 3, generator=generator).to(dtype)
    win_rate[group == 9, 1] = math.nan  # a group that objective 1 does not label
    win_rate[1, 2] = math.nan  # a response of a group that others of it label
    return win_rate, group, torch.tensor([0.5, 1.0, 2.0], dtype=dtype)


def test_groups_are_dense_slots():
    _, group, _ = labels()
    groups = Groups.of(group)
    assert groups.slot.tolist() == [1, 0, 1, 2, 0, 1, 2]
    assert groups.size.tolist() == [3, 2, 3, 2, 2, 3, 2]
    assert groups.num_groups == 3
    x = torch.tensor([1.0, 2, 4, 8, 16, 32, 64], dtype=torch.float64)
    assert groups.sum(x).tolist() == [37, 18, 37, 72, 18, 37, 72]
    assert groups.sum(x[:, None] * torch.tensor([1.0, 2])).T.tolist() == [
        groups.sum(x).tolist(),
        groups.sum(2 * x).tolist(),
    ]
    assert groups.mean_of_sums(x) == 127 / 3
    expected = torch.empty_like(x)
    for i in group.unique():
        expected[group == i] = (1000 * x)[group == i].log_softmax(0)
    torch.testing.assert_close(groups.log_softmax(1000 * x), expected)


def test_unlabelled_responses_are_neutral_and_unlabelled_groups_zero():
    win_rate, group, multipliers = labels()
    policy = TargetPolicy.of(target.Labels(win_rate, group, multipliers, None, TAU, 0.0, 1))
    assert (policy.values[group == 9, 1] == 0).all()
    assert policy.values[1, 2] == NEUTRAL == 0.5
    assert policy.labelled.all(0).tolist() == [True, False, True]
    torch.testing.assert_close(policy.scores, policy.values @ multipliers / TAU)


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_statistics_are_float64_and_reported_in_the_callers_dtype(backend, dtype):
    win_rate, group, multipliers = labels(dtype)
    statistics = label_statistics(win_rate, group, multipliers, tau=TAU, eps=0.01, primary=1, backend=backend)
    wide = label_statistics(
        win_rate.double(), group, multipliers.double(), tau=TAU, eps=0.01, primary=1, backend=backend
    )
    reported = statistics.reported()
    for got, report, expected in zip(statistics.values, reported, wide.values, strict=True):
        assert got.dtype == torch.float64
        assert report.dtype == dtype
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(report, got.to(dtype), rtol=0, atol=0)
    reported.weights.zero_()
    assert statistics.weights.sum().item() == pytest.approx(3)
    assert statistics.values.valid == 1
    assert statistics.values.size.tolist() == [3, 2, 3, 2, 2, 3, 2]
    assert statistics.groups.sum(statistics.weights).tolist() == pytest.approx([1] * 7)
    assert statistics.to("meta").slot.is_meta
    assert statistics.to("meta").values.weights.is_meta


@BACKENDS
def test_statistics_are_what_the_objective_reports(backend):
    win_rate, group, multipliers = labels()
    lag = torch.linspace(-1, 1, 7)
    options = {"tau": TAU, "eps": 0.02, "primary": 1, "lag_log_ratio": lag, "backend": backend}
    reported = label_statistics(win_rate, group, multipliers, **options).reported()
    output = mopo_objective(torch.zeros(7), win_rate, group, multipliers, **options)
    for name in ("weights", "win_rates", "lower_bounds", "chi", "ess", "kl"):
        assert torch.equal(getattr(reported, name), getattr(output, name)), name
    assert reported.num_groups == 3
    plain = mopo_weights(
        win_rate, group, multipliers / multipliers[0], tau=TAU / multipliers[0].item(), lag_log_ratio=lag
    )
    torch.testing.assert_close(reported.weights, plain)
    bare = label_statistics(win_rate, group, multipliers, tau=TAU, primary=1, backend=backend).reported()
    torch.testing.assert_close(bare.lower_bounds, bare.win_rates)  # without eps there is no ball
    assert bare.chi.isinf().all()


@BACKENDS
def test_no_gradient_flows_into_labels(backend):
    win_rate, group, multipliers = labels()
    statistics = label_statistics(
        win_rate.requires_grad_(), group, multipliers.requires_grad_(), tau=TAU, eps=0.01, primary=1, backend=backend
    )
    assert not statistics.buffer.requires_grad


def test_a_batch_that_the_kernel_refuses_for_nothing_is_reported(monkeypatch):
    def refuse(labels, _):
        slot, buffer = target.torch_statistics(labels)
        return slot, buffer.index_fill(0, torch.tensor([0]), 0)

    monkeypatch.setattr(target.ops, "run_label_statistics", refuse)
    monkeypatch.setattr(target.backends, "choose", lambda *_: target.backends.Choice("", "", "cpu", "", True))
    with pytest.raises(RuntimeError, match="nothing is wrong: please report this"):
        label_statistics(*labels(), tau=TAU, primary=1)


@pytest.mark.skipif(bool(cpu.UNAVAILABLE), reason=cpu.UNAVAILABLE)
@pytest.mark.parametrize("lag", [None, torch.linspace(-1, 1, 7)], ids=["no lag", "lag"])
def test_opcheck_of_label_statistics(lag):
    win_rate, group, multipliers = labels(torch.float32)
    torch.library.opcheck(ops.measure_labels, (win_rate, group, multipliers, lag, [TAU, 0.01], 1, "cpu"))


@pytest.mark.skipif(bool(cpu.UNAVAILABLE), reason=cpu.UNAVAILABLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sequence_sums_and_their_opcheck(dtype):
    logp = torch.randn(5, 8, dtype=dtype)[:, ::2].requires_grad_()
    ids = torch.arange(20).view(4, 5).T.remainder(3)
    torch.library.opcheck(ops.sequence_sums, (logp, ids, 2, "cpu"))
    sums, counts = ops.sequence_sums(logp, ids, 2, "cpu")
    torch.testing.assert_close(sums, torch.where(ids == 2, 0, logp).sum(1, dtype=torch.float64))
    assert counts.tolist() == (ids != 2).sum(1).tolist()
    (gradient,) = torch.autograd.grad(sums, logp, torch.arange(5.0).double())
    assert torch.equal(gradient, torch.where(ids == 2, 0.0, torch.arange(5.0)[:, None]).to(dtype))


def test_the_buffer_holds_every_field_once():
    length = LabelValues.length(7, 3)
    values = LabelValues.unpack(torch.arange(float(length)), 7, 3)
    assert torch.cat([x.reshape(-1) for x in values]).tolist() == list(range(length))
    assert [x.shape for x in values] == [()] * 4 + [(7,)] * 3 + [(3,)] * 3


@pytest.mark.parametrize("rule", ["exact", "sgd", "barrier"])
@pytest.mark.parametrize("eps", [0.0, 0.01])
def test_the_dual_takes_statistics_that_are_there_already(rule, eps, monkeypatch):
    win_rate, group, _ = labels()
    options = {"primary": "b", "thresholds": {"a": 0.6, "c": 0.4}, "tau": TAU, "eps": eps, "update": rule}
    alone, given = MOPODual(["a", "b", "c"], **options), MOPODual(["a", "b", "c"], **options)
    for _ in range(2):
        alone.update(win_rate, group)
        statistics = label_statistics(win_rate, group, given.multipliers, tau=TAU, eps=eps, primary=1)
        with monkeypatch.context() as patch:
            patch.setattr("mopo_kernels.objective.multipliers.label_statistics", None)
            given.update(win_rate, group, statistics=statistics)
    for name, value in alone.state_dict().items():
        assert torch.equal(given.state_dict()[name], value) or value.isnan().all(), name
    assert rule == "exact" or not torch.equal(alone.multipliers, MOPODual(["a", "b", "c"], **options).multipliers)
