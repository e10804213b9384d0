import os
from pathlib import Path

import pytest
from datasets import Dataset

from mopo_trainer.data import labels, load_rows, objectives, to_groups
from mopo_trainer.data.adapters import adapt
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
    with pytest.raises(DataError, match=r"row 4: columns prompt, responses are not those of hh-rlhf"):
        list(adapt([*HH_RLHF_ROWS, {"prompt": "p", "responses": ["a", "b"]}]))


def test_nothing_usable_is_an_error():
    with pytest.raises(DataError, match="every row was left out: 1 empty reply"):
        to_groups(HH_RLHF_ROWS[1:2])


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
