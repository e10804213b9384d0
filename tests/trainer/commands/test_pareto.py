"""Fronts of tabular problems and of labels; the hypervolume against sums of rectangles."""

import json

import numpy as np
import pytest
import torch

from mopo_kernels import InfeasibleThresholds
from mopo_trainer.commands.pareto import (
    EXAMPLES,
    example,
    front,
    hypervolume,
    is_tabular,
    load_tabular,
    run_pareto,
    tabular_problem,
)
from mopo_trainer.commands.solve import LabelProblem
from mopo_trainer.report.plots import panel_pairs

HALF = [[0.5, 0.5], [0.5, 0.5]]
FIRST = [[0.5, 0.9], [0.1, 0.5]]
SECOND = [[0.5, 0.2], [0.8, 0.5]]


def test_hypervolume_is_the_area_below_the_staircase():
    points = np.array([[0.9, 0.1], [0.5, 0.5], [0.4, 0.4], [0.1, 0.9]])
    assert hypervolume(points) == pytest.approx(0.1 * 0.9 + 0.4 * 0.5 + 0.4 * 0.1)


def test_two_responses_have_a_front_known_in_closed_form():
    """With Y = 2 every policy is a mixture: the front is the segment between the two responses."""
    problem = tabular_problem({"P": [FIRST, SECOND], "mu": [0.5, 0.5], "tau": 0.05}, "segment")
    (a1, a2), (b1, b2) = problem.win_rate.tolist()
    found = front(problem, points=7)
    for point in found["points"]:
        share = (point["win_rates"][0] - b1) / (a1 - b1)
        assert 0 <= share <= 1
        assert point["win_rates"][1] == pytest.approx(share * a2 + (1 - share) * b2, abs=1e-9)
    assert all(point["on_front"] for point in found["points"])
    assert found["points"][-1]["win_rates"][1] == pytest.approx(b2, abs=0.01 * (b2 - a2) + 1e-9)


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_conflict(name):
    problem = example(name)
    found = front(problem, points=9)
    first, second = np.array([point["win_rates"] for point in found["points"]]).T
    assert (np.diff(first) < 0).all()
    assert (np.diff(second) > 0).all()
    assert found["infeasible"] == 0
    assert 0 < found["hypervolume"]["all"] < 1
    torch.testing.assert_close(problem.P + problem.P.mT, torch.ones_like(problem.P))


def test_the_cycle_has_no_order_yet_its_win_rates_differ():
    taste = example("cycle").P[0]
    assert (taste[0, 2], taste[2, 1], taste[1, 0]) == (0.9, 0.9, 0.9)
    assert example("cycle").win_rate[:, 0].unique().numel() == 3


def test_three_objectives_draw_combinations_and_count_the_unattainable():
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    P = torch.sigmoid(2 * (scores[:, :, None] - scores[:, None, :]))
    found = front(tabular_problem({"P": P.tolist()}, "random"), points=5)
    assert len(found["points"]) + found["infeasible"] == 2 * 5 + 2 * 5
    assert len(found["points"]) > 10
    assert [pair["objectives"] for pair in found["hypervolume"]["pairs"]] == [
        ["objective 0", "objective 1"], ["objective 0", "objective 2"], ["objective 1", "objective 2"],
    ]  # fmt: skip
    best = np.array([point["win_rates"] for point in found["points"] if point["on_front"]])
    for point in found["points"]:  # what is off the front is dominated by something on it
        dominated = (best >= np.array(point["win_rates"])).all(1) & (best > np.array(point["win_rates"])).any(1)
        assert dominated.any() != point["on_front"]


def test_a_file_may_name_everything(tmp_path):
    file = tmp_path / "problem.json"
    content = {
        "P": [FIRST, SECOND],
        "mu": [0.25, 0.75],
        "pi_ref": [0.5, 0.5],
        "tau": 0.2,
        "primary": "brief",
        "objectives": ["kind", "brief"],
        "responses": ["long", "short"],
        "thresholds": {"kind": 0.5},
    }
    file.write_text(json.dumps(content))
    assert is_tabular(file)
    problem = load_tabular(file)
    assert problem.objectives == ("brief", "kind")
    assert problem.responses == ("long", "short")
    assert problem.P.tolist() == [SECOND, FIRST]
    assert (problem.tau, problem.thresholds) == (0.2, {"kind": 0.5})
    assert load_tabular(file, primary="kind", tau=0.5).objectives == ("kind", "brief")
    assert load_tabular(file, tau=0.5).tau == 0.5


