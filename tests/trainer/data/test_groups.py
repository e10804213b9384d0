"""Rows of every format and the win rates they become, worked out by hand; bad rows are named with their mend."""

import json
import math
import re
from decimal import Decimal
from importlib import import_module
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from datasets import Dataset

from mopo_trainer.data import (
    DataError,
    load_rows,
    objectives,
    to_groups,
)
from mopo_trainer.data.scorers import load_scorers
from mopo_trainer.thresholds import parse_thresholds

EXAMPLES = Path(__file__).parents[3] / "examples/data"
GROUP = {"prompt": "p", "responses": ["a", "bb", "ccc"]}
PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def win_rates(*rows, **options):
    return to_groups(list(rows), **options)["win_rate"][:]


# --------------------------------------------------------------------------------------------------------- formats


def test_pairs_with_preference():
    rows = [
        {**PAIR, "preference": {"help": 0.75, "safe": None}},
        {"prompt": "q", "response_0": "c", "response_1": "d", "preference": {"help": 0, "safe": 1}},
    ]
    groups = to_groups(rows)
    assert groups.to_list() == [
        {"prompt": "p", "responses": ["a", "b"], "win_rate": {"help": [0.75, 0.25], "safe": None}},
        {"prompt": "q", "responses": ["c", "d"], "win_rate": {"help": [0.0, 1.0], "safe": [1.0, 0.0]}},
    ]


def test_chosen_and_rejected_alone_label_one_objective():
    assert win_rates(PAIR) == [{"preferred": [1.0, 0.0]}]
    assert win_rates(PAIR, preferred="harmless") == [{"harmless": [1.0, 0.0]}]
    assert win_rates({**PAIR, "preference": {"help": None}}, PAIR, scorers={"one": lambda p, r: 1}) == [
        {"help": None, "preferred": None, "one": [0.5, 0.5]},
        {"help": None, "preferred": [1.0, 0.0], "one": [0.5, 0.5]},
    ]


def test_ratings_are_compared_within_the_group_ties_half():
    # a beats nobody, bb and ccc tie: (0 + 0)/2, (1 + 1/2)/2, (1 + 1/2)/2
    assert win_rates({**GROUP, "ratings": {"help": [1, 4.5, 4.5]}}) == [{"help": [0.0, 0.75, 0.75]}]


def test_rating_scale_is_a_logistic_scale():
    [row] = win_rates({**GROUP, "ratings": {"help": [0, 1, 3]}}, rating_scale=2.0)

    def sigmoid(x):
        return 1 / (1 + math.exp(-x / 2))

    expected = [(sigmoid(-1) + sigmoid(-3)) / 2, (sigmoid(1) + sigmoid(-2)) / 2, (sigmoid(3) + sigmoid(2)) / 2]
    assert row["help"] == pytest.approx(expected, abs=1e-15)


def test_rating_scale_does_not_overflow():
    assert win_rates({**GROUP, "ratings": {"help": [0, 1e6, -1e6]}}, rating_scale=1e-3) == [{"help": [0.5, 1.0, 0.0]}]


def test_rating_scale_does_not_touch_scorers():
    [row] = win_rates(GROUP, rating_scale=1.0, scorers={"long": lambda prompt, response: len(response)})
    assert row == {"long": [0.0, 0.5, 1.0]}


def test_an_unrated_response_is_compared_with_nobody():
    assert win_rates({**GROUP, "ratings": {"help": [1, None, 2]}}) == [{"help": [0.0, None, 1.0]}]


def test_comparisons_average_over_the_opponents_met():
    comparisons = {"help": [[0, 1, 1], [2, 0, 0.5]], "safe": [[1, 2, 0.25], [0, 1, None]]}
    assert win_rates({**GROUP, "comparisons": comparisons}) == [
        {"help": [0.75, 0.0, 0.5], "safe": [None, 0.25, 0.75]},
    ]


