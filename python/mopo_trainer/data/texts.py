"""Text and messages, in the two forms that prompts and responses come in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

Text: TypeAlias = "str | list[dict[str, Any]]"  # plain, or messages {"role", "content"}


def plain_text(text: Text) -> str:
    """Text as it is; of messages their contents, a blank line between them."""
    return text if isinstance(text, str) else "\n\n".join(message["content"] for message in text)


def without_nulls(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages without the keys that a table adds because other messages have them."""
    return [{key: value for key, value in message.items() if value is not None} for message in messages]
