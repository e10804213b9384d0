import json
import math
import os
from pathlib import Path

import pytest
from datasets import Dataset

from mopo_trainer.data import labels, load_rows, objectives, to_groups
from mopo_trainer.data.scorers import load_scorers
from mopo_trainer.data.sources import DataError

HH_RLHF = Path(os.environ.get("MOPO_HH_RLHF", Path(__file__).parents[4] / "shared/data/hh-rlhf"))

# Rows in the exact published schemas; what each should become stands beside it.
HH_RLHF_ROWS = [
    {
        "chosen": "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: A pen?\n\nAssistant: Here it is.",
        "rejected": "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: A pen?\n\nAssistant: No.",
    },
    {"chosen": "\n\nHuman: Hi\n\nAssistant: ", "rejected": "\n\nHuman: Hi\n\nAssistant: Hello!"},
    {
        "chosen": "\n\nHuman: Hi\n\nAssistant: One\n\nHuman: More\n\nAssistant: Two",
        "rejected": "\n\nHuman: Hi\n\nAssistant: Other\n\nHuman: More\n\nAssistant: Two",
    },
    {
        "chosen": "\n\nHuman: Hi\n\nHuman: You?\n\nAssistant: Yes",
        "rejected": "\n\nHuman: Hi\n\nHuman: You?\n\nAssistant: So\n\nAssistant: No",
    },
]

PKU_SAFERLHF_ROWS = [
    {
        "prompt": f"Question {better}{safer}?",
        "response_0": "First.",
        "response_1": "Second.",
        "prompt_source": "Alpaca-7B",
        "response_0_source": "Alpaca-7B",
        "response_1_source": "Alpaca2-7B",
        "is_response_0_safe": True,
        "is_response_1_safe": False,
        "response_0_harm_category": {"Endangering Public Health": False},
        "response_1_harm_category": {"Endangering Public Health": True},
        "response_0_severity_level": 0,
        "response_1_severity_level": 2,
        "better_response_id": better,
        "safer_response_id": safer,
        "response_0_sha256": "00",
        "response_1_sha256": "01",
    }
    for better, safer in [(0, 1), (1, 1), (1, None)]
]


def ultrafeedback_completion(response, helpfulness, honesty="N/A"):
    return {
        "annotations": {
            "instruction_following": {"Rating": "5", "Rationale": ".."},
            "honesty": {"Rating": honesty, "Rationale": ".."},
            "truthfulness": {"Type": ["1"], "Rationale": "..", "Rating": "4", "Rationale For Rating": ".."},
            "helpfulness": {"Type": ["1"], "Rationale": "..", "Rating": helpfulness, "Rationale For Rating": ".."},
        },
        "custom_system_prompt": "Be good.",
        "model": "alpaca-7b",
        "principle": "helpfulness",
        "response": response,
        "critique": "..",
        "overall_score": 7.5,
        "fine-grained_score": 4.25,
    }


ULTRAFEEDBACK_ROWS = [
    {
        "source": "evol_instruct",
        "instruction": "Explain.",
        "models": ["a", "b", "c", "d"],
        "completions": [
            ultrafeedback_completion("Best.", "5", "4"),
            ultrafeedback_completion("", "5"),
            ultrafeedback_completion("Worst.", "1"),
            ultrafeedback_completion("Middle.", "3", "2"),
        ],
        "correct_answers": ["None"],
        "incorrect_answers": ["None"],
    },
    {
        "source": "flan",
        "instruction": "Nobody answered.",
        "models": [],
        "completions": [],
        "correct_answers": ["None"],
        "incorrect_answers": ["None"],
    },
]


def turns(*contents):
    return [{"content": text, "role": role} for text, role in zip(contents, ["user", "assistant"] * 2, strict=False)]


