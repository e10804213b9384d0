"""`mopo demo --tiny`: the demo's whole path on a random model, and how it judges."""

import io
import json
from contextlib import redirect_stdout
from dataclasses import asdict

import pytest
from rich.console import Console

from mopo_trainer.commands import demo
from mopo_trainer.commands.demo import ALONE, BASE, MOPO, OBJECTIVES, THRESHOLDS, compare, run_demo, spread
from mopo_trainer.commands.demo_budget import Journal, Rates, Sizes, describe, fit
from mopo_trainer.report.evaluate import Interval, verdict


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The directory of a finished run, and what it printed."""
    output, printed = tmp_path_factory.mktemp("demo"), io.StringIO()
    with redirect_stdout(printed):
        assert run_demo(tiny=True, steps=3, output=output) == 0
    return output, printed.getvalue()


@pytest.fixture
def finished(run):
    return run[0]


def test_files(finished):
    assert {path.name for path in finished.iterdir() if path.is_file()} == {
        "results.json",
        "texts.jsonl",
        "front.png",
        "training.png",
    }
    for figure in ("front.png", "training.png"):
        assert (finished / figure).read_bytes()[:4] == b"\x89PNG"


def test_thresholds_reach_the_training(finished):
    logs = json.loads((finished / "results.json").read_text())["log_history"]
    assert set(logs) == {ALONE, MOPO}
    for name, constrained in ((ALONE, False), (MOPO, True)):
        steps = [row for row in logs[name] if "loss" in row]
        assert len(steps) == 3
        assert all(row["multiplier/friendliness"] == 1 for row in steps)
        assert all((row["multiplier/brevity"] > 0) == constrained for row in steps)
        assert all(("threshold/brevity" in row) == constrained for row in steps)


def test_the_labels_are_asked_what_fresh_texts_need(run):
    results = json.loads((run[0] / "results.json").read_text())
    assert results["settings"]["asked"] == {
        "brevity": 0.667,
        "plain_language": 0.583,
    }  # (5 b - 1) / 3 in groups of four
    steps = [row for row in results["log_history"][MOPO] if "loss" in row]
    for name, bound in results["settings"]["asked"].items():
        assert all(row[f"threshold/{name}"] == bound for row in steps)
    assert "brevity ≥ 0.667 and plain_language ≥ 0.583" in " ".join(run[1].split())


def test_results_hold_every_figure_of_the_tables(finished):
    results = json.loads((finished / "results.json").read_text())
    models = results["held_out"]["models"]
    assert set(models) == {BASE, ALONE, MOPO}
    for name in (ALONE, MOPO):
        for objective in OBJECTIVES:
            row = models[name][objective]
            assert 0 <= row["low"] <= row["mean"] <= row["high"] <= 1
    labelled = {row["objective"]: row for row in results["labels"]["objectives"]}
    for objective, bound in THRESHOLDS.items():
        assert labelled[objective]["lower_bound"] >= bound - 1e-8
        assert labelled[objective]["best"] > bound


def test_texts_are_held_out(finished):
    rows = [json.loads(line) for line in (finished / "texts.jsonl").read_text().splitlines()]
    assert all(set(row) == {"prompt", BASE, ALONE, MOPO} for row in rows)
    train, held_out = demo._load_groups(demo.TINY, seed=0)
    assert [row["prompt"] for row in rows] == list(held_out["prompt"])
    assert not set(held_out["prompt"]) & set(train["prompt"])


def test_tables_are_printed(run):
    _, printed = run
    for expected in ("What the labels allow", "Win rate against the base model", f"{MOPO} − {ALONE}", "s in all"):
        assert expected in printed


def test_the_choice_is_reported(run):
    output, printed = run
    budget = json.loads((output / "results.json").read_text())["budget"]
    rates, sizes = Rates(**budget["rates"]), Sizes(**budget["sizes"])
    assert sizes == fit(rates, 10, Sizes(steps=3, prompts=3, num_samples=2), keep_steps=True)
    assert sizes == Sizes(steps=3, prompts=3, num_samples=2)  # the whole of the tiny demo
    assert budget["predicted"] == pytest.approx(sizes.seconds(rates))
    assert rates.steps > 0
    assert rates.text > 0
    assert rates.batch_size == 6  # there are no more texts
    assert describe(rates, sizes, 10, sizes) in printed


def test_a_demo_that_was_stopped_goes_on_with_its_choice(tmp_path, monkeypatch, capsys):
    """Stopped before MOPO's training: the second run times nothing, trains MOPO alone, and ends as one run would."""
    stages, choices, stage = [], [], demo._stage

    def stopped_at_mopo(run, name, *rest):
        stages.append(name)
        if stages == [BASE, ALONE, MOPO]:
            raise KeyboardInterrupt
        return stage(run, name, *rest)

    def one_choice(*arguments, **options):
        choices.append(fit(*arguments, **options))
        assert len(choices) == 1, "the second run measured again"
        return choices[0]

    monkeypatch.setattr(demo, "_stage", stopped_at_mopo)
    monkeypatch.setattr(demo, "fit", one_choice)
    with pytest.raises(KeyboardInterrupt):
        run_demo(tiny=True, steps=2, output=tmp_path)
    journal = json.loads((tmp_path / "progress.json").read_text())
    assert set(journal["done"]) == {BASE, ALONE}
    assert run_demo(tiny=True, steps=2, output=tmp_path) == 0
    assert stages == [BASE, ALONE, MOPO, MOPO]
    assert "Going on with what" in capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["budget"]["rates"] == journal["rates"]
    assert results["budget"]["sizes"] == journal["sizes"] == asdict(choices[0])
    rows = [json.loads(line) for line in (tmp_path / "texts.jsonl").read_text().splitlines()]
    assert [row[ALONE] for row in rows] == journal["done"][ALONE]["texts"]
    assert not (tmp_path / "progress.json").exists()