def test_one_group_may_hold_ratings_and_comparisons_and_rows_may_differ():
    rows = [
        {**GROUP, "ratings": {"zeal": [3, 2, 1]}, "comparisons": {"care": [[0, 2, 1]]}},
        {"prompt": "q", "response_0": "x", "response_1": "y", "preference": {"care": 0.5}},
        {"prompt": "q", "responses": ["x", "y"], "comparisons": {"zeal": [[1, 0, 1]]}},
        {"prompt": "q", "responses": ["x", "y"], "win_rate": {"zeal": [0.25, 0.5]}},
    ]
    expected = [
        {"care": [1.0, None, 0.0], "zeal": [1.0, 0.5, 0.0]},
        {"care": [0.5, 0.5], "zeal": None},
        {"care": None, "zeal": [0.0, 1.0]},
        {"care": None, "zeal": [0.25, 0.5]},
    ]
    assert win_rates(*rows) == expected
    # Once in a table, every row has every column and every objective, null where it had none.
    union = [{column: row.get(column) for row_ in rows for column in row_} for row in rows]
    table = Dataset.from_list(union)
    assert table[2]["ratings"] is None
    assert to_groups(table)["win_rate"][:] == expected


def test_objectives_stand_in_the_order_of_the_data():
    rows = [{**GROUP, "ratings": {"zeal": [1, 2, 3], "care": [1, 2, 3]}}, {**GROUP, "ratings": {"arts": [1, 2, 3]}}]
    assert objectives(to_groups(rows, scorers={"able": lambda p, r: 0})) == ["zeal", "care", "arts", "able"]


def test_scorers_see_plain_text_of_prompt_and_response():
    seen = []
    row = {
        "prompt": [user("Hi"), assistant("Yes?"), user("Go")],
        "chosen": [assistant("A")],
        "rejected": [assistant("B")],
    }
    to_groups([row], scorers={"order": lambda prompt, response: seen.append((prompt, response)) or len(seen)})
    assert seen == [("Hi\n\nYes?\n\nGo", "A"), ("Hi\n\nYes?\n\nGo", "B")]


def test_conversational_rows_keep_their_messages():
    row = {"prompt": [user("Hi")], "responses": [[assistant("A")], [assistant("B")]], "ratings": {"help": [2, 1]}}
    assert to_groups([row]).to_list() == [
        {"prompt": row["prompt"], "responses": row["responses"], "win_rate": {"help": [1.0, 0.0]}}
    ]


def test_conversational_pairs_share_their_prompt_implicitly():
    row = {"chosen": [user("Hi"), assistant("A")], "rejected": [user("Hi"), assistant("B")]}
    assert to_groups([row]).to_list() == [
        {
            "prompt": [user("Hi")],
            "responses": [[assistant("A")], [assistant("B")]],
            "win_rate": {"preferred": [1.0, 0.0]},
        }
    ]


@pytest.mark.parametrize("name", ["summeval-op/summeval-op.jsonl", "qa-feedback/qa-feedback.jsonl.gz"])
def test_groups_come_back_as_they_are(name, tmp_path):
    groups = to_groups(load_rows(EXAMPLES / name), scorers=load_scorers(["brevity"]))
    again = to_groups(groups)
    assert again.to_list() == groups.to_list()
    assert again.features == groups.features
    (tmp_path / "groups.jsonl").write_text("".join(json.dumps(row) + "\n" for row in groups))
    assert to_groups(load_rows(tmp_path / "groups.jsonl")).to_list() == groups.to_list()
    assert "pages" in objectives(to_groups(groups, scorers={"pages": lambda prompt, response: len(response)}))


