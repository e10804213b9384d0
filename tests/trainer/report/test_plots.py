"""Figures: what they show, read back from the axes; that they are written whole."""

import numpy as np
import pytest

from mopo_trainer.report.plots import plot_costs, plot_front, plot_training, save_figure


def drawn(ax):
    return {line.get_label(): np.column_stack(line.get_data()) for line in ax.get_lines()}


def legend(fig):
    return [text.get_text() for text in fig.legends[0].get_texts()]


def test_save_figure_writes_a_png_and_nothing_else(tmp_path):
    path = save_figure(plot_front([[0.1, 0.9], [0.9, 0.1]], ["a", "b"]), tmp_path / "deep" / "front.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert list(path.parent.iterdir()) == [path]


def test_front_joins_only_what_nothing_dominates():
    fig = plot_front([[0.9, 0.1], [0.4, 0.4], [0.1, 0.9], [0.5, 0.5]], ["a", "b"], thresholds={"b": 0.3})
    (ax,) = fig.axes
    assert drawn(ax)["front"].tolist() == [[0.1, 0.9], [0.5, 0.5], [0.9, 0.1]]
    assert drawn(ax)["other solutions"].tolist() == [[0.4, 0.4]]
    assert drawn(ax)["threshold"][:, 1].tolist() == [0.3, 0.3]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("win rate of a", "win rate of b")


def test_front_of_four_objectives_has_a_panel_per_pair_and_one_legend():
    points = np.random.default_rng(0).random((20, 4))
    fig = plot_front(points, list("abcd"), marked={"mine": ([0.5] * 4, [0.1] * 4)}, candidates=points[:2])
    assert [(ax.get_xlabel()[-1], ax.get_ylabel()[-1]) for ax in fig.axes] == [
        ("a", "b"), ("a", "c"), ("a", "d"), ("b", "c"), ("b", "d"), ("c", "d"),
    ]  # fmt: skip
    assert sorted(legend(fig)) == ["front", "front as τ → 0", "mine", "other solutions", "single response"]


def test_mixtures_of_single_responses_bound_the_front():
    """The upper right of the convex hull: (0.4, 0.5) lies below the segment, (0.1, 0.2) is dominated."""
    candidates = [[0.1, 0.9], [0.4, 0.5], [0.6, 0.6], [0.1, 0.2], [0.9, 0.0]]
    fig = plot_front([[0.5, 0.5]], ["a", "b"], candidates=candidates, candidate_names=["first"])
    (ax,) = fig.axes
    assert drawn(ax)["front as τ → 0"].tolist() == [[0.1, 0.9], [0.6, 0.6], [0.9, 0.0]]
    assert [text.get_text() for text in ax.texts] == ["first"]


def test_costs_show_each_secondary_and_the_choice():
    sweeps = [
        {"objective": "x", "thresholds": [0.1, 0.5], "primary": [0.9, 0.8], "multipliers": [0, 2], "chosen": None},
        {
            "objective": "y",
            "thresholds": [0.2, 0.9],
            "primary": [0.9, 0.3],
            "multipliers": [0, 50],
            "chosen": (0.5, 0.7, 1.2),
        },
    ]
    fig = plot_costs(sweeps, "main", subtitle="data")
    cost, price = fig.axes
    assert drawn(cost)["y"].tolist() == [[0.2, 0.9], [0.9, 0.3]]
    assert legend(fig) == ["x", "y", "chosen threshold"]
    assert price.get_ylim()[1] >= 50


def log(step, loss, a, b, multiplier, speed):
    row = {"step": step, "loss": loss, "win_rate/a": a, "win_rate/b": b, "threshold/b": 0.6}
    return row | {"multiplier/a": 1.0, "multiplier/b": multiplier, "tokens_per_second": speed}


HISTORY = [log(1, 3.0, 0.9, 0.5, 0.4, 10.0), log(2, 2.0, 0.8, 0.7, 0.5, 12.0)]


def test_training_curves_without_held_out_data_show_the_speed(tmp_path):
    fig = plot_training(HISTORY, tmp_path / "training.png", objectives=["a", "b"])
    loss, target, multipliers, speed = fig.axes
    assert drawn(loss)["training"].tolist() == [[1, 3.0], [2, 2.0]]
    assert drawn(target)["a (primary)"].tolist() == [[1, 0.9], [2, 0.8]]
    assert len(target.get_lines()) == 3  # two win rates and the threshold
    assert [line.get_ydata().tolist() for line in multipliers.get_lines()] == [[0.4, 0.5]]  # the primary's 1 is no news
    assert speed.get_lines()[0].get_ydata().tolist() == [10.0, 12.0]
    assert (tmp_path / "training.png").is_file()


def test_training_curves_show_held_out_win_rates():
    history = [*HISTORY, {"step": 2, "eval_loss": 2.5, "eval_win_rate/a": 0.6, "eval_win_rate/b": 0.55}]
    loss, _, _, held_out = plot_training(history, objectives=["a", "b"]).axes
    assert drawn(loss)["held out"].tolist() == [[2, 2.5]]
    assert "Held-out" in held_out.get_title(loc="left")
    assert [line.get_ydata()[-1] for line in held_out.get_lines()] == pytest.approx([0.6, 0.6, 0.55])


def test_an_empty_history_gives_empty_axes():
    assert len(plot_training([], objectives=[]).axes) == 4
