"""A training step without a model: the responses it keeps, what the dual and the log get, micro-batches."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from mopo_kernels import MOPODual
from mopo_kernels.objective.target import label_statistics
from mopo_trainer.data.packing import GroupBatch, SequenceBatch, pack
from mopo_trainer.training import step as step_module
from mopo_trainer.training.head import Scoring
from mopo_trainer.training.step import StepBatch, StepLabels, StepRecord

PAD = 0
NAMES = ["brief", "friendly"]
ALONE = SimpleNamespace(num_processes=1, device="cpu")


def make_dual(**options):
    """The primary stands second, so that its place is not taken for granted."""
    settings = {"primary": "friendly", "thresholds": {"brief": 0.6}, "eps": 0.01, "update": "sgd"} | options
    dual = MOPODual(NAMES, **settings)
    dual.multipliers[0] = 0.3
    return dual


def settings(**options):
    return SimpleNamespace(**{"policy_step": "clone", "min_weight": 0.1} | options)


def make_batch(seed, sizes=(3, 2, 4), lag=False):
    """Groups of ragged sequences with their labels."""
    generator = torch.Generator().manual_seed(seed)
    group = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    lengths = torch.randint(3, 9, (len(group),), generator=generator).tolist()
    sequences = [([10 + int(g), 20, *range(30, 28 + length)], 2) for g, length in zip(group, lengths, strict=True)]
    win_rate = torch.rand(len(group), 2, generator=generator, dtype=torch.float64)
    ratio = torch.randn(len(group), generator=generator, dtype=torch.float64) if lag else None
    return GroupBatch(SequenceBatch.of(sequences), torch.arange(len(group)), group), StepLabels(win_rate, group, ratio)


def step_of(batch, labels, dual, *, share_prompt=False, **options):
    return StepBatch.of(batch, labels, dual, settings(**options), Scoring(PAD, share_prompt=share_prompt))


@pytest.mark.parametrize("lag", [False, True])
def test_the_statistics_are_those_of_labels_and_dual(lag):
    dual, (batch, labels) = make_dual(), make_batch(0, lag=lag)
    found = step_of(batch, labels, dual).statistics.values
    scores = labels.win_rate @ dual.multipliers / 0.08 + (labels.lag_log_ratio if lag else 0)
    weights = torch.cat([part.softmax(0) for part in scores.split([3, 2, 4])])
    torch.testing.assert_close(found.weights, weights, rtol=1e-12, atol=0)
    assert (found.lower_bounds < found.win_rates).all()  # the dual's eps counts


@pytest.mark.parametrize("share", [False, True])
def test_clone_takes_the_responses_above_the_least_weight(share):
    dual, (batch, labels) = make_dual(), make_batch(1)
    step = step_of(batch, labels, dual, share_prompt=share)
    weights = step.statistics.weights
    kept = [i for i, weight in enumerate(weights.tolist()) if weight > 0.1]
    assert 3 <= len(kept) < len(weights)
    assert step.index.tolist() == kept
    expected = pack(batch.sequences.take(torch.tensor(kept)), batch.group[kept] if share else None, PAD)
    for name in ("input_ids", "position_ids", "segment", "source", "target"):
        assert torch.equal(getattr(step.packed, name), getattr(expected, name)), name
    dropped = sum(weight for i, weight in enumerate(weights.tolist()) if i not in kept)
    assert dropped > 0.01
    record = StepRecord(least_weight=0.1)
    record.add(step)
    record.move(dual)
    assert record.metrics(dual, ALONE)["dropped_mass"] == pytest.approx(dropped / 3)
    at_the_bound = step_of(batch, labels, dual, min_weight=float(weights[kept[0]]))
    assert kept[0] not in at_the_bound.index.tolist()  # above, not at


@pytest.mark.parametrize("policy_step", ["contrast", "regress"])
def test_steps_against_a_reference_take_every_response(policy_step):
    batch, labels = make_batch(1)
    step = step_of(batch, labels, make_dual(), policy_step=policy_step)
    assert step.index is None
    assert step.packed.target.shape[0] == len(labels.group)


@pytest.mark.parametrize("lag", [False, True])
@pytest.mark.parametrize("update", ["sgd", "barrier"])
def test_micro_batches_move_the_multipliers_as_one_batch(update, lag):
    expected, dual, record = make_dual(update=update), make_dual(update=update), StepRecord()
    for first in (0, 10):  # what the first step held is forgotten in the second
        parts = [make_batch(first + i, sizes, lag=lag) for i, sizes in enumerate([(3, 2, 4), (2,), (2, 3)])]
        win_rate = torch.cat([labels.win_rate for _, labels in parts])
        group = torch.arange(6).repeat_interleave(torch.tensor([3, 2, 4, 2, 2, 3]))  # numbered through
        expected.update(win_rate, group, torch.cat([labels.lag_log_ratio for _, labels in parts]) if lag else None)
        for batch, labels in parts:
            record.add(step_of(batch, labels, dual))
        record.move(dual)
    assert expected.multipliers[0] != 0.3
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(dual.state_dict()[name], value, rtol=1e-12, atol=1e-12)


def test_a_step_of_one_batch_hands_its_statistics_on():
    dual, (batch, labels), record = make_dual(), make_batch(0, lag=True), StepRecord()
    expected = make_dual()
    expected.update(*labels)
    step, calls, update = step_of(batch, labels, dual), [], dual.update
    dual.update = lambda *args, **options: calls.append(options) or update(*args, **options)
    record.add(step)
    record.move(dual)
    assert calls == [{"statistics": step.statistics}]
    torch.testing.assert_close(dual.state_dict(), expected.state_dict(), rtol=1e-12, atol=1e-12)


def test_logs_are_means_and_sums_since_the_last_log(monkeypatch):
    clock = iter([0.0, 100.0, 104.0, 200.0, 205.0])  # made, first step, log, first step, log
    monkeypatch.setattr(step_module.time, "perf_counter", lambda: next(clock))
    dual, record = make_dual(update="exact"), StepRecord(least_weight=0.1)
    assert record.metrics(dual, ALONE) == {}
    steps = [step_of(*make_batch(seed), dual) for seed in (1, 2)]
    for step in steps:
        record.start_clock()
        record.add(step)
        record.move(dual)
    logs = record.metrics(dual, ALONE)
    values = [step.statistics.values for step in steps]
    for name in ("ess", "kl"):
        assert logs[name] == pytest.approx(sum(float(getattr(v, name)) for v in values) / 2)
    weights = torch.cat([v.weights for v in values])
    assert logs["dropped_mass"] == pytest.approx(float(weights[weights <= 0.1].sum()) / 6)
    assert logs["dropped_mass"] > 0
    for k, name in enumerate(NAMES):
        assert logs[f"win_rate/{name}"] == pytest.approx(sum(float(v.win_rates[k]) for v in values) / 2)
        assert logs[f"bound/{name}"] == pytest.approx(sum(float(v.lower_bounds[k]) for v in values) / 2)
        assert logs[f"multiplier/{name}"] == dual.multipliers[k]
    assert (logs["threshold/brief"], logs["slack/brief"]) == (0.6, logs["bound/brief"] - 0.6)
    assert not {"threshold/friendly", "slack/friendly"} & set(logs)
    lengths = [make_batch(seed)[0].sequences.lengths for seed in (1, 2)]
    tokens = [int(all_[step.index].sum()) for all_, step in zip(lengths, steps, strict=True)]
    skipped = [int(all_.sum()) - kept for all_, kept in zip(lengths, tokens, strict=True)]
    assert logs["skipped_tokens"] == sum(skipped) > 0
    assert logs["tokens_per_second"] == sum(tokens) / 4  # from the first step on
    assert record.metrics(dual, ALONE) == {}
    record.start_clock()
    record.add(steps[1])
    record.move(dual)
    logs = record.metrics(dual, ALONE)
    assert logs["kl"] == pytest.approx(float(values[1].kl))
    assert (logs["skipped_tokens"], logs["tokens_per_second"]) == (skipped[1], tokens[1] / 5)


def test_tokens_and_router_losses_are_those_of_all_ranks():
    """A test double of accelerate's reduce, by which another rank has as much as this one again."""
    pair = SimpleNamespace(num_processes=2, device="cpu", reduce=lambda x, reduction: {"sum": 2 * x}[reduction])
    found = []
    for accelerator in (ALONE, pair):
        dual, record = make_dual(update="exact"), StepRecord(least_weight=0.1)
        record.add(replace(step_of(*make_batch(1), dual), router_loss=torch.tensor(0.7)))
        record.move(dual)
        found.append(record.metrics(dual, accelerator))
    assert found[1]["skipped_tokens"] == 2 * found[0]["skipped_tokens"] > 0
    assert found[1]["router_loss"] == found[0]["router_loss"] == pytest.approx(0.7)