def test_comparisons_of_all_rows_are_counted_at_once(monkeypatch):
    """Tensors of one row each took minutes for a data set of common size."""
    counted = []
    group_labels = import_module("mopo_trainer.data.labels")  # the package has a function of that name
    count = group_labels.win_rate_from_comparisons
    monkeypatch.setattr(
        group_labels, "win_rate_from_comparisons", lambda *args: counted.append(len(args[0])) or count(*args)
    )
    row = {**GROUP, "ratings": {"help": [1, 2, 3]}, "comparisons": {"safe": [[0, 1, 1]]}}
    to_groups([row] * 50, scorers={"long": lambda prompt, response: len(response)})
    assert counted == [150, 50, 150]


# ------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {**PAIR, "preference": {"help": 1.5}},
            r"preference of 'help': got 1.5; give a probability from 0 to 1, or null",
        ),
        ({**PAIR, "preference": {"help": -0.1}}, r"got -0.1"),
        ({**PAIR, "preference": {" help": 1}}, r"the objective's name is ' help'; write a name, without spaces"),
        ({**PAIR, "preference": {"": 1}}, r"the objective's name is ''; write a name"),
        ({**PAIR, "preference": {"help": "0.7"}}, r"got '0.7'; give a probability .*, without quotes"),
        ({**PAIR, "prompt": [{"from": "human", "value": "a"}]}, r"has no role \(keys: from, value\); write"),
        (
            {"prompt": [user([{"type": "image_url", "image_url": "u"}])], "chosen": "a", "rejected": "b"},
            r"a message of the prompt has a part of type 'image_url' .*only text is trained on",
        ),
        ({**PAIR, "preference": {"help": "yes"}}, r"got 'yes'"),
        ({**PAIR, "preference": 0.5}, r"`preference` is 0.5; write \{objective: \.\.\}"),
        ({**GROUP, "preference": {"help": 1}}, r"compares two responses and this group has 3; write `comparisons`"),
        ({**GROUP, "ratings": {"help": [1, 2]}}, r"ratings of 'help': 2 values for 3 responses; give one per response"),
        ({**GROUP, "ratings": {"help": []}}, r"0 values for 3 responses"),
        (
            {**GROUP, "ratings": {"help": [1, math.inf, 2]}},
            r"got inf; give a finite number, or null where nobody rated",
        ),
        ({**GROUP, "ratings": {"help": [1, "4", 2]}}, r"got '4'"),
        ({**GROUP, "ratings": {"help": 4}}, r"got 4; write a list"),
        ({**GROUP, "win_rate": {"help": [0, 1, 2]}}, r"win_rate of 'help': got 2; give a probability"),
        ({**GROUP, "comparisons": {"help": [[0, 3, 1]]}}, r"\[0, 3, 1\] compares response 3; give 0 to 2"),
        ({**GROUP, "comparisons": {"help": [[-1, 2, 1]]}}, r"compares response -1"),
        ({**GROUP, "comparisons": {"help": [[0, 0.5, 1]]}}, r"compares response 0.5"),
        ({**GROUP, "comparisons": {"help": [[0, 1, 2]]}}, r"comparisons of 'help': got 2; give a probability"),
        ({**GROUP, "comparisons": {"help": [[0, 1]]}}, r"got \[0, 1\]; write \[first, second, P"),
        ({**GROUP, "comparisons": {"help": [[1, 1, 1]]}}, r"compares a response with itself"),
        ({**GROUP, "comparisons": {"help": [[0, 1, 1], [1, 0, 1]]}}, r"\[1, 0, 1\] compares two responses .* before"),
        (
            {**GROUP, "ratings": {"help": [1, 2, 3]}, "comparisons": {"help": [[0, 1, 1]]}},
            r"duplicate objective names: 'help' is labelled again in `comparisons`; rename",
        ),
        ({**GROUP, "responses": ["a"], "ratings": {"help": [1]}}, r"`responses` is \['a'\]; a group needs .* two"),
        ({**GROUP, "responses": "ab", "ratings": {"help": [1, 2]}}, r"`responses` is 'ab'; a group needs"),
        ({**GROUP, "responses": ["a", " \n", "c"]}, r"response 1 is empty; write its text or remove the row"),
        ({**PAIR, "chosen": ""}, r"response 0 is empty"),
        ({**PAIR, "prompt": ""}, r"prompt is empty"),
        ({**PAIR, "prompt": [user(" ")]}, r"prompt is empty"),
        ({"responses": ["a", "b"], "ratings": {"help": [1, 2]}}, r"prompt is empty"),
        ({**PAIR, "prompt": 7}, r"prompt is 7; write text or a list of messages"),
        ({**PAIR, "prompt": [user("a")]}, r"prompt and the responses mix plain text and messages"),
        ({**PAIR, "prompt": [{"content": "a"}]}, r"a message of the prompt has no role"),
        ({**PAIR, "prompt": [{"role": "user"}]}, r"a message of the prompt has no text as its content"),
        ({"chosen": "a", "rejected": "b"}, r"no `prompt` beside plain-text responses"),
        ({"chosen": [user("a")], "rejected": [user("a")]}, r"response 0 is empty"),
        ({**PAIR, **GROUP}, r"responses are given twice \(columns: prompt, chosen, rejected, responses\)"),
        (
            {"question": "a", "answers": ["b"]},
            r"unknown columns \(columns: question, answers\); accepted are prompt, chosen",
        ),
        ({"question": None}, r"unknown columns \(columns: none\)"),
    ],
)
def test_bad_rows_are_named_with_value_and_mend(row, message):
    good = {**GROUP, "ratings": {"other": [1, 2, 3]}}
    with pytest.raises(DataError, match=f"^row 1: .*{message}") as caught:
        to_groups([good, row])
    assert "\n" not in str(caught.value)


