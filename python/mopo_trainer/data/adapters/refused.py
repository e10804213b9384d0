"""Data sets that hold no comparison, and what could be made of them."""

from __future__ import annotations

from collections.abc import Callable

from mopo_trainer.data.adapters.dialogues import Row, is_turns

GROUPED = (
    "put two or more responses to one prompt into one row: prompt, responses, and ratings: {objective: [one each]} "
    "or a scorer"
)
MEDIA = ("image", "images", "video", "videos", "audio", "audios", "image_url", "image_path")


def refusal(row: Row) -> str | None:
    """Why a row that no adapter recognises cannot be compared with anything."""
    return next((reason for fits, reason in REFUSED if fits(row)), None)


def _is_unpaired(row: Row) -> bool:
    return any(isinstance(row.get(column), bool) for column in ("label", "kto_tag"))


def _is_stepwise(row: Row) -> bool:
    return isinstance(row.get("completions"), list) and isinstance(row.get("labels"), list)


def _is_red_team(row: Row) -> bool:
    return isinstance(row.get("transcript"), str)


def _is_tree(row: Row) -> bool:
    return "message_tree_id" in row or ("message_id" in row and "parent_id" in row)


def _is_single(row: Row) -> bool:
    replies = ("completion", "output", "response", "answer", "summary")
    asked = any(
        row.get(column) is not None for column in ("prompt", "instruction", "question", "input", "context", "info")
    )
    return asked and any(isinstance(row.get(column), str) or is_turns(row.get(column)) for column in replies)


def _is_dialogue(row: Row) -> bool:
    return any(is_turns(row.get(column)) for column in ("messages", "conversations", "conversation"))


REFUSED: tuple[tuple[Callable[[Row], bool], str], ...] = (
    (
        _is_unpaired,
        f"one response a row, judged good or bad by itself (the format of KTO), is compared with nothing; {GROUPED}",
    ),
    (_is_stepwise, f"the steps of one response, each judged right or wrong, are not responses to compare; {GROUPED}"),
    (_is_red_team, f"a transcript with a rating of its own is compared with nothing; {GROUPED}"),
    (_is_tree, f"messages of a tree, one a row, do not stand beside the replies they compete with; {GROUPED}"),
    (_is_single, f"one response a row is compared with nothing; {GROUPED}"),
    (_is_dialogue, f"one dialogue a row is compared with nothing; {GROUPED}"),
)
