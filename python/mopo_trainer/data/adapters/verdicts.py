"""Data sets of two replies and a verdict on them: which is better, by how much, or a score of each."""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mopo_trainer.data.adapters.dialogues import (
    DIFFERENT_PROMPTS,
    NO_PROMPT,
    Messages,
    Row,
    Unusable,
    group,
    is_steerlm,
    is_turns,
    read_steerlm,
    read_turns,
    split_dialogues,
)
from mopo_trainer.data.adapters.pairs import number

NO_VERDICT = "no verdict"
STRENGTHS = set(range(-3, 4))

FIRST_IS_0: Mapping[Hashable, float] = {0: 1.0, 1: 0.0}
FIRST_IS_1: Mapping[Hashable, float] = {1: 1.0, 2: 0.0}
ONE_IS_FIRST: Mapping[Hashable, float] = {1: 1.0, 0: 0.0}
WINNERS: Mapping[Hashable, float] = {
    "model_a": 1.0,
    "model_b": 0.0,
    **dict.fromkeys(("tie", "tie (bothbad)", "tie(bothbad)", "both_bad", "bothbad"), 0.5),
}


@dataclass(frozen=True)
class Verdict:
    """The columns of a prompt, two replies and, by objective, who won; `outcomes` are the values' P(first wins)."""

    name: str
    columns: tuple[str, str, str]  # prompt, first reply, second reply
    objectives: Mapping[str, str]  # objective: column of the verdict; the last one is what the set is known by
    outcomes: Mapping[Hashable, float] | None  # None: strengths from -3, the first is much better, to 3

    def reads(self, row: Row) -> bool:
        prompt, first, second = map(row.get, self.columns)
        if not (isinstance(first, str) and isinstance(second, str) and (isinstance(prompt, str) or is_turns(prompt))):
            return False
        return any(column in row for column in self.objectives.values())

    def recognises(self, row: Row) -> bool:
        return self.reads(row) and list(self.objectives.values())[-1] in row

    def speaks(self, row: Row) -> bool:
        prompt = row.get(self.columns[0])
        return isinstance(prompt, list) or is_steerlm(prompt)

    def convert(self, row: Row) -> Row:
        prompt, *replies = (row[column] for column in self.columns)
        prompt = read_steerlm(prompt) if isinstance(prompt, str) else read_turns(prompt)
        verdicts = {name: number(row[column]) for name, column in self.objectives.items() if column in row}
        if self.outcomes is None:
            ratings = {name: [-verdict, 0.0] for name, verdict in verdicts.items() if verdict in STRENGTHS}
            if not ratings:
                raise Unusable(NO_VERDICT)
            return group(prompt, replies, ratings=ratings)
        outcomes = {name: self.outcomes.get(verdict) for name, verdict in verdicts.items()}
        if all(outcome is None for outcome in outcomes.values()):
            raise Unusable(NO_VERDICT)
        return group(prompt, replies, preference=outcomes)


PKU = Verdict(
    "pku-saferlhf",
    ("prompt", "response_0", "response_1"),
    {"helpful": "better_response_id", "harmless": "safer_response_id"},
    FIRST_IS_0,
)
SINGLE_DIMENSION = replace(PKU, name="pku-saferlhf-single-dimension", objectives={"preferred": "better_response_id"})
VERDICTS = (
    Verdict(
        "beavertails-v",
        ("question", "response_1", "response_2"),
        {"helpful": "more_helpful_response_id", "harmless": "safer_response_id"},
        FIRST_IS_1,
    ),
    Verdict("align-anything", ("question", "response_1", "response_2"), {"preferred": "overall_response"}, FIRST_IS_1),
    Verdict(
        "helpsteer2-preference", ("prompt", "response_1", "response_2"), {"preferred": "preference_strength"}, None
    ),
    Verdict("helpsteer3", ("context", "response1", "response2"), {"preferred": "overall_preference"}, None),
    Verdict("shp", ("history", "human_ref_A", "human_ref_B"), {"preferred": "labels"}, ONE_IS_FIRST),
)


def is_single_dimension(row: Row) -> bool:
    return SINGLE_DIMENSION.recognises(row) and "safer_response_id" not in row