def test_errors_name_the_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({**PAIR, "preference": {"help": 3}}) + "\n")
    with pytest.raises(DataError, match=rf"^{re.escape(str(path))}: row 0 \(line 1\): preference of 'help': got 3"):
        to_groups(load_rows(path))


def test_text_in_one_row_and_messages_in_another():
    chat = {"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [assistant("c")]}
    with pytest.raises(DataError, match="row 1: plain text and messages in one dataset"):
        to_groups([PAIR, chat])


@pytest.mark.parametrize("rows", [[], Dataset.from_list([])])
def test_empty_dataset(rows):
    with pytest.raises(DataError, match="the dataset is empty"):
        to_groups(rows)


def test_no_labels_at_all():
    with pytest.raises(DataError, match=r"no labels; give a scorer or write them as .*ratings"):
        to_groups([GROUP])


@pytest.mark.parametrize("scale", [0, -1.0, math.nan, math.inf])
def test_rating_scale_must_be_positive(scale):
    with pytest.raises(DataError, match=f"rating_scale={scale}: give a positive number"):
        to_groups([{**GROUP, "ratings": {"help": [1, 2, 3]}}], rating_scale=scale)


def test_scorer_named_like_a_labelled_objective():
    with pytest.raises(DataError, match="duplicate objective names: the data labels 'preferred' and a scorer"):
        to_groups([PAIR], scorers={"preferred": lambda prompt, response: 0.0})


def test_scorer_that_returns_nan():
    with pytest.raises(DataError, match=r"group 1, response 0: scorer 'odd' returned nan; return a finite number"):
        to_groups(
            [PAIR, {**PAIR, "chosen": "z"}], scorers={"odd": lambda p, response: math.nan if response == "z" else 1}
        )


def test_scorer_that_fails():
    with pytest.raises(DataError, match=r"group 0, response 0: scorer 'odd' failed \(ZeroDivisionError") as caught:
        to_groups([PAIR], scorers={"odd": lambda prompt, response: 1 / 0})
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


# ------------------------------------------------------------------------------------------ values of other libraries


def test_half_an_emoji_is_replaced_and_counted(caplog):
    row = {**PAIR, "chosen": "cut \ud83d", "rejected": "\udc00b", "preference": {"h\ud83d": 1}}
    [group] = to_groups([row])
    assert group["responses"] == ["cut \ufffd", "\ufffdb"]
    assert group["win_rate"] == {"h\ufffd": [1.0, 0.0]}
    assert "3 texts hold half a character" in caplog.text
    assert to_groups([{**PAIR, "chosen": "\ud83d\ude00 \0"}])[0]["responses"][0] == "\U0001f600 \0"


def test_nan_is_null_as_pandas_means_it(caplog):
    frame = pd.DataFrame(
        [
            {**PAIR, "preference": {"help": 0.25, "safe": math.nan}},
            {**PAIR, "preference": math.nan},
            {"prompt": "p", "responses": np.array(["a", "b"]), "ratings": {"help": np.array([1, np.nan])}},
            {
                "prompt": "p",
                "responses": ("a", "b"),
                "ratings": {"help": [np.float32(2), Decimal("1.5")], "safe": pd.NA},
            },
        ]
    )
    assert win_rates(*frame.to_dict("records")) == to_groups(frame)["win_rate"][:]
    assert [row["help"] for row in to_groups(frame)["win_rate"]] == [[0.25, 0.75], None, None, [1.0, 0.0]]
    assert [row["preferred"] for row in to_groups(frame)["win_rate"]] == [None, [1.0, 0.0], None, None]
    assert "values are NaN; they are read as null" in caplog.text


def test_true_is_a_preference_of_one_and_huge_integers_are_numbers():
    assert win_rates({**PAIR, "preference": {"help": True}, "id": 10**400}) == [{"help": [1.0, 0.0]}]
    assert win_rates({**PAIR, "preference": None, "ratings": {"help": [2**70, 1]}})[0]["help"] == [1.0, 0.0]


def test_text_parts_are_one_content():
    row = {
        "prompt": [user([{"type": "text", "text": "Hi"}, " you"])],
        "chosen": [assistant("a")],
        "rejected": [assistant("b")],
    }
    assert to_groups([row])[0]["prompt"] == [user("Hi you")]


def test_names_with_equals_sign_and_slash_take_thresholds():
    [row] = win_rates({**PAIR, "preference": {"a=b/c": 1}})
    assert row == {"a=b/c": [1.0, 0.0]}
    assert parse_thresholds(["a=b/c=0.6"]) == {"a=b/c": 0.6}


# ---------------------------------------------------------------------------------------------------- rows left out

EMPTY = [
    PAIR,
    {**PAIR, "chosen": ""},
    {**PAIR, "prompt": " "},
    {**PAIR, "rejected": None, "chosen": None},
    {**PAIR, "chosen": " "},
]


def test_bad_rows_are_counted_in_the_refusal():
    with pytest.raises(
        DataError, match=r"^row 1: the response 0 is empty.*\(4 of 5 rows are bad: 2 empty reply, 1 empty"
    ):
        to_groups(EMPTY)


def test_bad_rows_are_skipped_and_counted(caplog):
    assert len(to_groups([*EMPTY, PAIR], on_bad_row="skip")) == 2
    assert "4 of 6 rows or prompts left out: 2 empty reply, 1 empty prompt" in caplog.text
    with pytest.raises(DataError, match=r"every row was left out: 2 empty reply, 1 .*the first: row 0: the response 0"):
        to_groups(EMPTY[1:], on_bad_row="skip")
    with pytest.raises(DataError, match="on_bad_row='drop': give 'error'"):
        to_groups([PAIR], on_bad_row="drop")


def test_the_minority_is_skipped_where_text_and_messages_mix():
    chat = {"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [assistant("c")]}
    assert to_groups([PAIR, chat, chat], on_bad_row="skip")[0]["prompt"] == [user("a")]
    with pytest.raises(DataError, match=r"^row 0: plain text and messages in one dataset"):
        to_groups([PAIR, chat, chat])
