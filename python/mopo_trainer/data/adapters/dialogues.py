"""Dialogues in the notations of public data sets -> messages {"role", "content"}."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mopo_trainer.data.sources import DataError

Row = Mapping[str, Any]
Messages = list[dict[str, Any]]

HH_START = re.compile(r"\s*(Human|Assistant):")
HH_LINE = re.compile(r"\s*\n\s*(?=(?:Human|Assistant):)")
HH_TURN = re.compile(r"\n\n(Human|Assistant):")
STEERLM_TURN = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")
ROLES = {
    **dict.fromkeys(("human", "user", "prompter"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "model", "bot"), "assistant"),
    **dict.fromkeys(("observation", "tool"), "tool"),
    "system": "system",
}
OUR_ROLES = {"user", "assistant", "system"}
SYSTEM_COLUMNS = ("system", "system_prompt", "system_message")
TEXT_COLUMNS = ("chosen", "rejected", "response_0", "response_1")

NO_PROMPT = "no prompt"
EMPTY_PROMPT = "empty prompt"
EMPTY_REPLY = "empty reply"
DIFFERENT_PROMPTS = "dialogues that differ before their last turn"


class Unusable(Exception):
    """Why one row cannot be used; it is left out and counted under this reason."""


def message(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def as_messages(text: Any, role: str) -> Any:
    """Text as one message by `role`; messages as they are."""
    return [message(role, text)] if isinstance(text, str) else text


def is_turns(value: Any) -> bool:
    """Whether `value` is one turn or a list of turns in some notation."""
    turns = [value] if isinstance(value, dict) else value
    return isinstance(turns, list) and bool(turns) and all(isinstance(turn, dict) for turn in turns)


def role_of(turn: Row) -> Any:
    """Who speaks, by the name that chat templates know."""
    return ROLES.get(str(turn.get("role")).lower(), turn.get("role"))


def read_turns(value: Any) -> Messages:
    """One turn or a list of turns, {"role", "content"}, {"from", "value"} or {"role", "text"}, as messages."""
    return [_read_turn(turn) for turn in ([value] if isinstance(value, dict) else value)]


def _read_turn(turn: Row) -> Any:
    if len(turn) == 2 and isinstance(turn.get("content"), str) and turn.get("role") in OUR_ROLES:
        return turn
    speaker = turn.get("role") or turn.get("from")
    role = ROLES.get(str(speaker).lower())
    if turn.get("role") and (turn.get("content") is not None or turn.get("tool_calls")):
        values = {key: value for key, value in turn.items() if value is not None}
        return {**values, "role": role or speaker, "content": _joined(turn.get("content"))}
    if role is None:
        raise Unusable(f"a turn by {speaker!r}")
    return message(role, turn.get("value") or turn.get("text") or turn.get("content") or "")


def _joined(content: Any) -> Any:
    """Content in parts as one text."""
    if not isinstance(content, list):
        return content
    if any(part.get("type", "text") != "text" for part in content):
        raise Unusable("a turn with something else than text")
    return "".join(part["text"] for part in content)


def is_hh_dialogue(text: Any) -> bool:
    """Whether text begins with a turn of Human's or Assistant's and has one of Assistant's."""
    return isinstance(text, str) and HH_START.match(text) is not None and "\nAssistant:" in text


def read_hh_dialogue(text: str) -> Messages:
    """Split "Human: …\n\nAssistant: …" into messages; turns in a row by one speaker become one message."""
    if "\n\nAssistant:" not in text:  # a copy with single or Windows line ends
        text = HH_LINE.sub("\n\n", text)
    parts = HH_TURN.split(text if text.startswith("\n\n") else "\n\n" + text.lstrip())
    messages: Messages = []
    for speaker, said in zip(parts[1::2], parts[2::2], strict=True):
        role = ROLES[speaker.lower()]
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += "\n\n" + said.strip()
        else:
            messages.append(message(role, said.strip()))
    return messages


def is_hh_prompt(text: Any) -> bool:
    """Whether text is a dialogue in which the assistant's reply is to come."""
    if not isinstance(text, str) or not (is_hh_dialogue(text) or text.startswith("\n\nHuman:")):
        return False
    last = read_hh_dialogue(text)[-1]
    return last["role"] == "user" or not last["content"]


def read_hh_prompt(text: str) -> Messages:
    messages = read_hh_dialogue(text)
    return messages if messages[-1]["role"] == "user" else messages[:-1]


def is_steerlm(text: Any) -> bool:
    """Whether text has HelpSteer's marks of turns."""
    return isinstance(text, str) and "<extra_id_1>" in text