# --------------------------------------------------------------------------- lmsys, lmarena-ai: two models, one winner


def is_arena(row: Row) -> bool:
    conversations = all(row.get(column) is not None for column in ("conversation_a", "conversation_b"))
    return conversations and "winner" in row


def convert_arena(row: Row) -> Row:
    """Of a conversation the `turn` turns that were judged; the replies before the last one must be the same."""
    first, second = (
        read_turns(json.loads(row[column]) if isinstance(row[column], str) else row[column])
        for column in ("conversation_a", "conversation_b")
    )
    turns = number(row.get("turn"))
    if turns is not None:
        first, second = (_first_turns(conversation, int(turns)) for conversation in (first, second))
    return _battle(row, *split_dialogues([first, second]))


def _first_turns(conversation: Messages, turns: int) -> Messages:
    """The conversation up to the assistant's reply to the user's turn number `turns`."""
    replies = [index for index, turn in enumerate(conversation) if turn["role"] == "assistant"]
    return conversation[: replies[turns - 1] + 1] if 0 < turns <= len(replies) else conversation


def is_arena_responses(row: Row) -> bool:
    texts = all(isinstance(row.get(column), str) for column in ("prompt", "response_a", "response_b"))
    return texts and ("winner" in row or "winner_model_a" in row)


def convert_arena_responses(row: Row) -> Row:
    """Plain text, or the turns of each side as a list written in JSON, of which only single turns are comparable."""
    sides = [_texts(row[column]) for column in ("prompt", "response_a", "response_b")]
    if any(isinstance(side, list) and len(side) > 1 for side in sides):
        raise Unusable(DIFFERENT_PROMPTS)
    prompt, *replies = (side[0] if isinstance(side, list) else side for side in sides)
    return _battle(row, prompt, replies)


def _texts(text: str) -> Any:
    """The list that `text` is in JSON, or `text`."""
    try:
        read = json.loads(text) if text.startswith("[") else text
    except ValueError:
        return text
    return read if isinstance(read, list) and all(isinstance(one, str | None) for one in read) and read else text


def _battle(row: Row, prompt: Any, replies: Sequence[Any]) -> Row:
    if "winner" in row:
        outcome = WINNERS.get(row["winner"])
    else:
        columns = {"winner_model_a": 1.0, "winner_model_b": 0.0, "winner_tie": 0.5}
        outcome = next((probability for column, probability in columns.items() if number(row.get(column)) == 1), None)
    if outcome is None:
        raise Unusable(NO_VERDICT)
    return group(prompt, replies, preference={"preferred": outcome})


# ------------------------------------------------------------------------------------- openai: WebGPT and summaries


def is_webgpt(row: Row) -> bool:
    texts = all(isinstance(row.get(column), str) for column in ("answer_0", "answer_1"))
    return texts and row.get("question") is not None and "score_0" in row and "score_1" in row


def convert_webgpt(row: Row) -> Row:
    """The question alone is the prompt: each answer was written from quotes of its own."""
    question = row["question"]["full_text"] if isinstance(row["question"], dict) else row["question"]
    scores = [number(row["score_0"]), number(row["score_1"])]
    if None in scores:
        raise Unusable(NO_VERDICT)
    return group(question, (row["answer_0"], row["answer_1"]), ratings={"preferred": scores})


def is_summary_comparison(row: Row) -> bool:
    return isinstance(row.get("info"), dict) and is_turns(row.get("summaries")) and "choice" in row


def convert_summary_comparison(row: Row) -> Row:
    """The prompt is OpenAI's: subreddit, title and post, or title and article, then "TL;DR:"."""
    info = row["info"]
    text = f"POST: {info['post']}" if info.get("post") else info.get("article")
    if not text:
        raise Unusable(NO_PROMPT)
    heads = {"SUBREDDIT: r/": info.get("subreddit"), "TITLE: ": info.get("title")}
    prompt = "\n\n".join([*(head + value for head, value in heads.items() if value), text, "TL;DR:"])
    outcome = FIRST_IS_0.get(row["choice"])
    if outcome is None or len(row["summaries"]) != 2:
        raise Unusable(NO_VERDICT)
    return group(prompt, [summary["text"] for summary in row["summaries"]], preference={"preferred": outcome})
