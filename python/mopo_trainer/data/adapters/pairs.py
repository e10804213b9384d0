"""Data sets of chosen and rejected replies, whatever they call them and wherever they keep the prompt."""

from __future__ import annotations

import math
from itertools import chain
from typing import Any

from mopo_trainer.data.adapters.dialogues import (
    NO_PROMPT,
    Messages,
    Row,
    Unusable,
    group,
    is_hh_dialogue,
    is_hh_prompt,
    is_turns,
    message,
    read_hh_dialogue,
    read_hh_prompt,
    read_turns,
    split_dialogues,
)

PAIRS = (("chosen", "rejected"), ("chosen_response", "rejected_response"), ("response_j", "response_k"))
SCORES = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen-avg-rating", "rejected-avg-rating"),
    ("chosen-rating", "rejected-rating"),
    ("chosen_avg_rating", "rejected_avg_rating"),
    ("chosen_rating", "rejected_rating"),
    ("rating_chosen", "rating_rejected"),
)
SCORE_COLUMNS = {column for columns in SCORES for column in columns}
ASKS = {"instruction", "question", "input"}
ASKING = ("user", "human", "prompter", "tool", "observation")
HISTORIES = {"conversations", "trajectory", "context", "messages"}  # turns before the reply


def pair_columns(row: Row) -> tuple[str, str] | None:
    """The columns of the better and the worse reply."""
    for better, worse in PAIRS:
        if row.get(better) is not None and row.get(worse) is not None:
            return better, worse
    return None


def score_columns(row: Row) -> tuple[str, str] | None:
    """The columns of the scores of the better and the worse reply."""
    if SCORE_COLUMNS.isdisjoint(row):
        return None
    return next((pair for pair in SCORES if pair[0] in row and pair[1] in row), None)


def is_scored(row: Row) -> bool:
    return score_columns(row) is not None or rating_list(row) is not None


def is_scored_pair(row: Row) -> bool:
    """chosen and rejected with a score each (HuggingFaceH4/ultrafeedback_binarized, argilla, distilabel, RLHFlow)."""
    return pair_columns(row) is not None and is_scored(row)


def is_sharegpt_pair(row: Row) -> bool:
    """The turns so far in a column of their own (LLaMA-Factory's sharegpt ranking, openbmb/UltraInteract_pair)."""
    pair = pair_columns(row)
    return pair is not None and not is_scored(row) and _history_column(row, row[pair[0]]) is not None


def is_instruction_pair(row: Row) -> bool:
    """Text under other names than prompt, chosen, rejected (Intel/orca_dpo_pairs, LLaMA-Factory's alpaca ranking)."""
    pair = pair_columns(row)
    if pair is None or is_scored(row) or not isinstance(row[pair[0]], str) or _history_column(row, row[pair[0]]):
        return False
    if row.get("prompt") is not None:
        return pair != PAIRS[0] and isinstance(row["prompt"], str)
    return text_prompt(row) is not None


def is_dialogue_pair(row: Row) -> bool:
    """A prompt in text beside replies in messages, the other way round, or turns that are not {"role", "content"}."""
    pair = pair_columns(row)
    if pair is None or is_scored(row) or _history_column(row, row[pair[0]]):
        return False
    chosen = row[pair[0]]
    if isinstance(chosen, str):
        return is_turns(row.get("prompt"))
    if not is_turns(chosen):
        return False
    return isinstance(chosen, dict) or chosen[0].get("content") is None or text_prompt(row) is not None


def is_hh_pair(row: Row) -> bool:
    """Whole dialogues without a prompt (Anthropic/hh-rlhf), or a dialogue as the prompt (Dahoas/full-hh-rlhf)."""
    pair = (row.get("chosen"), row.get("rejected"))
    if is_scored(row) or not all(isinstance(text, str) for text in pair):
        return False
    prompt = row.get("prompt")
    if prompt is not None:
        return is_hh_prompt(prompt) or (isinstance(prompt, str) and all(_begins_with(text, prompt) for text in pair))
    return all(map(is_hh_dialogue, pair)) and text_prompt(row) is None


def _begins_with(text: Any, prompt: str) -> bool:
    """Whether text is a dialogue of which the prompt is the first turn."""
    return is_hh_dialogue(text) and read_hh_dialogue(text)[0]["content"] == prompt.strip()


def speaks(row: Row) -> bool:
    """Whether the pair becomes messages."""
    pair = pair_columns(row)
    written = pair is not None and isinstance(row[pair[0]], str)
    if not written or row.get("history") or is_turns(row.get("prompt")) or is_hh_prompt(row.get("prompt")):
        return True
    return text_prompt(row) is None