ULTRAFEEDBACK_BINARIZED_ROWS = [
    {
        "prompt": "Explain.",
        "prompt_id": "a1",
        "chosen": turns("Explain.", "Well said."),
        "rejected": turns("Explain.", "Badly said."),
        "messages": turns("Explain.", "Well said."),
        "score_chosen": score,
        "score_rejected": 6.0,
    }
    for score in (8.5, 6.0)
]
ULTRAFEEDBACK_BINARIZED_ROWS.append({**ULTRAFEEDBACK_BINARIZED_ROWS[0], "rejected": turns("Explain.", "")})

HELPSTEER_ROWS = [
    {
        "prompt": prompt,
        "response": response,
        "helpfulness": helpfulness,
        "correctness": 4,
        "coherence": 4,
        "complexity": 2,
        "verbosity": 1,
    }
    for prompt, response, helpfulness in [
        ("A?", "Good.", 4),
        ("A?", "Bad.", 0),
        ("Alone?", "Yes.", 3),
        ("B?", "Bad.", 1),
        ("B?", "Good.", 3),
        ("B?", "Fair.", 2),
    ]
]


def test_hh_rlhf(caplog):
    groups = to_groups(Dataset.from_list(HH_RLHF_ROWS), preferred="harmless")
    assert groups.to_list() == [
        {
            "prompt": [
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Hello!"},
                {"role": "user", "content": "A pen?"},
            ],
            "responses": [
                [{"role": "assistant", "content": "Here it is."}],
                [{"role": "assistant", "content": "No."}],
            ],
            "win_rate": {"harmless": [1.0, 0.0]},
        },
        {
            "prompt": [{"role": "user", "content": "Hi\n\nYou?"}],
            "responses": [
                [{"role": "assistant", "content": "Yes"}],
                [{"role": "assistant", "content": "So\n\nNo"}],
            ],
            "win_rate": {"harmless": [1.0, 0.0]},
        },
    ]
    assert "2 of 4 rows or prompts left out: 1 empty reply, 1 dialogues that differ before" in caplog.text


def test_pku_saferlhf():
    groups = to_groups(Dataset.from_list(PKU_SAFERLHF_ROWS))
    assert groups["responses"][0] == ["First.", "Second."]
    assert groups["win_rate"] == [
        {"helpful": [1.0, 0.0], "harmless": [0.0, 1.0]},
        {"helpful": [0.0, 1.0], "harmless": [0.0, 1.0]},
        {"helpful": [0.0, 1.0], "harmless": None},
    ]


def test_ultrafeedback(caplog):
    groups = to_groups(Dataset.from_list(ULTRAFEEDBACK_ROWS))
    assert groups.to_list() == [
        {
            "prompt": "Explain.",
            "responses": ["Best.", "Worst.", "Middle."],
            "win_rate": {
                "instruction_following": [0.5, 0.5, 0.5],
                "honesty": [1.0, None, 0.0],
                "truthfulness": [0.5, 0.5, 0.5],
                "helpfulness": [1.0, 0.0, 0.5],
            },
        }
    ]
    assert "1 of 2 rows or prompts left out: 1 fewer than two completions" in caplog.text


def test_ultrafeedback_binarized(caplog):
    groups = to_groups(Dataset.from_list(ULTRAFEEDBACK_BINARIZED_ROWS))
    assert groups["prompt"] == [[{"content": "Explain.", "role": "user"}]] * 2
    assert groups["responses"][0] == [
        [{"content": "Well said.", "role": "assistant"}],
        [{"content": "Badly said.", "role": "assistant"}],
    ]
    assert groups["win_rate"] == [{"overall": [1.0, 0.0]}, {"overall": [0.5, 0.5]}]
    assert "1 empty reply" in caplog.text


def test_helpsteer(caplog):
    groups = to_groups(Dataset.from_list(HELPSTEER_ROWS))
    assert objectives(groups) == ["helpfulness", "correctness", "coherence", "complexity", "verbosity"]
    assert groups["prompt"] == ["A?", "B?"]
    assert groups["responses"] == [["Good.", "Bad."], ["Bad.", "Good.", "Fair."]]
    assert [row["helpfulness"] for row in groups["win_rate"]] == [[1.0, 0.0], [0.0, 1.0, 0.5]]
    assert "1 a prompt with fewer than two responses" in caplog.text


