"""One row or two in the columns of every public data set, with invented text, and the groups that they become."""

import pytest
from datasets import Dataset

from mopo_trainer.data import to_groups
from mopo_trainer.data.adapters import ADAPTERS
from mopo_trainer.names import ADAPTER_NAMES


def system(content):
    return {"role": "system", "content": content}


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def said(*contents):
    """Each content as the assistant's whole reply."""
    return [[assistant(content)] for content in contents]


def turns(*contents, speakers=("user", "assistant"), speaker="role", text="content"):
    return [{speaker: speakers[index % 2], text: content} for index, content in enumerate(contents)]


def sharegpt(*contents):
    return turns(*contents, speakers=("human", "gpt"), speaker="from", text="value")


def group(prompt, responses, **win_rate):
    return {"prompt": prompt, "responses": responses, "win_rate": win_rate}


WON = {"preferred": [1.0, 0.0]}
LOST = {"preferred": [0.0, 1.0]}
TIED = {"preferred": [0.5, 0.5]}
BETTER = {"overall": [1.0, 0.0]}
EVEN = {"overall": [0.5, 0.5]}

# name: (adapter, rows, groups); adapter None: the rows are in an accepted format as they are.
SETS = {
    "Anthropic/hh-rlhf": (
        "hh-rlhf",
        [
            {"chosen": "\n\nHuman: Hi\n\nAssistant: Yes", "rejected": "\n\nHuman: Hi\n\nAssistant: No"},
            {"chosen": "\n\nHuman: Hi\n\nAssistant: Same", "rejected": "\n\nHuman: Hi\n\nAssistant: Same"},
        ],
        [group([user("Hi")], said("Yes", "No"), **WON), group([user("Hi")], said("Same", "Same"), **TIED)],
    ),
    "hh-rlhf copies without the leading newlines": (
        "hh-rlhf",
        [
            {
                "chosen": "Human: Hi\n\nAssistant: Hello\n\nHuman: A pen?\n\nAssistant: Here.",
                "rejected": "Human: Hi\n\nAssistant: Hello\n\nHuman: A pen?\n\nAssistant: No.",
            }
        ],
        [group(turns("Hi", "Hello", "A pen?"), said("Here.", "No."), **WON)],
    ),
    "Dahoas/full-hh-rlhf": (
        "hh-rlhf",
        [{"prompt": "\n\nHuman: Hi\n\nAssistant:", "response": " Yes", "chosen": " Yes", "rejected": " No"}],
        [group([user("Hi")], said("Yes", "No"), **WON)],
    ),
    "PKU-Alignment/PKU-SafeRLHF": (
        "pku-saferlhf",
        [
            {
                "prompt": "Q?",
                "response_0": "First.",
                "response_1": "Second.",
                "prompt_source": "Alpaca3-8B",
                "response_0_source": "Alpaca2-7B",
                "response_1_source": "Alpaca3-8B",
                "is_response_0_safe": False,
                "is_response_1_safe": True,
                "response_0_harm_category": {"Privacy Violation": True},
                "response_1_harm_category": {"Privacy Violation": False},
                "response_0_severity_level": 2,
                "response_1_severity_level": 0,
                "better_response_id": 0,
                "safer_response_id": 1,
                "response_0_sha256": "00",
                "response_1_sha256": "01",
            }
        ],
        [group("Q?", ["First.", "Second."], helpful=[1.0, 0.0], harmless=[0.0, 1.0])],
    ),
    "PKU-Alignment/PKU-SafeRLHF-single-dimension": (
        "pku-saferlhf-single-dimension",
        [
            {
                "prompt": "Q?",
                "response_0": "First.",
                "response_1": "Second.",
                "prompt_source": "Alpaca3-8B",
                "response_0_source": "Alpaca2-7B",
                "response_1_source": "Alpaca3-8B",
                "better_response_id": better,
                "response_0_sha256": "00",
                "response_1_sha256": "01",
            }
            for better in (0, 1)
        ],
        [group("Q?", ["First.", "Second."], **WON), group("Q?", ["First.", "Second."], **LOST)],
    ),
    "PKU-Alignment/BeaverTails-V, its image column removed": (
        "beavertails-v",
        [
            {
                "question": "Q?",
                "category": "animal_abuse",
                "image_severity": 1,
                "response_1": "First.",
                "response_2": "Second.",
                "response_1_from": "a",
                "response_2_from": "b",
                "more_helpful_response_id": 2,
                "is_response_1_safe": "yes",
                "is_response_2_safe": "no",
                "safer_response_id": 1,
                "response_1_harmless_rate": 3,
                "response_2_harmless_rate": -2,
                "response_1_helpful_rate": 1,
                "response_2_helpful_rate": 2,
            }
        ],
        [group("Q?", ["First.", "Second."], helpful=[0.0, 1.0], harmless=[1.0, 0.0])],
    ),
    "PKU-Alignment/align-anything": (
        "align-anything",
        [{"question": "Q?", "response_1": "First.", "response_2": "Second.", "overall_response": 2}],
        [group("Q?", ["First.", "Second."], **LOST)],
    ),
    "PKU-Alignment/BeaverTails": (
        "beavertails",
        [
            {"prompt": "A?", "response": "Kind.", "category": {"animal_abuse": False}, "is_safe": True},
            {"prompt": "B?", "response": "Alone.", "category": {"animal_abuse": False}, "is_safe": True},
            {"prompt": "A?", "response": "Cruel.", "category": {"animal_abuse": True}, "is_safe": False},
            {"prompt": "A?", "response": "Mild.", "category": {"animal_abuse": False}, "is_safe": True},
        ],
        [group("A?", ["Kind.", "Cruel.", "Mild."], harmless=[0.75, 0.0, 0.75])],
    ),
    "nvidia/HelpSteer2, shuffled and with two turns": (
        "helpsteer",
        [
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
                ("B?\n<extra_id_1>Assistant\nB.\n<extra_id_1>User\nC?", "Bad.", 1),
                ("A?", "Bad.", 0),
                ("B?\n<extra_id_1>Assistant\nB.\n<extra_id_1>User\nC?", "Good.", 3),
            ]
        ],
        [
            group(
                prompt,
                replies,
                helpfulness=wins,
                **{key: [0.5, 0.5] for key in ("correctness", "coherence", "complexity", "verbosity")},
            )
            for prompt, replies, wins in [
                ([user("A?")], said("Good.", "Bad."), [1.0, 0.0]),
                (turns("B?", "B.", "C?"), said("Bad.", "Good."), [0.0, 1.0]),
            ]
        ],
    ),
    "nvidia/HelpSteer2, preference": (
        "helpsteer2-preference",
        [
            {
                "split": "train",
                "prompt": "Q?",
                "response_1": "First.",
                "response_2": "Second.",
                "preference_strength": strength,
                "preference_statement": "@Response 1 is better than @Response 2.",
                "preference_elaboration": "..",
                "three_most_similar_preferences": [{"statement": "..", "elaboration": "..", "strength": strength}],
                "all_preferences_unprocessed": [{"statement": "..", "elaboration": "..", "strength": strength}],
            }
            for strength in (-2, 3, 0)
        ],
        [group("Q?", ["First.", "Second."], **outcome) for outcome in (WON, LOST, TIED)],
    ),
    "nvidia/HelpSteer3, preference": (
        "helpsteer3",
        [
            {
                "domain": "stem",
                "language": "english",
                "context": turns("A?", "A.", "B?"),
                "response1": "First.",
                "response2": "Second.",
                "overall_preference": strength,
                "individual_preference": [{"score": -3, "reasoning": "..", "feedback1": "..", "feedback2": ".."}],
            }
            for strength in (-1, 2, 0)
        ],
        [group(turns("A?", "A.", "B?"), said("First.", "Second."), **outcome) for outcome in (WON, LOST, TIED)],
    ),
    "stanfordnlp/SHP": (
        "shp",
        [
            {
                "post_id": "p",
                "domain": "askculinary_train",
                "upvote_ratio": 0.98,
                "history": "Q?",
                "c_root_id_A": "a",
                "c_root_id_B": "b",
                "created_at_utc_A": 2,
                "created_at_utc_B": 1,
                "score_A": 340 if label else 10,
                "score_B": 166,
                "human_ref_A": "First.",
                "human_ref_B": "Second.",
                "labels": label,
                "seconds_difference": 1.0,
                "score_ratio": 2.0,
            }
            for label in (1, 0)
        ],
        [group("Q?", ["First.", "Second."], **WON), group("Q?", ["First.", "Second."], **LOST)],
    ),
    "berkeley-nest/Nectar": (
        "nectar",
        [
            {
                "prompt": "\n\nHuman: A?\n\nAssistant: A.\n\nHuman: B?\n\nAssistant: ",
                "answers": [
                    {"answer": f"{rank}.", "model": "m", "rank": float(rank)} for rank in (3, 1, 2, 7, 5, 6, 4)
                ],
                "turns": 2,
                "num_responses": 7,
                "source": ["lmsys-chat-1m"],
                "good_natured": True,
            }
        ],
        [
            group(
                turns("A?", "A.", "B?"),
                said("3.", "1.", "2.", "7.", "5.", "6.", "4."),
                preferred=[(7 - rank) / 6 for rank in (3, 1, 2, 7, 5, 6, 4)],
            )
        ],
    ),
    "lmsys/chatbot_arena_conversations": (
        "arena",
        [
            {
                "question_id": "q",
                "model_a": "a",
                "model_b": "b",
                "winner": winner,
                "judge": "arena_user_1",
                "conversation_a": turns("Q?", "First."),
                "conversation_b": turns("Q?", "Second."),
                "turn": 1,
                "anony": True,
                "language": "English",
                "tstamp": 1.0,
                "openai_moderation": {"flagged": False},
                "toxic_chat_tag": {"flagged": False},
            }
            for winner in ("model_a", "model_b", "tie", "tie (bothbad)")
        ],
        [group([user("Q?")], said("First.", "Second."), **outcome) for outcome in (WON, LOST, TIED, TIED)],
    ),
    "lmsys/mt_bench_human_judgments": (
        "arena",
        [
            {
                "question_id": 81,
                "model_a": "a",
                "model_b": "b",
                "winner": "model_b",
                "judge": "author_0",
                "conversation_a": turns("Q?", "First.", "More?", "Third."),
                "conversation_b": turns("Q?", "Second.", "More?", "Fourth."),
                "turn": turn,
            }
            for turn in (1, 2)
        ],
        [group([user("Q?")], said("First.", "Second."), **LOST)],
    ),
    "lmsys/lmsys-arena-human-preference-55k": (
        "arena-responses",
        [
            {
                "id": 1,
                "model_a": "a",
                "model_b": "b",
                "prompt": '["Q?"]',
                "response_a": '["First."]',
                "response_b": '["Second."]',
                "winner_model_a": a,
                "winner_model_b": b,
                "winner_tie": tie,
            }
            for a, b, tie in [(1, 0, 0), (0, 1, 0), (0, 0, 1)]
        ],
        [group("Q?", ["First.", "Second."], **outcome) for outcome in (WON, LOST, TIED)],
    ),
    "lmarena-ai, prompt and responses in text": (
        "arena-responses",
        [
            {
                "id": "1",
                "prompt": "Q?",
                "response_a": "First.",
                "response_b": "Second.",
                "winner": "model_b",
                "model_a": "a",
                "model_b": "b",
                "language": "English",
            }
        ],
        [group("Q?", ["First.", "Second."], **LOST)],
    ),
    "openai/webgpt_comparisons": (
        "webgpt",
        [
            {
                "question": {"dataset": "eli5", "id": "1", "full_text": "Q?"},
                "quotes_0": {"title": ["T"], "extract": ["E"]},
                "answer_0": "First [1].",
                "tokens_0": {"prefix": [1], "completion": [2]},
                "score_0": score,
                "quotes_1": {"title": ["T"], "extract": ["E"]},
                "answer_1": "Second [1].",
                "tokens_1": {"prefix": [1], "completion": [2]},
                "score_1": -score,
            }
            for score in (0.5, -1.0, 0.0)
        ],
        [group("Q?", ["First [1].", "Second [1]."], **outcome) for outcome in (WON, LOST, TIED)],
    ),
    "openai/summarize_from_feedback, comparisons": (
        "summarize-from-feedback",
        [
            {
                "info": {
                    "id": "t3_1",
                    "post": "Post.",
                    "title": "Title",
                    "subreddit": "r",
                    "site": None,
                    "article": None,
                },
                "summaries": [
                    {"text": " First.", "policy": "sup1", "note": None},
                    {"text": " Second.", "policy": "ref", "note": None},
                ],
                "choice": 1,
                "worker": "w",
                "batch": "batch3",
                "split": "train",
                "extra": {"confidence": None},
            },
            {
                "info": {
                    "id": "c",
                    "post": None,
                    "title": "Title",
                    "subreddit": None,
                    "site": "cnn",
                    "article": "News.",
                },
                "summaries": [
                    {"text": " First.", "policy": "sup1", "note": None},
                    {"text": " Second.", "policy": "ref", "note": None},
                ],
                "choice": 0,
                "worker": "w",
                "batch": "cnndm0",
                "split": "valid1",
                "extra": {"confidence": 7},
            },
        ],
        [
            group("SUBREDDIT: r/r\n\nTITLE: Title\n\nPOST: Post.\n\nTL;DR:", [" First.", " Second."], **LOST),
            group("TITLE: Title\n\nNews.\n\nTL;DR:", [" First.", " Second."], **WON),
        ],
    ),
    "HuggingFaceH4/ultrafeedback_binarized": (
        "ultrafeedback-binarized",
        [
            {
                "prompt": "Q?",
                "prompt_id": "1",
                "chosen": turns("Q?", "Good."),
                "rejected": turns("Q?", "Bad."),
                "messages": turns("Q?", "Good."),
                "score_chosen": 8.5,
                "score_rejected": score,
            }
            for score in (6.0, 8.5)
        ],
        [group([user("Q?")], said("Good.", "Bad."), **outcome) for outcome in (BETTER, EVEN)],
    ),
    "trl-lib/ultrafeedback_binarized": (
        "ultrafeedback-binarized",
        [
            {
                "chosen": turns("Q?", "Good."),
                "rejected": turns("Q?", "Bad."),
                "score_chosen": 8.5,
                "score_rejected": 6.0,
            }
        ],
        [group([user("Q?")], said("Good.", "Bad."), **BETTER)],
    ),
    "scores beside plain text": (
        "ultrafeedback-binarized",
        [
            {"prompt": "Q?", "chosen": "Good.", "rejected": "Bad.", "score_chosen": 2, "score_rejected": score}
            for score in (1, 2, None)
        ],
        [group("Q?", ["Good.", "Bad."], **outcome) for outcome in (BETTER, EVEN, BETTER)],
    ),
    "scores beside an explicit prompt in messages": (
        "ultrafeedback-binarized",
        [
            {
                "prompt": turns("A?", "A.", "B?"),
                "chosen": [assistant("Good.")],
                "rejected": [assistant("Bad.")],
                "score_chosen": 2.0,
                "score_rejected": 1.0,
            }
        ],
        [group(turns("A?", "A.", "B?"), said("Good.", "Bad."), **BETTER)],
    ),
    "argilla/ultrafeedback-binarized-preferences": (
        "ultrafeedback-binarized",
        [
            {
                "source": "evol_instruct",
                "instruction": "Q?",
                "chosen_response": "Good.",
                "rejected_response": "Bad.",
                "chosen_avg_rating": 5.0,
                "rejected_avg_rating": 3.75,
                "chosen_model": "m",
            }
        ],
        [group("Q?", ["Good.", "Bad."], **BETTER)],
    ),
    "argilla/ultrafeedback-binarized-preferences-cleaned": (
        "ultrafeedback-binarized",
        [
            {
                "source": "evol_instruct",
                "prompt": "Q?",
                "chosen": turns("Q?", "Good."),
                "chosen-rating": 5.0,
                "chosen-model": "m",
                "rejected": turns("Q?", "Bad."),
                "rejected-rating": 3.75,
                "rejected-model": "n",
            }
        ],
        [group([user("Q?")], said("Good.", "Bad."), **BETTER)],
    ),
    "argilla/dpo-mix-7k": (
        "ultrafeedback-binarized",
        [
            {
                "dataset": "argilla/..",
                "chosen": [system("Be brief."), *turns("Q?", "Good.")],
                "rejected": [system("Be brief."), *turns("Q?", "Bad.")],
                "chosen_rating": 5.0,
                "rejected_rating": 3.75,
            }
        ],
        [group([system("Be brief."), user("Q?")], said("Good.", "Bad."), **BETTER)],
    ),
    "argilla/distilabel-math-preference-dpo": (
        "ultrafeedback-binarized",
        [
            {
                "metadata": "{}",
                "instruction": "Q?",
                "chosen_response": "Good.",
                "chosen_rating": 9.0,
                "rejected_response": "Bad.",
                "rejected_rating": 7.0,
            }
        ],
        [group("Q?", ["Good.", "Bad."], **BETTER)],
    ),
    "argilla/distilabel-intel-orca-dpo-pairs": (
        "ultrafeedback-binarized",
        [
            {
                "system": "",
                "input": "Q?",
                "chosen": "Good.",
                "rejected": "Bad.",
                "generations": ["Bad.", "Good."],
                "order": ["rejected", "chosen"],
                "labelling_model": "gpt-4",
                "labelling_prompt": turns(".."),
                "raw_labelling_response": "..",
                "rating": rating,
                "rationale": "..",
                "status": "tie" if rating[0] == rating[1] else "unchanged",
                "original_chosen": "Good.",
                "original_rejected": "Bad.",
                "chosen_score": 9.0,
                "in_gsm8k_train": False,
            }
            for rating in ([7.0, 9.0], [9.0, 9.0])
        ],
        [group("Q?", ["Good.", "Bad."], **outcome) for outcome in (BETTER, EVEN)],
    ),
    "argilla/distilabel-capybara-dpo-7k-binarized": (
        "ultrafeedback-binarized",
        [
            {
                "source": "Dove",
                "conversation": [{"input": "A?", "output": "A."}, {"input": "B?", "output": "Good."}],
                "original_response": "Good.",
                "generation_prompt": ["<|system|>\n</s>\n<|user|>\nA?</s>"],
                "raw_generation_responses": ["Bad."],
                "new_generations": ["Bad."],
                "prompt": "<|system|>\n</s>\n<|user|>\nA?</s>",
                "chosen": turns("A?", "A.", "B?", "Good."),
                "rejected": turns("A?", "A.", "B?", "Bad."),
                "rating_chosen": 5,
                "rating_rejected": 4,
                "chosen_model": "m",
                "rejected_model": "n",
            }
        ],
        [group(turns("A?", "A.", "B?"), said("Good.", "Bad."), **BETTER)],
    ),
    "RLHFlow, standard": (
        "ultrafeedback-binarized",
        [
            {
                "chosen": turns("Q?", "Good."),
                "chosen_score": 4.75,
                "rejected": turns("Q?", "Bad."),
                "rejected_score": 4.5,
            }
        ],
        [group([user("Q?")], said("Good.", "Bad."), **BETTER)],
    ),
    "mlabonne/orpo-dpo-mix-40k": (
        "dialogue-pairs",
        [
            {
                "source": "s",
                "chosen": turns("Q?", "Good."),
                "rejected": turns("Q?", "Bad."),
                "prompt": "Q?",
                "question": "Q?",
            },
            {
                "source": "s",
                "chosen": [system("Be brief."), *turns("Q?", "Good.")],
                "rejected": [system("Be brief."), *turns("Q?", "Bad.")],
                "prompt": "Q?",
                "question": "Q?",
            },
        ],
        [
            group([user("Q?")], said("Good.", "Bad."), **WON),
            group([system("Be brief."), user("Q?")], said("Good.", "Bad."), **WON),
        ],
    ),
    "allenai/llama-3.1-tulu-3-8b-preference-mixture": (
        "dialogue-pairs",
        [
            {
                "id": "1",
                "prompt": "A?",
                "chosen": turns("A?", "A.", "B?", "Good."),
                "rejected": turns("A?", "A.", "B?", "Bad."),
                "source": "s",
            }
        ],
        [group(turns("A?", "A.", "B?"), said("Good.", "Bad."), **WON)],
    ),
    "a prompt in text beside replies in messages": (
        "dialogue-pairs",
        [{"prompt": "Q?", "chosen": [assistant("Good.")], "rejected": [assistant("Bad.")]}],
        [group([user("Q?")], said("Good.", "Bad."), **WON)],
    ),
    "Skywork/Skywork-Reward-Preference-80K": (
        None,
        [
            {"chosen": turns("Q?", "Good."), "rejected": turns("Q?", "Bad."), "source": "s"},
            {"chosen": turns("Q?", "Same."), "rejected": turns("Q?", "Same."), "source": "s"},
        ],
        [group([user("Q?")], said("Good.", "Bad."), **WON), group([user("Q?")], said("Same.", "Same."), **TIED)],
    ),
    "openbmb/UltraInteract_pair": (
        "sharegpt-pairs",
        [
            {
                "task": "Math_CoT",
                "dataset": "d",
                "trajectory": turns("A?", "A.", "B?", speaker="from", text="value"),
                "chosen": "Good.",
                "rejected": "Bad.",
                "id": "1",
                "parent_id": "0",
            }
        ],
        [group(turns("A?", "A.", "B?"), said("Good.", "Bad."), **WON)],
    ),
    "Intel/orca_dpo_pairs": (
        "instruction-pairs",
        [
            {"system": "Be brief.", "question": "Q?", "chosen": "Good.", "rejected": "Bad."},
            {"system": "", "question": "R?", "chosen": "Good.", "rejected": "Bad."},
        ],
        [
            group([system("Be brief."), user("Q?")], said("Good.", "Bad."), **WON),
            group([user("R?")], said("Good.", "Bad."), **WON),
        ],
    ),
    "LLaMA-Factory, alpaca ranking": (
        "instruction-pairs",
        [
            {
                "instruction": "Sum up.",
                "input": given,
                "chosen": "Good.",
                "rejected": "Bad.",
                "system": "",
                "history": [],
            }
            for given in ("1 and 2", "")
        ],
        [group("Sum up.\n1 and 2", ["Good.", "Bad."], **WON), group("Sum up.", ["Good.", "Bad."], **WON)],
    ),
    "LLaMA-Factory, alpaca ranking with rounds before": (
        "instruction-pairs",
        [
            {
                "instruction": "B?",
                "input": "",
                "chosen": "Good.",
                "rejected": "Bad.",
                "system": "Be brief.",
                "history": [["A?", "A."]],
            }
        ],
        [group([system("Be brief."), *turns("A?", "A.", "B?")], said("Good.", "Bad."), **WON)],
    ),
    "LLaMA-Factory, sharegpt ranking": (
        "sharegpt-pairs",
        [
            {
                "conversations": sharegpt("A?", "A.", "B?"),
                "chosen": {"from": "gpt", "value": "Good."},
                "rejected": {"from": "gpt", "value": "Bad."},
            }
        ],
        [group(turns("A?", "A.", "B?"), said("Good.", "Bad."), **WON)],
    ),
    "axolotl, chat_template.default": (
        "sharegpt-pairs",
        [
            {
                "messages": [system("Be brief."), user("Q?")],
                "chosen": assistant("Good."),
                "rejected": assistant("Bad."),
            }
        ],
        [group([system("Be brief."), user("Q?")], said("Good.", "Bad."), **WON)],
    ),
    "whole dialogues of human and gpt": (
        "dialogue-pairs",
        [{"chosen": sharegpt("Q?", "Good."), "rejected": sharegpt("Q?", "Bad.")}],
        [group([user("Q?")], said("Good.", "Bad."), **WON)],
    ),
    "AI-ModelScope/hh_rlhf_cn": (
        "sharegpt-pairs",
        [
            {
                "context": [{"role": "human", "text": "Q?"}],
                "chosen": {"role": "assistant", "text": "Good."},
                "rejected": {"role": "assistant", "text": "Bad."},
            }
        ],
        [group([user("Q?")], said("Good.", "Bad."), **WON)],
    ),
    "lvwerra/stack-exchange-paired": (
        "instruction-pairs",
        [
            {
                "qid": 1,
                "question": "Q?",
                "date": "2020/01/01",
                "metadata": ["m"],
                "response_j": "Good.",
                "response_k": "Bad.",
            }
        ],
        [group("Q?", ["Good.", "Bad."], **WON)],
    ),
    "distilabel, generations and ratings": (
        "distilabel",
        [
            {
                "instruction": "Q?",
                "generations": ["Best.", "Worst.", "Unrated.", ""],
                "ratings": [5, 1, None, 3],
                "rationales": ["..", "..", "..", ".."],
                "model_name": "m",
            }
        ],
        [group("Q?", ["Best.", "Worst.", "Unrated."], overall=[1.0, 0.0, None])],
    ),
    "openbmb/UltraFeedback": (
        "ultrafeedback",
        [
            {
                "source": "evol_instruct",
                "instruction": "Q?",
                "models": ["a", "b"],
                "completions": [
                    {
                        "annotations": {
                            aspect: {"Rating": rating, "Rationale": ".."}
                            for aspect in ("instruction_following", "honesty", "truthfulness", "helpfulness")
                        },
                        "model": "a",
                        "response": response,
                        "overall_score": 7.5,
                        "fine-grained_score": 4.25,
                    }
                    for response, rating in (("Good.", "5"), ("Bad.", "1"))
                ],
                "correct_answers": ["None"],
                "incorrect_answers": ["None"],
            }
        ],
        [
            group(
                "Q?",
                ["Good.", "Bad."],
                **{key: [1.0, 0.0] for key in ("instruction_following", "honesty", "truthfulness", "helpfulness")},
            )
        ],
    ),
    "trl-lib/tldr-preference and other pairs in plain text": (
        None,
        [
            {"prompt": "Q?", "chosen": "Good.", "rejected": "Bad."},
            {"prompt": "Q?", "chosen": "Same.", "rejected": "Same."},
        ],
        [group("Q?", ["Good.", "Bad."], **WON), group("Q?", ["Same.", "Same."], **TIED)],
    ),
    "jondurbin/truthy-dpo-v0.1": (
        None,
        [
            {"id": "1", "source": "s", "system": "Be brief.", "prompt": "Q?", "chosen": "Good.", "rejected": "Bad."},
            {"id": "2", "source": "s", "system": None, "prompt": "R?", "chosen": "Good.", "rejected": "Bad."},
        ],
        [
            group([system("Be brief."), user("Q?")], said("Good.", "Bad."), **WON),
            group([user("R?")], said("Good.", "Bad."), **WON),
        ],
    ),
}


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("table", [True, False])
def test_every_set_becomes_its_groups(name, table):
    adapter, rows, expected = SETS[name]
    assert to_groups(Dataset.from_list(rows) if table else rows).to_list() == expected
    if adapter:
        assert to_groups(rows, adapter=adapter).to_list() == expected


@pytest.mark.parametrize("name", SETS)
def test_every_set_is_recognised_by_one_adapter_only(name):
    adapter, rows, _ = SETS[name]
    for row in [*rows, *Dataset.from_list(rows)]:
        assert [known.name for known in ADAPTERS if known.recognises(row)] == ([adapter] if adapter else [])


def test_the_help_lists_every_adapter():
    assert tuple(adapter.name for adapter in ADAPTERS) == ADAPTER_NAMES


def test_every_adapter_has_a_set():
    assert {adapter.name for adapter in ADAPTERS} == {adapter for adapter, *_ in SETS.values()} - {None}