def convert_pair(row: Row) -> Row:
    first, second = (row[column] for column in pair_columns(row) or PAIRS[0])
    if isinstance(first, str) != isinstance(second, str):
        raise Unusable("text against messages")
    history = _history_column(row, first)
    context = read_turns(row[history]) if history else _prompt(row)
    if not isinstance(first, str):
        return _labelled(row, *_reply_to(context, *split_dialogues([read_turns(first), read_turns(second)])))
    if is_hh_prompt(row.get("prompt")):
        return _labelled(row, context, [_hh_reply(text, row["prompt"]) for text in (first, second)])
    repeated = isinstance(context, str) and _begins_with(first, context) and _begins_with(second, context)
    if context is not None and not repeated:
        return _labelled(row, context, [first, second])
    if not (is_hh_dialogue(first) and is_hh_dialogue(second)):
        raise Unusable(NO_PROMPT)
    return _labelled(row, *split_dialogues([read_hh_dialogue(first), read_hh_dialogue(second)]))


def _hh_reply(text: str, prompt: str) -> str:
    """The reply alone, without the prompt that whole dialogues repeat and the mark of whose turn it is."""
    return text.strip().removeprefix(prompt.strip()).strip().removeprefix("Assistant:").strip()


def _reply_to(context: str | Messages | None, shared: Messages, replies: list[Messages]) -> tuple[Any, list[Messages]]:
    """The prompt from its own column and from what both dialogues begin with."""
    if isinstance(context, str):
        own = [message("user", context)]
        if all(turn["role"] == "system" for turn in shared):
            return [*shared, *own], replies
        if any(turn.get("content") and _overlap(context, str(turn["content"])) for turn in shared):
            return shared, replies
    elif context is None or shared[: len(context)] == context:
        return shared, replies
    elif not shared or context[-1]["role"] == "system":
        return [*context, *shared], replies
    raise Unusable("a prompt that its dialogues do not begin with")


def _overlap(first: str, second: str) -> bool:
    return first.strip() in second or second.strip() in first


def _history_column(row: Row, reply: Any) -> str | None:
    """The column of the turns up to the user's last; whole dialogues need none, nor do prompts that it leaves out."""
    if HISTORIES.isdisjoint(row) or (isinstance(reply, list) and len(reply) > 1):
        return None
    prompt = text_prompt(row)
    for column in HISTORIES.intersection(row):
        if is_turns(row.get(column)):
            last = row[column][-1]
            asked = last.get("content") or last.get("value") or last.get("text")
            if (last.get("role") or last.get("from")) in ASKING and prompt in (None, asked):
                return column
    return None


def _prompt(row: Row) -> str | Messages | None:
    """The prompt, with the rounds before it in `history` and the data that goes with an instruction in `input`."""
    if is_turns(row.get("prompt")):
        return read_turns(row["prompt"])
    prompt = text_prompt(row)
    if prompt is not None and is_hh_prompt(prompt):
        return read_hh_prompt(prompt)
    if prompt is None or not row.get("history"):
        return prompt
    rounds = [[message("user", said), message("assistant", reply)] for said, reply in row["history"]]
    return [*chain.from_iterable(rounds), message("user", prompt)]


def text_prompt(row: Row) -> str | None:
    """The prompt in text: `instruction` with its `input`, or the one column that asks, if nothing else does."""
    if isinstance(row.get("prompt"), str):
        return row["prompt"]
    if ASKS.isdisjoint(row):
        return None
    instruction, question, given = (row.get(column) for column in ("instruction", "question", "input"))
    if isinstance(row.get("context"), str):
        return None
    if isinstance(instruction, str) and question is None:
        return f"{instruction}\n{given}" if given and instruction else instruction or given
    asked = [text for text in (instruction, question, given) if isinstance(text, str)]
    return asked[0] if len(asked) == 1 else None


def _labelled(row: Row, prompt: Any, replies: list[Any]) -> Row:
    """The pair with its scores as ratings; without scores the first reply wins."""
    scores = _scores(row)
    if scores is None:
        pair = group(prompt, replies)
        return {"prompt": pair["prompt"], "chosen": pair["responses"][0], "rejected": pair["responses"][1]}
    if None in scores:
        return group(prompt, replies, comparisons={"overall": [[0, 1, 1.0]]})
    if scores[0] < scores[1]:
        raise Unusable("a rejected reply of the higher score")
    return group(prompt, replies, ratings={"overall": list(scores)})


def _scores(row: Row) -> tuple[Any, Any] | None:
    """The scores of the better and the worse reply; a list of ratings is in another order than they are."""
    if row.get("status") == "tie":
        return 0.0, 0.0
    columns = score_columns(row)
    if columns:
        return number(row[columns[0]]), number(row[columns[1]])
    ratings = rating_list(row)
    if ratings is None or len(ratings) != 2 or None in ratings:
        return None if ratings is None else (None, None)
    return max(ratings), min(ratings)


def rating_list(row: Row) -> list[Any] | None:
    """distilabel's ratings of the generations, in their order."""
    ratings = row["ratings"] if row.get("ratings") is not None else row.get("rating")
    return [number(rating) for rating in ratings] if isinstance(ratings, list) else None


def number(value: Any) -> float | None:
    """A finite number, also one written as text; None for anything else ("N/A", NaN, null)."""
    try:
        read = float(value)
    except (TypeError, ValueError):
        return None
    return read if math.isfinite(read) else None