def test_labels_in_a_format_of_ours_are_not_overridden_by_an_adapter():
    row = {**PKU_SAFERLHF_ROWS[0], "preference": {"kind": 0.25}}
    assert to_groups([row])["win_rate"] == [{"kind": [0.25, 0.75]}]


def test_pairs_that_quote_a_dialogue_are_not_hh_rlhf():
    row = {"prompt": "Continue.", "chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}
    assert to_groups([row])["responses"] == [[row["chosen"], row["rejected"]]]


def test_a_prompt_that_only_names_the_speakers_is_not_hh_rlhf():
    row = {**PAIR, "prompt": "Human: and Assistant:"}
    assert to_groups([row])["prompt"] == [row["prompt"]]


def test_adapter_by_name():
    pair = {"prompt": "p", "response_0": "a", "response_1": "b", "better_response_id": 1}
    assert to_groups([pair], adapter="pku-saferlhf")["win_rate"][0]["helpful"] == [0.0, 1.0]
    with pytest.raises(DataError, match=r"no labels"):
        to_groups([pair], adapter="none")
    with pytest.raises(DataError, match=r"adapter='pku': no such adapter; give one of hh-rlhf, pku-saferlhf, .*, none"):
        to_groups([pair], adapter="pku")
    with pytest.raises(DataError, match=r"row 0: columns prompt, .* are not those of helpsteer"):
        to_groups([pair], adapter="helpsteer")


def test_a_later_row_of_another_kind_is_named():
    with pytest.raises(
        DataError, match=r"row 4: columns prompt, responses are not those of hh-rlhf.*1 of 5 rows are bad"
    ):
        to_groups([*HH_RLHF_ROWS, {"prompt": "p", "responses": ["a", "b"]}])


def test_rows_that_an_adapter_cannot_read_are_named_by_file_and_line_or_skipped(tmp_path, caplog):
    strange = [
        {**SCORED, "chosen": [], "rejected": []},
        {"prompt": "p", "responses": ["a", "b"]},
        {**SCORED, "chosen": 7, "rejected": 7},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("{broken\n" + "".join(json.dumps(row) + "\n" for row in [SCORED, *strange, SCORED]))
    rows = load_rows(path, on_bad_row="skip")
    with pytest.raises(
        DataError, match=r"rows\.jsonl: row 1 \(line 3\): not of the shape .*\(3 of 5 rows are bad: 2 not"
    ):
        to_groups(rows)
    assert len(to_groups(rows, on_bad_row="skip")) == 2
    assert "3 of 5 rows or prompts left out" in caplog.text
    assert "1 columns that are not those of ultrafeedback-binarized" in caplog.text
    with pytest.raises(DataError, match=r"^row 2: the column `image` holds"):
        to_groups([7, SCORED, {**SCORED, "image": "x"}], on_bad_row="skip")


def test_nothing_usable_is_an_error():
    with pytest.raises(DataError, match="every row was left out: 1 empty reply"):
        to_groups(HH_RLHF_ROWS[1:2])


# ----------------------------------------------------------------------------- what is left out, counted, or refused


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


PAIR = {"prompt": "Q?", "chosen": "Good.", "rejected": "Bad."}
SCORED = {**PAIR, "score_chosen": 2.0, "score_rejected": 1.0}
VOTED = {"prompt": "Q?", "response_0": "a", "response_1": "b", "better_response_id": 0, "safer_response_id": 1}
STRENGTH = {"prompt": "Q?", "response_1": "a", "response_2": "b", "preference_strength": 1}
BATTLE = {
    "winner": "model_a",
    "conversation_a": [user("Q?"), assistant("a"), user("More?"), assistant("c")],
    "conversation_b": [user("Q?"), assistant("a"), user("More?"), assistant("d")],
}
SUMMARY = {"info": {"post": "Post."}, "summaries": [{"text": "a"}, {"text": "b"}], "choice": 0}
SHARED = [user("A?"), assistant("A."), user("B?")]


@pytest.mark.parametrize(
    ("good", "bad", "reason"),
    [
        (SCORED, {"score_rejected": 3.0}, "a rejected reply of the higher score"),
        (SCORED, {"chosen": " "}, "empty reply"),
        (SCORED, {"prompt": ""}, "empty prompt"),
        (SCORED, {"prompt": None}, "no prompt"),
        (SUMMARY, {"info": {"title": "Title"}}, "no prompt"),
        (SUMMARY, {"choice": None}, "no verdict"),
        (SUMMARY, {"summaries": [{"text": "a"}, {"text": "b"}, {"text": "c"}]}, "no verdict"),
        (SCORED, {"rejected": None}, "no `rejected`"),
        (SCORED, {"rejected": [assistant("Bad.")]}, "text against messages"),
        (VOTED, {"better_response_id": None, "safer_response_id": None}, "no verdict"),
        (VOTED, {"better_response_id": 2, "safer_response_id": -1}, "no verdict"),
        (VOTED, {"response_1": None}, "no `response_1`"),
        (STRENGTH, {"preference_strength": None}, "no verdict"),
        (STRENGTH, {"preference_strength": -100}, "no verdict"),
        (BATTLE, {"winner": "model_c"}, "no verdict"),
        (
            BATTLE,
            {"conversation_b": [user("Q?"), assistant("b"), user("More?"), assistant("d")]},
            "dialogues that differ",
        ),
        (BATTLE, {"conversation_a": [user("Q?")], "conversation_b": [user("R?")]}, "does not end with the assistant's"),
        (
            {"system": "Be brief.", "prompt": [user("Q?")], "chosen": [assistant("a")], "rejected": [assistant("b")]},
            {"prompt": [{"role": "system", "content": "Be long."}, user("Q?")]},
            "a system column and another system message",
        ),
        (
            {"conversations": [{"from": "human", "value": "Q?"}], "chosen": "a", "rejected": "b"},
            {"conversations": [{"from": "function_call", "value": "f()"}, {"from": "human", "value": "Q?"}]},
            "a turn by 'function_call'",
        ),
        (
            {"prompt": "Q?", "chosen": [user("Q?"), assistant("a")], "rejected": [user("Q?"), assistant("b")]},
            {"prompt": "Another?"},
            "a prompt that its dialogues do not begin with",
        ),
        (
            {"instruction": "Q?", "generations": ["a", "b"], "ratings": [1, 2]},
            {"ratings": [1]},
            "another number of ratings than of generations",
        ),
        (
            {"instruction": "Q?", "generations": ["a", "b"], "ratings": [1, 2]},
            {"ratings": [1, None]},
            "fewer than two rat",
        ),
        (
            {"prompt": "Q?", "answers": [{"answer": "a", "rank": 1}, {"answer": "b", "rank": 2}]},
            {"answers": [{"answer": "a", "rank": 1}, {"answer": "", "rank": 2}]},
            "fewer than two answers",
        ),
    ],
)
def test_unusable_rows_are_left_out_and_counted(good, bad, reason, caplog):
    rows = [good, {**good, **bad}, good]
    assert len(to_groups(rows)) == 2
    assert "1 of 3 rows or prompts left out: 1 " in caplog.text
    assert reason in caplog.text


@pytest.mark.parametrize("gap", ["\n\n", "\n", "\r\n\r\n"])
@pytest.mark.parametrize("start", ["", "\n\n", " \n"])
def test_hh_rlhf_copies_keep_every_turn(start, gap):
    said = gap.join(["Human: A?", "Assistant: A.", "Human: B?", "Assistant: "])
    [group] = to_groups([{"chosen": f"{start}{said}Good.", "rejected": f"{start}{said}Bad."}])
    assert group["prompt"] == SHARED
    assert group["responses"] == [[assistant("Good.")], [assistant("Bad.")]]


def test_a_first_row_without_its_values_does_not_hide_the_data_set(caplog):
    assert to_groups([{**SCORED, "rejected": None}, SCORED])["win_rate"] == [{"overall": [1.0, 0.0]}]
    assert "no `rejected`" in caplog.text


def test_the_same_text_twice_is_a_tie_whatever_the_labels_say(caplog):
    rows = [{**PAIR, "rejected": "Good."}, {**SCORED, "rejected": "Good."}]
    for row, objective in zip(rows, ("preferred", "overall"), strict=True):
        assert to_groups([row])["win_rate"] == [{objective: [0.5, 0.5]}]
    assert to_groups([{**VOTED, "response_1": "a"}])["win_rate"] == [{"helpful": [0.5, 0.5], "harmless": [0.5, 0.5]}]
    unlabelled = {**PAIR, "rejected": "Good.", "preference": {"x": None, "y": 1.0}}
    assert to_groups([unlabelled, PAIR])["win_rate"][0] == {"x": None, "y": [0.5, 0.5], "preferred": None}
    assert caplog.text.count("1 of 1 pairs have the same text twice: counted as ties") == 3


def test_a_graded_preference_follows_the_rating_scale():
    [row] = to_groups([{**STRENGTH, "preference_strength": -2}], rating_scale=2.0)["win_rate"]
    assert row["preferred"] == pytest.approx([1 / (1 + math.exp(-1)), 1 / (1 + math.exp(1))], abs=1e-12)


def test_a_judgement_without_a_name_takes_the_name_that_is_given():
    assert objectives(to_groups([STRENGTH], preferred="quality")) == ["quality"]
    assert objectives(to_groups([{**VOTED, "safer_response_id": 0}], preferred="quality")) == ["helpful", "harmless"]


def test_a_system_column_is_said_and_reaches_labelled_rows_too(caplog):
    system = {"role": "system", "content": "Be brief."}
    rows = [{**PAIR, "preference": {"x": 1}, "system_prompt": "Be brief."}, {**PAIR, "preference": {"x": 0}}]
    first, second = to_groups(rows)
    assert first["prompt"] == [system, user("Q?")]
    assert second["prompt"] == [user("Q?")]
    assert second["responses"] == [[assistant("Good.")], [assistant("Bad.")]]
    assert "1 rows have a `system` column" in caplog.text
    assert to_groups(rows, adapter="none")["prompt"] == ["Q?", "Q?"]
    within = {"chosen": [system, user("Q?"), assistant("a")], "rejected": [system, user("Q?"), assistant("b")]}
    assert to_groups([{**within, "system": "Be brief."}])["prompt"] == [[system, user("Q?")]]


def test_whole_dialogues_beside_their_prompt_do_not_repeat_it():
    row = {"prompt": SHARED, "chosen": [*SHARED, assistant("a")], "rejected": [*SHARED, assistant("b")]}
    for verdict in ({}, {"preference": {"preferred": 1.0}}, {"score_chosen": 2, "score_rejected": 1}):
        [group] = to_groups([{**row, **verdict}])
        assert group["prompt"] == SHARED
        assert group["responses"] == [[assistant("a")], [assistant("b")]]


def test_a_users_turn_within_a_reply_is_refused():
    chosen = [user("Q?"), assistant("a"), user("More?"), assistant("c")]
    rejected = [user("Q?"), assistant("b"), user("More?"), assistant("d")]
    with pytest.raises(
        DataError, match="row 0: response 0 holds a turn of the user, which is not the policy's to learn"
    ):
        to_groups([{"chosen": chosen, "rejected": rejected}])


def test_prompts_are_not_guessed_among_several():
    pair = {"chosen": "Good.", "rejected": "Bad."}
    for columns in ({"question": "Q?", "context": "A passage."}, {"question": "Q?", "input": "A passage."}):
        with pytest.raises(DataError, match="no `prompt` beside plain-text responses"):
            to_groups([{**columns, **pair}])
    for dialogue in ([user("Another?"), assistant("Good.")], [user("Another?")]):
        assert to_groups([{**PAIR, "messages": dialogue}])["prompt"] == ["Q?"]
    assert to_groups([{**PAIR, "messages": [*SHARED[:2], user("Q?")]}])["prompt"] == [[*SHARED[:2], user("Q?")]]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "Q?", "completion": "A.", "label": True}, "judged good or bad by itself .the format of KTO."),
        ({"messages": SHARED, "kto_tag": False}, "the format of KTO"),
        ({"prompt": [user("Q?")], "completion": [assistant("A.")], "label": False}, "the format of KTO"),
        ({"instruction": "Q?", "input": "", "output": "A."}, "one response a row is compared with nothing; put two"),
        ({"prompt": "Q?", "response": "A.", "rating": 4}, "one response a row is compared with nothing"),
        ({"messages": [*SHARED, assistant("B.")]}, "one dialogue a row is compared with nothing"),
        ({"conversations": [{"from": "human", "value": "Q?"}]}, "one dialogue a row"),
        ({"transcript": "\n\nHuman: Q?\n\nAssistant: A.", "rating": 2.0}, "a transcript with a rating of its own"),
        ({"prompt": "Q?", "completions": ["a", "b"], "labels": [True, False]}, "the steps of one response"),
        ({"message_id": "1", "parent_id": None, "text": "Q?", "role": "prompter", "rank": None}, "messages of a tree"),
    ],
)
def test_what_holds_no_comparison_is_refused_with_the_mend(row, message):
    with pytest.raises(DataError, match=f"^row 0: .*{message}.* ratings: .*columns: ") as caught:
        to_groups([row, row])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("row", "column"),
    [
        (
            {"ds_name": "d", "image": {"bytes": "..", "path": None}, "question": "Q?", "chosen": "a", "rejected": "b"},
            "image",
        ),
        ({**PAIR, "images": ["1.png"]}, "images"),
        (
            {"image": "..", "question": "Q?", "response_1": "a", "response_2": "b", "safer_response_id": 1},
            "image",
        ),
    ],
)
def test_replies_about_images_are_refused(row, column):
    with pytest.raises(
        DataError, match=f"^row 0: the column `{column}` holds what the replies are about.*remove the col"
    ):
        to_groups([row])
    assert len(to_groups([{**row, column: None}])) == 1


