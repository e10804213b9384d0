"""bench/studies/real_model: who trains on what, DPO's loss, a budget in tokens, and the whole way with a tiny model."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset

from bench.studies.real_model import conflicts, contestants, cut_tail, data, measure, report, study
from bench.studies.real_model.contestants import CONTESTANTS, dpo
from bench.studies.real_model.data import DATA, groups_of, split
from bench.studies.real_model.study import Run
from mopo_trainer.commands import demo
from mopo_trainer.training.step import StepLabels

ROOT = Path(__file__).parents[1]


def test_three_seeds_hold_out_different_prompts_and_none_of_those_for_tuning():
    tuning = set(split("demo", 0, "tune")[1]["prompt"])
    parts = [split("demo", seed, "test") for seed in range(3)]
    held_out = [set(test["prompt"]) for _, test in parts]
    assert not held_out[0] & held_out[1] | held_out[0] & held_out[2] | held_out[1] & held_out[2]
    assert [len(x) for x in held_out] == [49] * 3
    assert len(tuning) == 20
    assert not tuning & set().union(*held_out)
    for train, test in parts:
        assert not set(train["prompt"]) & (tuning | set(test["prompt"]))
        assert len(train) == len(groups_of("demo")) - 49 - 20
    assert set(split("demo", 3, "test")[1]["prompt"]) != held_out[0]


def test_a_prompt_of_two_groups_is_not_on_both_sides(monkeypatch):
    twice = Dataset.from_dict({"prompt": [f"question {i // 2}" for i in range(60)]})
    monkeypatch.setattr(data, "groups_of", lambda name: twice)
    for seed in range(3):
        train, held_out = split("qa-feedback", seed, "test")
        assert len(train) > 0
        assert not set(train["prompt"]) & set(held_out["prompt"])


def test_fresh_asks_what_groups_of_four_need():
    assert CONTESTANTS["clone, fresh"].thresholds(DATA["demo"], 4) == {"brevity": 0.6667, "plain_language": 0.5833}
    assert CONTESTANTS["clone"].thresholds(DATA["demo"], 4) == DATA["demo"].thresholds
    assert CONTESTANTS["DPO, primary alone"].thresholds(DATA["demo"], 4) == {}


def test_dpo_compares_within_groups_by_the_weighted_orders():
    win_rate = torch.tensor([[1.0, 0.5], [0.0, 0.5], [0.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    labels = StepLabels(win_rate, torch.tensor([0, 0, 7, 7]), None)
    log_ratio = torch.tensor([3.0, 1.0, 2.0, -2.0])
    found = dpo(log_ratio, labels, torch.tensor([0.75, 0.25]))

    def loss(p, z):
        return -p * math.log(1 / (1 + math.exp(-z))) - (1 - p) * math.log(1 / (1 + math.exp(z)))

    # the first pair ties in the second objective: 0.75 + 0.25 / 2
    assert found.item() == pytest.approx((loss(0.875, 0.2) + loss(0.0, 0.4)) / 2, abs=1e-6)


def test_conflicts_correlate_win_rates_with_the_label_of_people(monkeypatch):
    groups = [
        {"prompt": "q", "responses": ["a", "bb", "ccc"], "win_rate": {"preferred": [0.0, 0.5, 1.0]}},
        {"prompt": "r", "responses": ["bb", "a", "a"], "win_rate": {"preferred": [1.0, None, 0.0]}},
    ]
    monkeypatch.setattr(conflicts, "groups_of", lambda name: groups)
    scorers = {"longer": lambda prompt, text: len(text), "shorter": lambda prompt, text: -len(text)}
    wins = [0, 0.5, 1, 1, 0.25]  # the two of one length beat one of two, half; nobody judged one of them
    expected = np.corrcoef(wins, [0.0, 0.5, 1.0, 1.0, 0.0])[0, 1]
    assert conflicts.correlations("qa-feedback", scorers) == pytest.approx([expected, -expected])


def test_prompts_keep_their_end():
    tokenizer = demo._tiny_model(0)[1]
    short = replace(DATA["qa-feedback"], max_prompt_length=measure.TEMPLATE_TOKENS + 9)
    assert measure.shorten("long passage. Question?", tokenizer, short) == "Question?"
    assert measure.shorten("Question?", tokenizer, short) == "Question?"


def test_the_cut_tail_is_minus_the_log_of_what_top_p_keeps():
    model, tokenizer = demo._tiny_model(0)
    logits = measure.next_token_logits(tokenizer, "question", "text", model)[0][0]
    probs = logits.softmax(-1).sort(descending=True).values
    before = probs.cumsum(-1) - probs  # a token is kept while those before it do not reach top-p
    expected = -probs.where(before < 0.6, 0).sum(-1).log().sum().item()
    found = cut_tail.cut_tail(model, tokenizer, ["question", "question"], [["text", "other"], ["text"]], 0.6)
    assert len(logits) == len(tokenizer("text")["input_ids"]) + 1
    assert found == pytest.approx(expected, abs=1e-4)
    assert found > 1


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """A random model over bytes, few prompts, two tokens a text."""
    model, tokenizer = demo._tiny_model(0)
    monkeypatch.setattr(study, "base_model", lambda: (model, tokenizer))
    monkeypatch.setattr(study, "base_loss", lambda: 5.0)
    monkeypatch.setattr(study, "load", lambda: demo._tiny_model(0)[0])
    monkeypatch.setattr(study, "SCRATCH", tmp_path / "scratch")
    monkeypatch.setattr(measure, "ORDINARY_TEXTS", 1)
    monkeypatch.setattr(measure, "DEMO", replace(measure.DEMO, max_new_tokens=6))
    monkeypatch.setattr(data, "groups_of", lambda name: groups_of(name).select(range(24)))
    for name in ("demo", "qa-feedback"):
        monkeypatch.setitem(DATA, name, replace(DATA[name], budget=900, held_out=5, tuning_prompts=4))
    return tmp_path


def test_runs_are_written_once_and_the_report_stands_on_them(tiny):
    runs = [
        Run("demo", "clone", 1e-3, 0),
        Run("demo", "DPO, weights", 1e-3, 1),
        Run("qa-feedback", "contrast", 1e-3, 0),
    ]
    study.execute(runs[:1], tiny, math.inf)
    study.execute(runs, tiny, math.inf)
    rows = study.known(tiny / "runs.jsonl")
    assert [study.run_of(row) for row in rows] == runs
    assert all(row["steps"] >= 1 and len(row["losses"]) == row["steps"] for row in rows)
    assert len(rows[0]["win_rates"]["brevity"]) == 5
    implied = rows[2]["implied"]["summed"]
    assert {name: len(rates) for name, rates in implied.items()} == {"preferred": 5, "brevity": 5}
    assert (tiny / "texts" / "qa-feedback_base_test0.jsonl").exists()
    with study.claim(runs[0]) as mine, study.claim(runs[0]) as other:
        assert (mine, other) == (True, False)
    assert report.demo(rows).count("| clone | 0.6, 0.55") == 1
    assert report.human(rows).count("contrast") == 1
    report.draw_front(report.measured(rows, "demo"), tiny / "front.png")
    assert (tiny / "front.png").stat().st_size > 1000


def test_the_budget_counts_what_enters_the_model(tiny):
    train, held_out = split("demo", 0, "test")
    whole = replace(DATA["demo"], max_prompt_length=500, max_length=2000)  # bytes, so that none is cut
    tokenizer = demo._tiny_model(0)[1]
    spent = {}
    for name in ("clone, primary alone", "clone", "contrast"):
        done = contestants.train(
            *(demo._tiny_model(0)[0], tokenizer, train, held_out, whole, CONTESTANTS[name]),
            *(1e-3, 0, str(tiny / "run")),
        )
        spent[name] = done.tokens / done.steps / whole.groups_per_step[CONTESTANTS[name].step]
    assert spent["clone, primary alone"] < spent["clone"] < spent["contrast"] / (1 + contestants.FORWARD_ALONE)
    ids = [len(tokenizer(text)["input_ids"]) + 1 for texts in train["responses"] for text in texts]
    in_responses = spent["contrast"] / (1 + contestants.FORWARD_ALONE) - sum(ids) / len(train)
    prompts = [len(tokenizer(prompt)["input_ids"]) for prompt in train["prompt"]]
    assert in_responses == pytest.approx(np.mean(prompts) + 3, abs=0.01)  # the template's tokens


def test_five_times_as_long_is_five_times_the_steps(tiny):
    train, held_out = split("demo", 0, "test")
    tokenizer = demo._tiny_model(0)[1]
    some = replace(DATA["demo"], budget=4000)
    ordinary, longer = (
        contestants.train(
            *(demo._tiny_model(0)[0], tokenizer, train, held_out, some, CONTESTANTS[name]),
            *(1e-3, 0, str(tiny / "run")),
        )
        for name in ("contrast", "contrast, five times as long")
    )
    assert abs(longer.steps - 5 * ordinary.steps) <= 2  # both are rounded
    assert longer.tokens / longer.steps == pytest.approx(ordinary.tokens / ordinary.steps)


def test_the_committed_tables_are_those_of_the_runs():
    results = ROOT / "bench/results/real_model"
    rows = study.known(results / "runs.jsonl")
    text = "\n\n".join(filter(None, (section(rows) for section in report.SECTIONS)))
    assert (results / "tables.md").read_text() == text + "\n"
    assert f"{report.BEGIN}\n\n{text}\n\n{report.END}" in (ROOT / "docs/results.md").read_text()
