"""Formats, labels, splits and tokens; what a row must become is worked out by hand from the definition of win rates."""

import json
import math
import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, processors
from transformers import PreTrainedTokenizerFast

from mopo_trainer.data import (
    DataError,
    labels,
    load_rows,
    objectives,
    plain_text,
    split_groups,
    to_groups,
    tokenize_group,
    tokens,
)
from mopo_trainer.data.scorers import load_scorers

EXAMPLES = Path(__file__).parents[2] / "examples/data"
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


def test_sixty_thousand_rows_take_seconds(tmp_path):
    """The bound is CPU time, far above the 8 s of a slow core and far below what per-row tensors would take."""
    row = {"prompt": "p" * 200, "responses": ["r" * 400] * 4, "ratings": {name: [1, 2, 3, 4.5] for name in "abcde"}}
    (tmp_path / "rows.jsonl").write_text((json.dumps(row) + "\n") * 60_000)
    start = time.process_time()
    win_rate, _ = labels(to_groups(load_rows(tmp_path / "rows.jsonl")), list("abcde"))
    assert time.process_time() - start < 40
    assert win_rate.shape == (240_000, 5)


# ------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {**PAIR, "preference": {"help": 1.5}},
            r"preference of 'help': got 1.5; give a probability from 0 to 1, or null",
        ),
        ({**PAIR, "preference": {"help": -0.1}}, r"got -0.1"),
        ({**PAIR, "preference": {"help": math.nan}}, r"got nan"),
        ({**PAIR, "preference": {"help": "yes"}}, r"got 'yes'"),
        ({**PAIR, "preference": 0.5}, r"`preference` is 0.5; write \{objective: \.\.\}"),
        ({**GROUP, "preference": {"help": 1}}, r"compares two responses and this group has 3; write `comparisons`"),
        ({**GROUP, "ratings": {"help": [1, 2]}}, r"ratings of 'help': 2 values for 3 responses; give one per response"),
        ({**GROUP, "ratings": {"help": []}}, r"0 values for 3 responses"),
        (
            {**GROUP, "ratings": {"help": [1, math.nan, 2]}},
            r"got nan; give a finite number, or null where nobody rated",
        ),
        ({**GROUP, "ratings": {"help": [1, math.inf, 2]}}, r"got inf"),
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
    with pytest.raises(DataError, match=rf"^{re.escape(str(path))}: row 0: preference of 'help': got 3"):
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


# ---------------------------------------------------------------------------------------------------------- labels


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


# ---------------------------------------------------------------------------------------------------------- tokens

WHOLE = {"max_prompt_length": None, "max_length": None}


def decoded(tokenizer, sequences):
    """(prompt text, response text) of every sequence."""
    return [(tokenizer.decode(ids[:n]), tokenizer.decode(ids[n:])) for ids, n in sequences]


def test_plain_text_joins_messages():
    assert plain_text("a") == "a"
    assert plain_text([user("a"), assistant("b")]) == "a\n\nb"


def test_tokenize_plain_text(tokenizer):
    sequences = tokenize_group("Why? ", ["So.", "Because.<|end|>"], tokenizer, **WHOLE)
    assert decoded(tokenizer, sequences) == [("Why? ", "So.<|end|>"), ("Why? ", "Because.<|end|>")]
    assert [n for _, n in sequences] == [5, 5]  # byte level: one token a character


@pytest.mark.parametrize("as_chat", [False, True])
def test_tokenize_chat(tokenizer, as_chat):
    prompt, responses = "Why?", ["So.", "Because."]
    if not as_chat:
        prompt, responses = [user(prompt)], [[assistant(response)] for response in responses]
    sequences = tokenize_group(prompt, responses, tokenizer, **WHOLE, as_chat=as_chat)
    start = "<|user|>Why?<|end|><|assistant|>"
    assert decoded(tokenizer, sequences) == [(start, "So.<|end|>"), (start, "Because.<|end|>")]
    whole = tokenizer.apply_chat_template([user("Why?"), assistant("Because.")], tokenize=True)["input_ids"]
    assert sequences[1][0] == whole


