"""Labels of groups as tensors, and splits that keep a prompt's groups together."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset

from mopo_trainer.data import DataError, labels, load_rows, split_groups, to_groups
from mopo_trainer.data.scorers import load_scorers

EXAMPLES = Path(__file__).parents[3] / "examples/data"
GROUP = {"prompt": "p", "responses": ["a", "bb", "ccc"]}
PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}


@pytest.fixture(scope="module")
def uneven():
    return to_groups(
        [
            {**GROUP, "ratings": {"help": [1, 2, 3], "safe": None}},
            {**PAIR, "preference": {"safe": 0.25}},
            {"prompt": "q", "responses": ["x", "y"], "ratings": {"help": [1, None]}},
            {**GROUP, "ratings": {"help": [3, None, 1]}},
        ]
    )


def test_labels_of_uneven_groups(uneven):
    win_rate, group = labels(uneven, ["safe", "help"])
    nan = math.nan
    expected = [
        *([nan, 0.0], [nan, 0.5], [nan, 1.0]),
        *([0.25, nan], [0.75, nan]),
        *([nan, nan], [nan, nan]),
        *([nan, 1.0], [nan, nan], [nan, 0.0]),
    ]
    assert win_rate.dtype == torch.float64
    torch.testing.assert_close(win_rate, torch.tensor(expected, dtype=torch.float64), equal_nan=True, rtol=0, atol=0)
    assert group.dtype == torch.int64
    assert group.tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 3, 3]


def test_labels_follow_a_selection(uneven):
    win_rate, group = labels(uneven.select([3, 1]), ["help", "safe"])
    assert win_rate[:, 0].nan_to_num(-1).tolist() == [1.0, -1, 0.0, -1, -1]
    assert win_rate[:, 1].nan_to_num(-1).tolist() == [-1, -1, -1, 0.25, 0.75]
    assert group.tolist() == [0, 0, 0, 1, 1]


def test_labels_survive_saving(uneven, tmp_path):
    uneven.save_to_disk(tmp_path / "groups")
    for saved, kept in zip(labels(load_rows(tmp_path / "groups"), ["help"]), labels(uneven, ["help"]), strict=True):
        torch.testing.assert_close(saved, kept, equal_nan=True, rtol=0, atol=0)


def test_labels_refuse_unknown_repeated_and_unlabelled_objectives(uneven):
    with pytest.raises(DataError, match="objective 'humour' is not in the data; it has: help, safe"):
        labels(uneven, ["help", "humour"])
    with pytest.raises(DataError, match="duplicate objective names: 'help' is asked for twice"):
        labels(uneven, ["help", "help"])
    with pytest.raises(DataError, match="objective 'safe' is labelled in no group"):
        labels(uneven.select([0, 2]), ["help", "safe"])
    with pytest.raises(DataError, match="columns a are not those of groups; call to_groups first"):
        labels(Dataset.from_dict({"a": [1]}), ["help"])


def test_summeval_specificity_and_brevity_conflict():
    """The figure in examples/data/summeval-op/README.md."""
    groups = to_groups(load_rows(EXAMPLES / "summeval-op/summeval-op.jsonl"), scorers=load_scorers(["brevity"]))
    win_rate, _ = labels(groups, ["specificity", "brevity"])
    assert win_rate.shape == (32 * 13, 2)
    torch.testing.assert_close(win_rate.mean(0), torch.full((2,), 0.5, dtype=torch.float64))
    assert np.corrcoef(win_rate.T)[0, 1] == pytest.approx(-0.75, abs=0.005)


def test_qa_feedback_comparisons():
    """All six comparisons of a group: each response meets three opponents, and wins add up to six."""
    groups = to_groups(load_rows(EXAMPLES / "qa-feedback/qa-feedback.jsonl.gz"))
    win_rate, group = labels(groups, ["preferred"])
    assert group.bincount().tolist() == [4] * 500
    torch.testing.assert_close((3 * win_rate).reshape(500, 4).sum(1), torch.full((500,), 6.0, dtype=torch.float64))
    assert win_rate[:4, 0].tolist() == pytest.approx([(0.5 + 1 + 0) / 3, (0.5 + 1 + 0.5) / 3, 0.0, (1 + 0.5 + 1) / 3])


# ---------------------------------------------------------------------------------------------------------- splits


def test_split_keeps_prompts_apart_and_every_group():
    rows = [{**PAIR, "prompt": f"p{i % 20}", "chosen": f"c{i}"} for i in range(50)]
    groups = to_groups(rows)
    train, test = split_groups(groups, 0.25, seed=3)
    assert len(set(test["prompt"])) == 5
    assert not set(test["prompt"]) & set(train["prompt"])
    assert sorted(train.to_list() + test.to_list(), key=str) == sorted(groups.to_list(), key=str)
    again, _ = split_groups(groups, 0.25, seed=3)
    other, _ = split_groups(groups, 0.25, seed=4)
    assert again.to_list() == train.to_list()
    assert other.to_list() != train.to_list()


def test_split_leaves_both_sides_something():
    groups = to_groups([{**PAIR, "prompt": f"p{i}"} for i in range(3)])
    assert list(map(len, split_groups(groups, 0.01))) == [2, 1]
    assert list(map(len, split_groups(groups, 0.99))) == [1, 2]


def test_split_refuses_what_cannot_be_split():
    with pytest.raises(DataError, match=r"test_fraction=1.0: give a number between 0 and 1"):
        split_groups(to_groups([PAIR]), 1.0)
    with pytest.raises(DataError, match="1 different prompts cannot be split"):
        split_groups(to_groups([PAIR, PAIR]), 0.5)
