"""bench/studies/sampled_training: what runs of a seed share, its numbers on a tiny model, and the committed table."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.studies import sampled_training as training
from bench.studies.lab.report import save
from bench.studies.real_model import study
from bench.studies.sampled_training import EXACT, LORA, OTHER_ORDER, WHOLE, Run
from mopo_trainer.commands import demo

ROOT = Path(__file__).parents[1]


def test_runs_of_a_seed_read_the_same_groups():
    order = {name: training.order_of(Run(LORA, name, 3)) for name in training.FLOORS}
    assert order[EXACT] == order["1/16"] == order["1/64"] == order["1/256"] == training.order_of(Run(WHOLE, EXACT, 3))
    assert order[OTHER_ORDER] != order[EXACT]
    assert sorted(order[OTHER_ORDER]) == sorted(order[EXACT])
    assert len(set(order[EXACT])) == training.STEPS * training.GROUPS
    assert min(order[EXACT]) >= training.HELD_OUT
    assert set(training.order_of(Run(LORA, EXACT, 4))) != set(order[EXACT])


@pytest.fixture
def tiny(monkeypatch):
    """A random model over bytes, two steps."""
    monkeypatch.setattr(study, "base_model", lambda: demo._tiny_model(0))
    monkeypatch.setattr(study, "load", lambda: demo._tiny_model(0)[0])
    monkeypatch.setattr(training, "STEPS", 2)
    monkeypatch.setattr(training, "HELD_OUT", 3)
    monkeypatch.setattr(training, "RATES", {LORA: 1e-2, WHOLE: 1e-2})
    training.untrained.cache_clear()
    yield
    training.untrained.cache_clear()


def test_runs_differ_in_their_gradients_alone_and_the_report_stands_on_them(tiny, tmp_path):
    path = tmp_path / "training.jsonl"
    runs = [Run(WHOLE, name, seed) for seed in (0, 1) for name in (EXACT, "1/16")] + [Run(LORA, "1/16", 0)]
    training.execute(runs[:1], path, math.inf)
    training.execute(runs, path, 0)
    assert [training.run_of(row) for row in study.known(path)] == runs[:1]
    training.execute(runs, path, math.inf)
    rows = study.known(path)
    assert [training.run_of(row) for row in rows] == runs
    for exact, sampled in zip(rows[0:4:2], rows[1:4:2], strict=True):
        assert sampled["losses"][0] == pytest.approx(exact["losses"][0], abs=2e-6)
        assert sampled["held_out"][0] == exact["held_out"][0]
        assert sampled["held_out"][1] != exact["held_out"][1] < exact["held_out"][0]
    whole = sum(x.numel() for x in demo._tiny_model(0)[0].parameters())
    assert [row["trained_parameters"] == whole for row in rows] == [True] * 4 + [False]
    assert training.result(runs[1])["losses"] == rows[1]["losses"]
    assert training.tables(rows).count(f"| {WHOLE} | 1/16 | 2 |") == 1
    assert LORA not in training.tables(rows)  # one seed has no interval
    save(training.draw(everywhere(rows[:4])), tmp_path / "training.png")
    assert (tmp_path / "training.png").stat().st_size > 1000


def everywhere(rows):
    """The same losses under every setting and floor, for the picture."""
    sampled = [row | {"gradients": name} for name in ("1/64", "1/256") for row in rows if row["gradients"] == "1/16"]
    return [row | {"setting": setting} for setting in training.RATES for row in [*rows, *sampled]]


def test_losses_are_nats_a_token_of_the_weighted_responses(tiny):
    run = Run(LORA, EXACT, 0)
    trainer = training.make_trainer(run)
    rows = training.texts().select(range(training.HELD_OUT))
    held_out = training.tokenize(rows, trainer.dual.objectives, trainer.processing_class, trainer.args)
    found = training.result(run)
    assert found["losses"][0] == pytest.approx(plain_loss(trainer, trainer.train_groups, training.GROUPS), rel=1e-5)
    assert found["held_out"][0] == pytest.approx(plain_loss(trainer, held_out, training.HELD_OUT), rel=1e-5)


def plain_loss(trainer, groups, count):
    """Nats a token of the first groups, from the untrained model's logits of one response after the other."""
    model, counted = demo._tiny_model(0)[0].eval(), training.Weighted.of(trainer, groups.first(count))
    nats = tokens = 0.0
    for (ids, prompt), weight in zip(counted.sequences, counted.weight.tolist(), strict=True):
        with torch.no_grad():
            logp = model(input_ids=torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
        picked = logp.gather(-1, torch.tensor(ids[1:])[:, None])[prompt - 1 :]
        nats, tokens = nats - weight * float(picked.sum()), tokens + weight * len(picked)
    return nats / tokens


def test_differences_are_paired_by_seed():
    def row(name, seed, end):
        return {"setting": LORA, "gradients": name, "seed": seed, "held_out": [9.0, end]}

    rows = [row(EXACT, 0, 1.0), row(EXACT, 1, 5.0), row("1/16", 1, 5.5), row("1/16", 0, 1.3), row(EXACT, 2, 0.0)]
    assert training.less_exact(rows, LORA, "1/16", training.final).tolist() == pytest.approx([0.3, 0.5])
    mean, low, high = training.interval(np.array([0.3, 0.5]))
    assert (mean, low, high) == pytest.approx((0.4, 0.4 - 12.7062 * 0.1, 0.4 + 12.7062 * 0.1), abs=1e-4)


def test_the_committed_table_is_that_of_the_runs():
    rows = [json.loads(line) for line in (ROOT / "bench/results/sampling/training.jsonl").read_text().splitlines()]
    text = f"{training.BEGIN}\n\n{training.tables(rows)}\n\n{training.END}"
    assert text in (ROOT / "docs/sampling.md").read_text()
    first = {(row["setting"], row["seed"]): row["losses"][0] for row in rows if row["gradients"] == EXACT}
    for row in rows:
        assert len(row["losses"]) == training.STEPS
        if row["gradients"] != OTHER_ORDER:
            assert row["losses"][0] == pytest.approx(first[row["setting"], row["seed"]], abs=2e-6)