def test_what_a_chat_template_writes_behind_the_end_is_left_out(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", tokenizer.chat_template.replace("<|end|>", "<|end|>\n"))
    [(ids, n)] = tokenize_group([user("Why?")], [[assistant("So.")]], tokenizer, **WHOLE)
    assert tokenizer.decode(ids[n:]) == "So.<|end|>"
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids[:n]) == "<|user|>Why?<|end|>\n<|assistant|>"


def test_messages_from_a_table_lose_the_keys_that_others_have(tokenizer):
    prompt = [{"role": "user", "content": "Why?", "name": None}]
    template = "{% for m in messages %}{{ m['content'] }}{% if 'name' in m %}!{% endif %}{% endfor %}"
    named = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|end|>")
    named.chat_template = template
    [(ids, _)] = tokenize_group(prompt, [[assistant("So.")]], named, **WHOLE)
    assert named.decode(ids) == "Why?So."


def test_truncation_takes_the_prompt_from_the_left_and_the_response_from_the_right(tokenizer, caplog):
    tokens._report_cut.cache_clear()
    sequences = tokenize_group("abcdef", ["uvwxyz", "u"], tokenizer, max_prompt_length=4, max_length=8)
    assert decoded(tokenizer, sequences) == [("cdef", "uvwx"), ("cdef", "u<|end|>")]
    tokenize_group("abcdef", ["uvwxyz", "u"], tokenizer, max_prompt_length=4, max_length=8)
    assert caplog.text.count("cut to fit max_length=8") == 1


def test_nothing_is_reported_where_nothing_was_cut(tokenizer, caplog):
    tokens._report_cut.cache_clear()
    [(ids, n)] = tokenize_group("abcdef", ["uvw"], tokenizer, max_prompt_length=4, max_length=8)
    assert (len(ids), n) == (8, 4)
    assert caplog.text == ""


def test_a_prompt_that_leaves_no_room_is_an_error(tokenizer):
    with pytest.raises(
        DataError, match=r"prompt's 6 tokens leave no room for a response in max_length=6; set max_prompt"
    ):
        tokenize_group("abcdef", ["u"], tokenizer, max_prompt_length=None, max_length=6)


def test_lengths_must_be_positive(tokenizer):
    with pytest.raises(DataError, match="max_prompt_length=0: give at least 1"):
        tokenize_group("abcdef", ["u"], tokenizer, max_prompt_length=0, max_length=6)


def merging_tokenizer():
    """Begins with <s> and merges "ab", so that a prompt's end and a response's beginning may grow together."""
    vocab = {"a": 0, "b": 1, "c": 2, "ab": 3, "</s>": 4, "<s>": 5}
    backend = Tokenizer(models.BPE(vocab, [("a", "b")]))
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 5)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def test_tokens_never_merge_across_the_boundary():
    sequences = tokenize_group("ca", ["bc", "cab"], merging_tokenizer(), **WHOLE)
    assert sequences == [([5, 2, 0, 1, 2, 4], 3), ([5, 2, 0, 2, 3, 4], 3)]


def test_special_tokens_of_a_chat_come_from_its_template_only():
    chatty = merging_tokenizer()
    chatty.chat_template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    assert tokenize_group("c", ["c", "ab"], chatty, **WHOLE, as_chat=True) == [([5, 2, 2], 2), ([5, 2, 3], 2)]


def test_chat_without_a_template():
    with pytest.raises(DataError, match="messages need a chat template and the tokenizer has none"):
        tokenize_group("a", ["b"], merging_tokenizer(), **WHOLE, as_chat=True)


def test_template_whose_replies_do_not_follow_its_generation_prompt(tokenizer, monkeypatch):
    monkeypatch.setattr(
        tokenizer, "chat_template", tokenizer.chat_template.replace("<|assistant|>", "<|assistant|>think")
    )
    with pytest.raises(DataError, match=r"renders the prompt alone as '.*<\|assistant\|>think' but not so before"):
        tokenize_group([user("a")], [[assistant("b")]], tokenizer, **WHOLE)


def test_messages_that_the_template_refuses(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('roles must\\nalternate') }}")
    with pytest.raises(DataError, match=r"the chat template refuses the messages \(roles must alternate\); mend"):
        tokenize_group([user("a")], [[assistant("b")]], tokenizer, **WHOLE)