def test_the_base_draws_by_a_seed_of_its_own(tmp_path, monkeypatch):
    """Texts that are compared must not share their draws; the two trained models, compared with it alone, may."""
    seeds = []
    monkeypatch.setattr(demo, "_sample", lambda *arguments: seeds.append(arguments[-1]))
    monkeypatch.setattr(demo, "_train", lambda run, model, *rest: (model, [], []))
    run = demo.Run(tmp_path, Console(quiet=True), tiny=True, seed=7)
    for name, thresholds in ((BASE, None), (ALONE, {}), (MOPO, THRESHOLDS)):
        demo._stage(run, name, thresholds, None, [], demo.TINY)
    base, alone, mopo = seeds
    assert alone == mopo != base


def test_another_demo_does_not_go_on_with_it(tmp_path):
    options = {"minutes": 10, "seed": 0}
    journal = Journal.of(tmp_path / "progress.json", options)
    journal.decide(Rates(1, 2, 3, 4, 5, 64), Sizes(1, 2, 2))
    assert Journal.of(journal.path, options).decision == (Rates(1, 2, 3, 4, 5, 64), Sizes(1, 2, 2))
    assert Journal.of(journal.path, {**options, "minutes": 3}).decision is None


def test_fewer_prompts_are_spread_over_all():
    assert spread(list("abcdefgh"), 3) == ["a", "c", "f"]
    assert spread(list("abc"), 3) == ["a", "b", "c"]


def test_compare_sees_a_longer_and_friendlier_model():
    prompts = ["a", "b", "c"]
    friendly = "What a great and wonderful day, my dear friend, I love it!"
    texts = {BASE: [["The lift is broken."]] * 3, ALONE: [[friendly]] * 3, MOPO: [["Great, friend!"]] * 3}
    results = compare(prompts, texts)
    assert results["models"][ALONE]["friendliness"]["mean"] == 1.0
    assert results["models"][ALONE]["brevity"]["verdict"] == "missed"
    assert results["models"][MOPO]["brevity"]["verdict"] == "met"
    assert results["difference"]["brevity"] == {"mean": 1.0, "low": 1.0, "high": 1.0}
    assert results["models"][BASE]["words"] == 4.0


@pytest.mark.parametrize(
    ("interval", "threshold", "expected"),
    [
        (Interval(0.62, 0.5, 0.7), 0.6, "met"),
        (Interval(0.58, 0.5, 0.7), 0.6, "missed within the interval"),
        (Interval(0.4, 0.3, 0.5), 0.6, "missed"),
        (Interval(0.4, 0.3, 0.5), None, "maximised"),
    ],
)
def test_verdict(interval, threshold, expected):
    assert verdict(interval, threshold) == expected