def test_tools_that_are_not_read_are_said(caplog):
    to_groups([{**PAIR, "tools": "[]"}])
    assert "the column `tools` is not read" in caplog.text


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (SCORED, {**SCORED, "chosen": [assistant("Good.")], "rejected": [assistant("Bad.")]}),
        (
            {"instruction": "Q?", "chosen": "Good.", "rejected": "Bad."},
            {"instruction": "Q?", "history": [["A?", "A."]], "chosen": "Good.", "rejected": "Bad."},
        ),
        (STRENGTH, {**STRENGTH, "prompt": "A?\n<extra_id_1>Assistant\nA.\n<extra_id_1>User\nB?"}),
        (
            {"prompt": "Q?", "answers": [{"answer": "a", "rank": 1}, {"answer": "b", "rank": 2}]},
            {"prompt": "Human: Q?\n\nAssistant:", "answers": [{"answer": "a", "rank": 1}, {"answer": "b", "rank": 2}]},
        ),
    ],
)
def test_where_some_rows_are_messages_all_are(first, second):
    for rows in ([first, second], [second, first]):
        groups = to_groups(rows)
        assert all(isinstance(prompt, list) for prompt in groups["prompt"])
        assert groups["prompt"][rows.index(first)] == [user("Q?")]
        assert all(isinstance(response, list) for responses in groups["responses"] for response in responses)