def read_steerlm(text: str) -> str | Messages:
    """Split HelpSteer's "…\\n<extra_id_1>Assistant\\n…\\n<extra_id_1>User\\n…"; a single turn stays text."""
    parts = STEERLM_TURN.split(text)
    if len(parts) == 1:
        return text
    speakers = ["user", *(ROLES[speaker.lower()] for speaker in parts[1::2])]
    messages: Messages = [
        message(role, said.strip("\n")) for role, said in zip(speakers, parts[::2], strict=True) if said.strip()
    ]
    return messages[:-1] if messages[-1]["role"] == "assistant" else messages


def is_blank(text: Any) -> bool:
    """Whether text, or all of a list of messages, says nothing."""
    if isinstance(text, str):
        return not text or text.isspace()
    return all(is_blank(turn.get("content")) and not turn.get("tool_calls") for turn in text or ())


def split_dialogues(dialogues: Sequence[Messages]) -> tuple[Messages, list[Messages]]:
    """What all dialogues begin with, and the reply of each: at least its last message, and no turn of the user's."""
    first, *others = dialogues
    shared = 0
    while shared < min(map(len, dialogues)) - 1 and all(other[shared] == first[shared] for other in others):
        shared += 1
    replies = [dialogue[shared:] for dialogue in dialogues]
    for reply in replies:
        if len(reply) > 1 and any(turn["role"] == "user" for turn in reply[:-1]):
            raise Unusable(DIFFERENT_PROMPTS)
        if reply[-1]["role"] != "assistant":
            raise Unusable("a dialogue that does not end with the assistant's reply")
    return first[:shared], replies


def group(prompt: Any, responses: Iterable[Any], **labels: Any) -> dict[str, Any]:
    """A row in the accepted format; where prompt or replies are messages, all of them become messages."""
    responses = list(responses)
    if isinstance(prompt, list) or list in map(type, responses):
        prompt = as_messages(prompt, "user")
        responses = [as_messages(response, "assistant") for response in responses]
    if is_blank(prompt):
        raise Unusable(NO_PROMPT if prompt in (None, []) else EMPTY_PROMPT)
    if any(map(is_blank, responses)):
        raise Unusable(EMPTY_REPLY)
    return {"prompt": prompt, "responses": responses, **labels}


def is_chat(row: Row) -> bool:
    """Whether a row in an accepted format is written in messages."""
    prompt = row.get("prompt", row.get("chosen"))
    return isinstance(prompt, list)


def as_chat(row: Row) -> dict[str, Any]:
    """The row with its text as messages of the user and the assistant."""
    changed = {column: as_messages(row[column], "assistant") for column in TEXT_COLUMNS if row.get(column) is not None}
    if row.get("prompt") is not None:
        changed["prompt"] = as_messages(row["prompt"], "user")
    if isinstance(row.get("responses"), list):
        changed["responses"] = [as_messages(response, "assistant") for response in row["responses"]]
    return {**row, **changed}


def system_of(row: Row) -> str | DataError | None:
    """The text of the column `system`, `system_prompt` or `system_message`; an error for anything else in it."""
    for column in SYSTEM_COLUMNS:
        text = row.get(column)
        if isinstance(text, str) and text.strip():
            return text
        if text and not isinstance(text, str):
            kind = type(text).__name__
            return DataError(f"the column `{column}` holds a {kind}; write text", f"`{column}` is no text")
    return None


def with_system(row: Row, system: str) -> dict[str, Any]:
    """The row in messages that begin with this system message."""
    row = as_chat(row)
    columns = ["prompt"] if row.get("prompt") is not None else [column for column in TEXT_COLUMNS if row.get(column)]
    for column in columns:
        first = row[column][0]
        if first.get("role") != "system":
            row[column] = [message("system", system), *row[column]]
        elif first.get("content") != system:
            raise Unusable("a system column and another system message in the dialogue")
    return row


def replies_to(prompt: Any, responses: list[Any]) -> list[Any]:
    """The responses without the prompt that whole dialogues repeat; the user says nothing in them.

    Raises:
        DataError: a response holds a turn of the user's, which would be trained on as if it were the policy's.
    """
    if not isinstance(prompt, list) or not all(isinstance(response, list) for response in responses):
        return responses
    if all(len(response) > len(prompt) and response[: len(prompt)] == prompt for response in responses):
        responses = [response[len(prompt) :] for response in responses]
    for index, response in enumerate(responses):
        if any(turn["role"] == "user" for turn in response):
            raise DataError(
                f"response {index} holds a turn of the user, which is not the policy's to learn; "
                "write what comes before it in the prompt, the same for all responses, or remove the row"
            )
    return responses