def test_an_objective_that_one_batch_leaves_unlabelled_is_logged_from_the_others():
    dual, record = make_dual(update="exact"), StepRecord()
    (batch, labels), (other, unlabelled) = make_batch(1), make_batch(2)
    unlabelled.win_rate[:, 0] = torch.nan
    for each in ((batch, labels), (other, unlabelled)):
        record.add(step_of(*each, dual))
        record.move(dual)
    alone = label_statistics(*labels[:2], dual.multipliers, tau=0.08, eps=0.01, primary=1).values
    assert record.metrics(dual, ALONE)["win_rate/brief"] == pytest.approx(float(alone.win_rates[0]))


@pytest.mark.parametrize("lag", [False, True])
def test_estimates_in_the_log_are_those_of_the_whole_step(lag):
    """ESS and bounds are no means over micro-batches, and batches of more groups count more."""
    dual, record = make_dual(), StepRecord()
    parts = [make_batch(i, sizes, lag=lag) for i, sizes in enumerate([(3, 2, 4), (2,)])]
    for batch, labels in parts:
        record.add(step_of(batch, labels, dual))
    whole = StepLabels.of([labels for _, labels in parts], dual).statistics(dual).values
    record.move(dual)
    logs = record.metrics(dual, ALONE)
    for name in ("ess", "kl"):
        assert logs[name] == pytest.approx(float(getattr(whole, name)), rel=1e-12)
    assert logs["bound/brief"] == pytest.approx(float(whole.lower_bounds[0]), rel=1e-12)


def test_a_step_without_a_group_on_this_rank_has_labels_of_none():
    labels = StepLabels.of([], make_dual())
    assert labels.win_rate.shape == (0, 2)
    assert labels.group.shape == (0,)
    assert labels.lag_log_ratio is None
