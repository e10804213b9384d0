"""Public preference data sets recognised by their columns and rewritten as rows that `mopo_trainer.data` accepts.

To add one: write a generator that yields, for every group, the index of the row it came from and either a row in one of
the accepted formats or the reason why it cannot be used; then list it in ADAPTERS.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from mopo_trainer.data.sources import DataError

Row = Mapping[str, Any]
Adapted = Iterator[tuple[int, Row | str]]  # (row index, row in an accepted format | why it is left out)

TURN = re.compile(r"\n\n(Human|Assistant):")
ROLES = {"Human": "user", "Assistant": "assistant"}
EMPTY_REPLY = "empty reply"
DIFFERENT_PROMPTS = "dialogues that differ before their last turn"
HELPSTEER_RATINGS = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")


@dataclass(frozen=True)
class Adapter:
    """One data set: `recognises` looks at the first row, `convert` rewrites all of them."""

    name: str
    recognises: Callable[[Row], bool]
    convert: Callable[[Iterable[Row]], Adapted]


def adapt(rows: list[Row], adapter: str | None = None) -> Adapted:
    """Rewrite `rows` by the adapter of that name; by the one that recognises the first row if None; "none" keeps them.

    Raises:
        DataError: no adapter of that name, or a row that does not have the columns it needs.
    """
    if adapter == "none":
        return enumerate(rows)
    names = [known.name for known in ADAPTERS]
    if adapter is not None and adapter not in names:
        raise DataError(f"adapter={adapter!r}: no such adapter; give one of {', '.join(names)}, none")
    matching = [known for known in ADAPTERS if adapter == known.name or (adapter is None and known.recognises(rows[0]))]
    return matching[0].convert(_checked(rows, matching[0])) if matching else enumerate(rows)


def _checked(rows: list[Row], adapter: Adapter) -> Iterator[Row]:
    for index, row in enumerate(rows):
        if not adapter.recognises(row):
            given = ", ".join(column for column in row if has(row, column))
            raise DataError(
                f"row {index}: columns {given} are not those of {adapter.name}; "
                f"give adapter='none' if the data only looks like {adapter.name}, or mend the row"
            )
        yield row


def has(row: Row, *columns: str) -> bool:
    """Whether every one of `columns` holds a value in this row."""
    return all(row.get(column) is not None for column in columns)


def labelled(row: Row) -> bool:
    """Whether the row has labels in a format of ours, so that no adapter should touch it."""
    return any(has(row, column) for column in ("preference", "ratings", "comparisons", "win_rate"))


# -------------------------------------------------------------------- Anthropic/hh-rlhf: whole dialogues, no prompt


def is_hh_rlhf(row: Row) -> bool:
    dialogues = (row.get("chosen"), row.get("rejected"))
    texts = all(isinstance(dialogue, str) and "\n\nAssistant:" in dialogue for dialogue in dialogues)
    return texts and not has(row, "prompt") and not labelled(row)


def convert_hh_rlhf(rows: Iterable[Row]) -> Adapted:
    """Dialogues that share all but the last assistant turn: the prompt is the shared turns, as messages."""
    for index, row in enumerate(rows):
        chosen, rejected = (dialogue_messages(row[column]) for column in ("chosen", "rejected"))
        if chosen[:-1] != rejected[:-1] or not chosen[-1]["role"] == rejected[-1]["role"] == "assistant":
            yield index, DIFFERENT_PROMPTS
        elif not chosen[-1]["content"] or not rejected[-1]["content"]:
            yield index, EMPTY_REPLY
        else:
            yield index, {"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]}


def dialogue_messages(dialogue: str) -> list[dict[str, str]]:
    """Split "\\n\\nHuman: …\\n\\nAssistant: …" into messages; turns in a row by one speaker become one message."""
    parts = TURN.split(dialogue)
    messages: list[dict[str, str]] = []
    for speaker, text in zip(parts[1::2], parts[2::2], strict=True):
        if messages and messages[-1]["role"] == ROLES[speaker]:
            messages[-1]["content"] += "\n\n" + text.strip()
        else:
            messages.append({"role": ROLES[speaker], "content": text.strip()})
    return messages


# ------------------------------------------------------------- PKU-Alignment/PKU-SafeRLHF: helpful and harmless pairs


def is_pku_saferlhf(row: Row) -> bool:
    voted = has(row, "better_response_id") or has(row, "safer_response_id")
    return voted and has(row, "prompt", "response_0", "response_1") and not labelled(row)


def convert_pku_saferlhf(rows: Iterable[Row]) -> Adapted:
    """`better_response_id` names the more helpful response, `safer_response_id` the more harmless one."""
    for index, row in enumerate(rows):
        votes = {"helpful": row.get("better_response_id"), "harmless": row.get("safer_response_id")}
        preference = {name: None if vote is None else 1.0 - vote for name, vote in votes.items()}
        responses = {column: row[column] for column in ("response_0", "response_1")}
        if all(text and text.strip() for text in responses.values()):
            yield index, {"prompt": row["prompt"], **responses, "preference": preference}
        else:
            yield index, EMPTY_REPLY


# --------------------------------------------------------- openbmb/UltraFeedback: completions rated 1 to 5 by GPT-4


def is_ultrafeedback(row: Row) -> bool:
    return has(row, "instruction", "completions") and not labelled(row)


def convert_ultrafeedback(rows: Iterable[Row]) -> Adapted:
    """Four ratings a completion, written as text; "N/A" is unrated."""
    aspects = ("instruction_following", "honesty", "truthfulness", "helpfulness")
    for index, row in enumerate(rows):
        completions = [completion for completion in row["completions"] if (completion["response"] or "").strip()]
        annotations = [completion["annotations"] or {} for completion in completions]
        ratings = {aspect: [aspect_rating(given.get(aspect)) for given in annotations] for aspect in aspects}
        if len(completions) < 2:
            yield index, "fewer than two completions"
        else:
            responses = [completion["response"] for completion in completions]
            yield index, {"prompt": row["instruction"], "responses": responses, "ratings": ratings}


def aspect_rating(annotation: Row | None) -> float | None:
    try:
        return float((annotation or {})["Rating"])
    except (KeyError, TypeError, ValueError):
        return None


# ------------------------------------------- HuggingFaceH4/ultrafeedback_binarized: the prompt is also the first turn


def is_ultrafeedback_binarized(row: Row) -> bool:
    return has(row, "chosen", "rejected", "score_chosen", "score_rejected") and not labelled(row)


def convert_ultrafeedback_binarized(rows: Iterable[Row]) -> Adapted:
    """Two dialogues and their overall scores; equal scores are a tie."""
    for index, row in enumerate(rows):
        chosen, rejected = row["chosen"], row["rejected"]
        if chosen[:-1] != rejected[:-1]:
            yield index, DIFFERENT_PROMPTS
        elif not chosen[-1]["content"].strip() or not rejected[-1]["content"].strip():
            yield index, EMPTY_REPLY
        else:
            ratings = {"overall": [row["score_chosen"], row["score_rejected"]]}
            yield index, {"prompt": chosen[:-1], "responses": [chosen[-1:], rejected[-1:]], "ratings": ratings}


# ------------------------------------------ nvidia/HelpSteer, HelpSteer2: one response a row, rows of a prompt adjacent


def is_helpsteer(row: Row) -> bool:
    return has(row, "prompt", "response", *HELPSTEER_RATINGS) and not labelled(row)


def convert_helpsteer(rows: Iterable[Row]) -> Adapted:
    """Adjacent rows of one prompt make a group; the five ratings run from 0 to 4."""
    for prompt, numbered in groupby(enumerate(rows), key=lambda item: item[1]["prompt"]):
        indices, answers = zip(*numbered, strict=True)
        answers = tuple(row for row in answers if (row["response"] or "").strip())
        if len(answers) < 2:
            yield indices[0], "a prompt with fewer than two responses"
        else:
            ratings = {name: [row[name] for row in answers] for name in HELPSTEER_RATINGS}
            yield indices[0], {"prompt": prompt, "responses": [row["response"] for row in answers], "ratings": ratings}


ADAPTERS = (
    Adapter("hh-rlhf", is_hh_rlhf, convert_hh_rlhf),
    Adapter("pku-saferlhf", is_pku_saferlhf, convert_pku_saferlhf),
    Adapter("ultrafeedback", is_ultrafeedback, convert_ultrafeedback),
    Adapter("ultrafeedback-binarized", is_ultrafeedback_binarized, convert_ultrafeedback_binarized),
    Adapter("helpsteer", is_helpsteer, convert_helpsteer),
)