def test_rows_of_two_sets_at_once_are_not_guessed():
    row = {"history": "Q?", "human_ref_A": "a", "human_ref_B": "b", "labels": 1, **STRENGTH}
    with pytest.raises(DataError, match=r"^row 0: has the columns of helpsteer2-preference and of shp; give adapter="):
        to_groups([row])
    assert to_groups([row], adapter="shp")["win_rate"] == [{"preferred": [1.0, 0.0]}]


def test_labels_of_ours_among_rows_of_a_set_are_not_dropped():
    with pytest.raises(DataError, match=r"^row 1: columns .*preference are not those of pku-saferlhf"):
        to_groups([VOTED, {**VOTED, "preference": {"x": 0.25}}])


def test_a_row_of_another_shape_is_named():
    with pytest.raises(DataError, match=r"^row 1: columns .* hold other kinds of values than dialogue-pairs has"):
        to_groups([{"prompt": "Q?", "chosen": [assistant("a")], "rejected": [assistant("b")]}, PAIR])
    broken = {"instruction": "Q?", "completions": [{"text": "a"}, {"text": "b"}]}
    with pytest.raises(DataError, match=r"^row 0: not of the shape that rows of ultrafeedback have \(KeyError"):
        to_groups([broken])


@pytest.mark.skipif(not HH_RLHF.is_dir(), reason=f"no hh-rlhf in {HH_RLHF}; set MOPO_HH_RLHF to its directory")
def test_real_hh_rlhf(caplog):
    rows = load_rows(HH_RLHF / "harmless-base-test.jsonl.gz")
    groups = to_groups(rows, scorers=load_scorers(["brevity"]), preferred="harmless")
    assert len(rows) == 2312
    assert len(groups) == 2308
    assert "4 of 2312 rows or prompts left out: 4 empty reply" in caplog.text
    for prompt, (chosen, rejected), row in zip(groups["prompt"][:80], groups["responses"][:80], rows, strict=False):
        assert [message["role"] for message in prompt] == ["user", "assistant"] * (len(prompt) // 2) + ["user"]
        assert row["chosen"].rstrip().endswith("\n\nAssistant: " + chosen[0]["content"])
        assert row["rejected"].rstrip().endswith("\n\nAssistant: " + rejected[0]["content"])
        assert row["chosen"].startswith("\n\nHuman: " + prompt[0]["content"])
    win_rate, group = labels(groups, ["harmless", "brevity"])
    assert win_rate.shape == (2 * 2308, 2)
    assert win_rate[::2, 0].eq(1).all()
    assert win_rate[1::2, 0].eq(0).all()
    assert group.tolist() == [index // 2 for index in range(2 * 2308)]


# ------------------------------------------------------------------------------------ what looks like another thing


HH_PROMPT = "\n\nHuman: A?\n\nAssistant: A.\n\nHuman: B?"


@pytest.mark.parametrize("end", ["\n\nAssistant:", "\n\nAssistant: ", "", "\n"])
@pytest.mark.parametrize("reply", ["{}", " {}", "\n\nAssistant: {}", HH_PROMPT + "\n\nAssistant: {}"])
def test_a_dialogue_as_the_prompt_is_not_repeated_in_the_replies(end, reply):
    row = {"prompt": HH_PROMPT + end, "chosen": reply.format("Good."), "rejected": reply.format("Bad.")}
    for extra in ({}, {"score_chosen": 2, "score_rejected": 1}):
        [group] = to_groups([{**row, **extra}])
        assert group["prompt"] == SHARED
        assert group["responses"] == [[assistant("Good.")], [assistant("Bad.")]]
    assert to_groups([{**row, "prompt": "\n\nHuman: B?" + end, "chosen": "a", "rejected": "b"}])["prompt"] == [
        SHARED[2:]
    ]


def test_a_prompt_beside_dialogues_that_begin_with_it_is_not_repeated():
    row = {"prompt": "Q?", "chosen": "\n\nHuman: Q?\n\nAssistant: a", "rejected": "\n\nHuman: Q?\n\nAssistant: b"}
    for extra in ({}, {"score_chosen": 2, "score_rejected": 1}):
        [group] = to_groups([{**row, **extra}])
        assert group["prompt"] == [user("Q?")]
        assert group["responses"] == [[assistant("a")], [assistant("b")]]


@pytest.mark.parametrize(("you", "me"), [("human", "gpt"), ("User", "Assistant"), ("prompter", "bot")])
def test_speakers_under_other_names_are_the_user_and_the_assistant(you, me):
    def turn(speaker, text):
        return {"role": speaker, "content": text}

    row = {"chosen": [turn(you, "Q?"), turn(me, "a")], "rejected": [turn(you, "Q?"), turn(me, "b")]}
    [group] = to_groups([row])
    assert group["prompt"] == [user("Q?")]
    assert group["responses"] == [[assistant("a")], [assistant("b")]]
    assert to_groups([{**row, "rejected": row["chosen"]}])["win_rate"] == [{"preferred": [0.5, 0.5]}]
    more = {key: [*row[key], turn(you, "More?"), turn(me, "c")] for key in row}
    with pytest.raises(DataError, match="row 0: response 0 holds a turn of the user"):
        to_groups([more])


@pytest.mark.parametrize("system", [["Be brief."], {"role": "system", "content": "Be brief."}, 7])
def test_a_system_column_that_is_no_text_is_not_dropped(system, caplog):
    rows = [PAIR, {**PAIR, "system": system}]
    with pytest.raises(DataError, match=r"^row 1: the column `system` holds a .*; write text"):
        to_groups(rows)
    assert len(to_groups(rows, on_bad_row="skip")) == 1
    assert "1 `system` is no text" in caplog.text
    assert to_groups([{**PAIR, "system_message": "Be brief."}])["prompt"][0][0]["role"] == "system"


def test_an_instruction_may_stand_in_the_input_alone():
    assert to_groups([{"instruction": "", "input": "Q?", "chosen": "a", "rejected": "b"}])["prompt"] == ["Q?"]


def test_an_empty_system_message_does_not_hide_another_prompt(caplog):
    dialogue = [{"role": "system", "content": ""}, user("Other?")]
    other = {"prompt": "Q?", "chosen": [*dialogue, assistant("a")], "rejected": [*dialogue, assistant("b")]}
    with pytest.raises(DataError, match="1 a prompt that its dialogues do not begin with"):
        to_groups([other])


def test_arena_winners_written_as_text():
    battle = {"prompt": "Q?", "response_a": "a", "response_b": "b", "winner_model_a": "0", "winner_model_b": "1"}
    assert to_groups([battle])["win_rate"] == [{"preferred": [0.0, 1.0]}]


def test_names_of_objectives_that_are_left_out_with_their_rows_are_forgotten():
    rows = Dataset.from_list([{**PAIR, "preference": {" x": 1.0, "y": 1.0}}, {**PAIR, "preference": {"y": 0.0}}])
    assert objectives(to_groups(rows, on_bad_row="skip")) == ["y"]


def test_copies_of_a_reply_within_a_group_are_ties_among_themselves(caplog):
    rows = [
        {"prompt": "Q?", "response": text, "is_safe": safe} for text, safe in [("a", True), ("a", False), ("b", False)]
    ]
    assert to_groups(rows)["win_rate"] == [{"harmless": [0.75, 0.5, 0.25]}]
    assert "1 groups hold the same text more than once" in caplog.text
    compared = {"prompt": [user("Q?")], "responses": [[assistant(text)] for text in "aab"]}
    triples = [[0, 1, 1.0], [1, 2, 1.0]]
    assert to_groups([{**compared, "comparisons": {"x": triples}}])["win_rate"] == [{"x": [0.5, 0.75, 0.0]}]
