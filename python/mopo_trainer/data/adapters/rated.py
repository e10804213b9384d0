"""Data sets of several rated or ranked replies to a prompt, in one row or in one row each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mopo_trainer.data.adapters.dialogues import (
    Row,
    Unusable,
    group,
    is_blank,
    is_hh_prompt,
    is_steerlm,
    is_turns,
    read_hh_prompt,
    read_steerlm,
)
from mopo_trainer.data.adapters.pairs import number, pair_columns, rating_list, text_prompt

ASPECTS = ("instruction_following", "honesty", "truthfulness", "helpfulness")
HELPSTEER_RATINGS = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
FEW_COMPLETIONS = "fewer than two completions"
FEW_RESPONSES = "a prompt with fewer than two responses"


def rated_group(prompt: Any, replies: list[Any], ratings: Mapping[str, list[Any]], few: str) -> Row:
    """A group of the replies that say something, with their ratings; None is unrated."""
    kept = [index for index, reply in enumerate(replies) if not is_blank(reply)]
    if len(kept) < 2:
        raise Unusable(few)
    by_name = {name: [values[index] for index in kept] for name, values in ratings.items()}
    if all(len(kept) - values.count(None) < 2 for values in by_name.values()):
        raise Unusable("fewer than two ratings")
    return group(prompt, [replies[index] for index in kept], ratings=by_name)


def is_dialogue(row: Row) -> bool:
    """Whether the prompt in text is a dialogue of several turns."""
    return is_steerlm(row.get("prompt")) or is_hh_prompt(row.get("prompt"))


# --------------------------------------------------------- openbmb/UltraFeedback: completions rated 1 to 5 by GPT-4


def is_ultrafeedback(row: Row) -> bool:
    completions = row.get("completions")
    return isinstance(row.get("instruction"), str) and isinstance(completions, list) and is_turns(completions or [{}])


def convert_ultrafeedback(row: Row) -> Row:
    """Four ratings a completion, written as text; "N/A" is unrated."""
    completions = row["completions"]
    given = [completion["annotations"] or {} for completion in completions]
    ratings = {aspect: [number((rated.get(aspect) or {}).get("Rating")) for rated in given] for aspect in ASPECTS}
    return rated_group(
        row["instruction"], [completion["response"] for completion in completions], ratings, FEW_COMPLETIONS
    )


# ------------------------------------------------------------ distilabel: generations beside a list of their ratings


def is_distilabel(row: Row) -> bool:
    generations = row.get("generations")
    texts = isinstance(generations, list) and all(isinstance(text, str | None) for text in generations)
    return texts and pair_columns(row) is None and rating_list(row) is not None and text_prompt(row) is not None


def convert_distilabel(row: Row) -> Row:
    ratings = rating_list(row) or []
    if len(ratings) != len(row["generations"]):
        raise Unusable("another number of ratings than of generations")
    return rated_group(text_prompt(row), row["generations"], {"overall": ratings}, FEW_COMPLETIONS)


# ------------------------------------------------------------------------ berkeley-nest/Nectar: seven ranked answers


def is_nectar(row: Row) -> bool:
    answers = row.get("answers")
    return (
        isinstance(row.get("prompt"), str)
        and is_turns(answers)
        and all("answer" in answer and "rank" in answer for answer in answers or [])
    )


def convert_nectar(row: Row) -> Row:
    """Rank 1 is the best answer; an answer without a rank is compared with none."""
    ranks = [number(answer["rank"]) for answer in row["answers"]]
    ratings = {"preferred": [None if rank is None else -rank for rank in ranks]}
    prompt = read_hh_prompt(row["prompt"]) if is_hh_prompt(row["prompt"]) else row["prompt"]
    return rated_group(prompt, [answer["answer"] for answer in row["answers"]], ratings, "fewer than two answers")


# ------------------------------------------------------------- nvidia/HelpSteer, HelpSteer2: one rated response a row


def is_helpsteer(row: Row) -> bool:
    texts = isinstance(row.get("prompt"), str) and "response" in row
    return texts and all(name in row for name in HELPSTEER_RATINGS)


def convert_helpsteer(rows: list[Row]) -> Row:
    """The five ratings run from 0 to 4."""
    ratings = {name: [number(row[name]) for row in rows] for name in HELPSTEER_RATINGS}
    return rated_group(read_steerlm(rows[0]["prompt"]), [row["response"] for row in rows], ratings, FEW_RESPONSES)


# ------------------------------------------------ PKU-Alignment/BeaverTails: one response a row, judged safe or unsafe


def is_beavertails(row: Row) -> bool:
    return isinstance(row.get("prompt"), str) and "response" in row and isinstance(row.get("is_safe"), bool)


def convert_beavertails(rows: list[Row]) -> Row:
    ratings = {"harmless": [number(row["is_safe"]) for row in rows]}
    return rated_group(rows[0]["prompt"], [row["response"] for row in rows], ratings, FEW_RESPONSES)
