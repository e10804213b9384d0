"""What `mopo solve` reports: the figures stated beside the example data, prices, attainable ranges."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from mopo_kernels import InfeasibleThresholds
from mopo_trainer.commands import solve
from mopo_trainer.commands.main import main
from mopo_trainer.commands.solve import (
    LabelProblem,
    analyse,
    bound_of_one,
    infeasibility_explained,
    load_problem,
    plot_report,
    print_report,
    summary,
    sweep,
)

EXAMPLES = Path(__file__).parents[3] / "examples" / "data"

# Win rates as the data's READMEs state them (a generic constrained solver), in the order of the objectives named here.
SUMMEVAL = {
    None: (0.0, (0.936, 0.779, 0.791, 0.153)),
    0.5: (0.600, (0.812, 0.615, 0.630, 0.500)),
    0.7: (1.016, (0.675, 0.491, 0.514, 0.700)),
}
QA_FEEDBACK = {
    None: (0.0, (0.943, 0.491)),
    0.7: (0.716, (0.856, 0.700)),
    0.9: (1.641, (0.641, 0.900)),
}


@pytest.fixture(scope="module")
def summeval():
    return load_problem(
        str(EXAMPLES / "summeval-op" / "summeval-op.jsonl"),
        primary="specificity",
        objectives=["fluency", "faithfulness", "brevity"],
        scorers=["brevity"],
    )


@pytest.fixture(scope="module")
def qa_feedback():
    return load_problem(
        str(EXAMPLES / "qa-feedback" / "qa-feedback.jsonl.gz"), primary="preferred", scorers=["brevity"]
    )


def assert_stated(problem, threshold, multiplier, win_rates):
    rows = {row["objective"]: row for row in analyse(problem, threshold, points=2)["objectives"]}
    assert list(rows) == list(problem.objectives)
    assert [row["win_rate"] for row in rows.values()] == pytest.approx(win_rates, abs=1e-3)
    assert rows["brevity"]["multiplier"] == pytest.approx(multiplier, abs=1e-3)


@pytest.mark.parametrize("threshold", SUMMEVAL)
def test_summeval_gives_the_stated_figures(summeval, threshold):
    assert_stated(summeval, {"brevity": threshold} if threshold else {}, *SUMMEVAL[threshold])


@pytest.mark.parametrize("threshold", QA_FEEDBACK)
def test_qa_feedback_gives_the_stated_figures(qa_feedback, threshold):
    assert_stated(qa_feedback, {"brevity": threshold} if threshold else {}, *QA_FEEDBACK[threshold])


def test_the_primary_stands_first_and_unwanted_secondaries_are_dropped(summeval):
    assert summeval.objectives == ("specificity", "fluency", "faithfulness", "brevity")
    assert summeval.win_rate.shape == (32 * 13, 4)
    assert "32 groups, 416 responses, primary specificity" in summeval.headline


def test_cost_is_what_dropping_the_threshold_gives_back(summeval):
    thresholds = {"brevity": 0.6, "fluency": 0.6}
    rows = {row["objective"]: row for row in analyse(summeval, thresholds, points=2)["objectives"]}
    without = summeval.solve({"brevity": 0.6}).win_rates[0]
    assert rows["fluency"]["cost"] == pytest.approx(float(without) - rows["specificity"]["win_rate"], abs=1e-9)
    assert rows["fluency"]["cost"] > 1e-3
    assert rows["faithfulness"]["cost"] is None


def test_sweep_runs_from_free_to_nearly_the_best(summeval):
    line = sweep(summeval, {}, "brevity", points=5)
    free = float(summeval.solve({}).win_rates[-1])
    best = float(summeval.best_alone[-1])
    assert line["thresholds"][0] == pytest.approx(free)
    assert line["thresholds"][-1] == pytest.approx(free + 0.99 * (best - free))
    assert line["multipliers"][0] == pytest.approx(0, abs=1e-6)
    assert line["multipliers"] == sorted(line["multipliers"])
    assert line["primary"] == sorted(line["primary"], reverse=True)


def test_best_beside_another_threshold_is_attainable_and_near_the_limit(summeval):
    others = {"brevity": 0.8}
    best = summeval.best("fluency", others)
    span = float(summeval.best_alone[1]) - float(summeval.solve(others).win_rates[1])
    assert best < float(summeval.best_alone[1]) - 0.02  # brevity takes its toll
    summeval.solve({**others, "fluency": best})
    with pytest.raises(InfeasibleThresholds):
        summeval.solve({**others, "fluency": best + 0.02 * span})


def test_infeasible_thresholds_are_named(summeval):
    with pytest.raises(InfeasibleThresholds, match=r"'fluency'.*0.95.*0.8229"):
        analyse(summeval, {"fluency": 0.95})


def test_thresholds_on_wrong_objectives(summeval):
    with pytest.raises(ValueError, match="'specificity': it is the primary"):
        summeval.solve({"specificity": 0.5})
    with pytest.raises(ValueError, match=r"unknown objective 'speed'.*fluency, faithfulness, brevity"):
        summeval.solve({"speed": 0.5})


def test_unknown_names_are_refused_before_solving(tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text('{"prompt": "p", "chosen": "a", "rejected": "b", "preference": {"x": 1, "y": 0}}\n')
    with pytest.raises(ValueError, match="no objective 'z'; it has: x, y"):
        load_problem(str(file), primary="z")
    assert load_problem(str(file)).primary == "x"
    assert load_problem(str(file), objectives=["y"]).objectives == ("y",)


def test_robust_bounds_are_what_thresholds_hold():
    generator = torch.Generator().manual_seed(0)
    preference = torch.rand(200, 2, generator=generator, dtype=torch.float64)
    win_rate = torch.stack([preference, 1 - preference], dim=1).view(-1, 2)
    group = torch.arange(200).repeat_interleave(2)
    problem = LabelProblem("labels", ("a", "b"), win_rate, group, tau=0.08, eps=0.001)
    row = analyse(problem, {"b": 0.55}, points=2)["objectives"][1]
    assert row["lower_bound"] == pytest.approx(0.55, abs=1e-6)
    assert row["win_rate"] > 0.56
    assert "ε = 0.001" in problem.headline


def test_automatic_radius_is_small_and_positive():
    problem = load_problem(str(EXAMPLES / "summeval-op" / "summeval-op.jsonl"), primary="fluency", eps="auto")
    assert 0 < problem.eps < 1e-3


def test_partly_labelled_objectives_are_counted(tmp_path):
    rows = [
        {"prompt": f"p{i}", "chosen": "a", "rejected": "b", "preference": {"x": 1.0, "y": 0.25 if i < 3 else None}}
        for i in range(5)
    ]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = analyse(load_problem(str(file)), {}, points=2)
    x, y = found["objectives"]
    assert (x["labelled_groups"], y["labelled_groups"]) == (5, 3)
    assert (y["free"], y["best"]) == (pytest.approx(0.25, abs=1e-5), pytest.approx(0.75))
    assert found["rank_correlations"][0] == [pytest.approx(1), pytest.approx(-1)]


def pairs(labels, tau=0.08):
    """Pairs with the labels {objective: P of the first} each."""
    preference = torch.tensor([list(row) for row in labels], dtype=torch.float64)
    win_rate = torch.stack([preference, 1 - preference], dim=1).view(-1, preference.shape[1])
    group = torch.arange(len(preference)).repeat_interleave(2)
    return LabelProblem("labels", tuple("abcd"[: preference.shape[1]]), win_rate, group, tau=tau, eps=0.0)


# b agrees with a in half of the pairs; where it does not, mixing the two responses holds it.
HALF = pairs([(1, 1), (1, 0)] * 20)


def test_a_summary_by_hand():
    found = summary(HALF, {"b": 0.6})
    a, b = found["objectives"]
    # a pair that disagrees has the weight w = sigmoid((1 - multiplier) / tau) on a: b gets (1 + 1 - w) / 2
    w = 0.8
    assert b["multiplier"] == pytest.approx(1 - 0.08 * math.log(w / (1 - w)), abs=1e-5)  # the others weigh 1 - 1e-11
    assert (a["win_rate"], b["win_rate"]) == (pytest.approx((1 + w) / 2, abs=1e-5), pytest.approx(0.6, abs=1e-8))
    assert b["cost"] == pytest.approx(1 - (1 + w) / 2, abs=1e-5)
    assert b["free_win_rate"] == pytest.approx(0.5, abs=1e-5)
    # KL from a fair coin: ln 2 where the two agree, ln 2 less the coin's entropy where they do not
    entropy = -(w * math.log(w) + (1 - w) * math.log(1 - w))
    assert found["kl"] == pytest.approx(math.log(2) - entropy / 2, abs=1e-4)
    assert b["interval"] == pytest.approx(0.6 + np.array([-1, 1]) * 1.96 * 0.4 / 40**0.5, abs=0.015)
    assert found["rank_correlations"] == [[1, pytest.approx(0, abs=1e-12)], [pytest.approx(0, abs=1e-12), 1]]
    assert found["group_size"] == 2


def test_the_safe_eps_is_the_smallest_that_lifts_the_interval_above_the_threshold():
    thresholds = {"b": 0.6}
    safe = summary(HALF, thresholds)["safe"]
    below = solve.EPS_GRID[solve.EPS_GRID.index(safe["eps"]) - 1]
    for eps, expected in ((safe["eps"], True), (below, False)):
        problem = replace(HALF, eps=eps)
        solution = problem.solve(thresholds)
        assert (problem.intervals(solution, ["b"])["b"].low >= 0.6) == expected
    # by the normal approximation: b of mean g is 1 or 2g - 1, and g - 1.96 (1 - g) / sqrt(40) = 0.6
    assert safe["win_rates"][1] == pytest.approx((0.6 + 0.31) / 1.31, abs=0.01)
    at_safe = summary(replace(HALF, eps=safe["eps"]), thresholds)
    assert at_safe["safe"] == {**safe, "multipliers": pytest.approx(safe["multipliers"])}  # no more is asked for


def test_what_cannot_be_made_safe_and_what_is():
    poor = pairs([(1, 0), (1, 0.6)] * 10)  # b reaches 1 and 0.6: 0.8 ± 0.09 at best
    assert summary(poor, {"b": 0.75})["safe"] is None
    assert summary(HALF, {"b": 0.2})["safe"]["eps"] == 0
    assert summary(HALF, {})["safe"] is None


def test_infeasible_with_eps_is_explained():
    q = bound_of_one(2, 0.15) / 2  # mass left on the chosen one of two
    assert q * math.log(2 * q) + (1 - q) * math.log(2 - 2 * q) == pytest.approx(0.15)
    assert bound_of_one(13, 0.15) == 0  # a mass of 1/13 is less than the ball can move
    problem = replace(HALF, eps=0.15)
    with (
        pytest.raises(
            ValueError, match=r"'b' must reach 0.6.*or eps: .*one of 2 responses.*0.47.* eps = 0.0\d+ at most"
        ),
        infeasibility_explained(problem, {"b": 0.6}),
    ):
        problem.solve({"b": 0.6})
    explained = r"'b' must reach 0.6.*or eps: .*one of 2 responses.*0.47.* eps = 0.0\d+ at most"
    with pytest.raises(ValueError, match=explained), infeasibility_explained(problem, {"b": 0.6}):
        problem.solve({"b": 0.6})
    duller = replace(problem, win_rate=0.9 * HALF.win_rate)  # b reaches 0.9 at most, with eps or without
    with pytest.raises(ValueError, match=r"lower one of them$"), infeasibility_explained(duller, {"b": 0.95}):
        duller.solve({"b": 0.95})


def test_a_threshold_that_raises_the_primary_is_no_cost(capsys):
    """b ranks as a does, at half the difference: a threshold on it makes the target sharper."""
    found = analyse(pairs([(0.6, 0.55)] * 8), {"b": 0.548}, points=3)
    a, b = found["objectives"]
    # w = 0.98 instead of sigmoid(2.5) = 0.924 on the response that both prefer
    assert b["cost"] == pytest.approx(0.2 * (0.92414 - 0.98), abs=1e-5)
    assert a["win_rate"] > a["free_win_rate"]
    assert found["kl"] > found["sweeps"][0]["kl"][0]
    print_report(found, Console(width=80))
    printed = " ".join(capsys.readouterr().out.split())
    assert "gain" in printed.split("Price list")[0]
    assert "-0.0" not in printed
    assert "Some thresholds raise a too" in printed


def test_the_figure_marks_the_chosen_thresholds(summeval):
    found = analyse(summeval, {"brevity": 0.7}, points=3)
    cost, price = plot_report(found, "headline").axes
    (marker,) = [line for line in cost.get_lines() if line.get_marker() == "o" and len(line.get_xdata()) == 1]
    assert marker.get_xdata()[0] == 0.7
    assert marker.get_ydata()[0] == pytest.approx(0.675, abs=1e-3)
    assert "specificity" in cost.get_ylabel()
    assert "multiplier" in price.get_ylabel()


def test_bad_rows_are_refused_or_skipped(tmp_path, capsys, caplog):
    path = tmp_path / "rows.jsonl"
    pair = {"prompt": "p", "chosen": "a", "rejected": "b", "preference": {"a=b": 1, "c/d": 0}}
    path.write_text(f"{json.dumps(pair)}\n{{\n{json.dumps({**pair, 'chosen': ''})}\n")
    command = ["solve", str(path), "--threshold", "c/d=0.1", "--output", str(tmp_path)]
    assert main(command) == 2
    assert "rows.jsonl, line 2: not valid JSON" in capsys.readouterr().err
    assert main([*command, "--on_bad_row", "skip"]) == 0
    assert "1 of 2 rows or prompts left out: 1 empty reply" in caplog.text