def test_thresholds_as_a_list_follow_the_secondaries():
    content = {"P": [FIRST, SECOND, HALF], "primary": 1, "thresholds": [0.4, 0.5]}
    problem = tabular_problem(content, "list")
    assert problem.thresholds == {"objective 0": 0.4, "objective 2": 0.5}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"P": [FIRST]}, "P must hold K ≥ 2 matrices"),
        ({"P": [FIRST, [[0.5]]]}, "P must hold K ≥ 2 matrices"),
        ({"P": "x"}, "P must hold K ≥ 2 matrices"),
        ({"P": [FIRST, [[0.5, 1.2], [-0.2, 0.5]]]}, r"must lie in \[0, 1\]"),
        ({"P": [FIRST, [[0.5, 0.2], [0.2, 0.5]]]}, "must be 1"),
        ({"mu": [0.5, 0.6]}, "mu must hold 2 probabilities that sum to 1"),
        ({"pi_ref": [1.0]}, "pi_ref must hold 2 probabilities"),
        ({"objectives": ["a", "a"]}, "objectives must hold 2 different names"),
        ({"responses": ["a"]}, "responses must hold 2 different names"),
        ({"primary": 2}, "primary 2 is none of the objectives: objective 0, objective 1"),
        ({"primary": "speed"}, "primary 'speed' is none"),
        ({"tau": -1}, "tau must be a positive number"),
        ({"tau": "cold"}, "tau must be a number"),
        ({"thresholds": [0.1, 0.2]}, "thresholds must hold"),
        ({"thresholds": {"objective 1": "high"}}, "is not a win rate"),
    ],
)
def test_wrong_problems_are_explained(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        front(tabular_problem({"P": [FIRST, SECOND], **change}, "problem.json"), points=2)


def test_label_data_are_not_tabular(tmp_path):
    for name, text in (("a.json", '[{"P": 1}]'), ("b.json", '{"P": '), ("c.jsonl", '{"P": 1}')):
        (tmp_path / name).write_text(text)
        assert not is_tabular(tmp_path / name)
    assert not is_tabular(tmp_path / "missing.json")


def test_run_writes_the_front_and_marks_the_thresholds(tmp_path, capsys):
    assert run_pareto(example("conflict"), {"harmless": 0.6}, points=5, output=tmp_path) == 0
    found = json.loads((tmp_path / "pareto.json").read_text())
    assert found["chosen"]["win_rates"][1] == pytest.approx(0.6, abs=1e-6)
    assert (tmp_path / "pareto.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "Hypervolume (reference 0)" in printed
    assert "0.600 (1.18)" in printed


def test_unattainable_thresholds_are_named(tmp_path):
    with pytest.raises(InfeasibleThresholds, match="'harmless'"):
        run_pareto(example("conflict"), {"harmless": 0.9}, points=5, output=tmp_path)
    assert not list(tmp_path.iterdir())


def test_one_objective_has_no_front(tmp_path):
    problem = LabelProblem("x", ("a",), torch.tensor([[1.0], [0.0]]).double(), torch.tensor([0, 0]), 0.08, 0.0)
    with pytest.raises(ValueError, match="needs two objectives"):
        run_pareto(problem, {}, points=3, output=tmp_path)


def test_labels_in_one_group_give_the_tabular_front():
    """One fully compared group is a tabular problem with mu uniform over the others."""
    scores = torch.tensor([[2.0, 0.5, -1.0], [-1.0, 0.8, 1.0]], dtype=torch.float64)
    P = torch.sigmoid(scores[:, :, None] - scores[:, None, :])
    win_rate = ((P.sum(-1) - 0.5) / 2).T
    labels = LabelProblem("x", ("a", "b"), win_rate, torch.zeros(3, dtype=torch.int64), 0.1, 0.0)
    # Against all three, itself included at ½: v' = (2 v + ½) / 3, the same trade-off on a smaller scale.
    tabular = tabular_problem({"P": P.tolist(), "tau": 0.1 * 2 / 3}, "one group")
    for share in (0.25, 0.75):
        bound = float(win_rate[:, 1].mean() + share * (win_rate[:, 1].max() - win_rate[:, 1].mean()))
        from_labels = labels.solve({"b": bound})
        from_table = tabular.solve({"objective 1": (2 * bound + 0.5) / 3})
        torch.testing.assert_close(from_labels.multipliers, from_table.multipliers, rtol=1e-6, atol=1e-6)


def test_panels():
    assert panel_pairs(3) == [(0, 1), (0, 2), (1, 2)]
    assert panel_pairs(6) == [(0, k) for k in range(1, 6)]
