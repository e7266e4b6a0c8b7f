"""One example: a row of a table as a conversation, however it is said there.

A row is a text, a list of messages, or columns of which one is taken. A conversation ends with the
user's turn, which the model would answer, or with the assistant's, whose tokens then count.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steering_planes.tables import ContrastError, Row, read_table

Conversation = list[dict[str, str]]
"""Messages of {role, content}, as chat templates take them."""

COLUMNS = ("prompt", "instruction", "text", "input", "goal", "question")
"""The first of them that a row has is its text."""

CONVERSATIONS = ("messages", "conversations", "conversation")

# OpenAI's words, and ShareGPT's.
_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
}

_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant): ?")


@dataclass(frozen=True)
class Example:
    """A conversation that ends with the user's turn or the assistant's, and where it stands."""

    conversation: Conversation
    where: str

    @property
    def prompt(self) -> str:
        """The last message's text."""
        return self.conversation[-1]["content"]

    @property
    def has_answer(self) -> bool:
        return self.conversation[-1]["role"] == "assistant"


def load_prompts(path: str | Path) -> list[str]:
    """The prompts of a table, the last message of each row; raises as `read_contrast`."""
    return [example_of(row, None).prompt for row in read_table(path).rows]


def example_of(row: Row, column: str | None) -> Example:
    """A row of one class; raises ContrastError.

    Args:
        column: where its text is; None for the first of `COLUMNS` and `CONVERSATIONS` that it has.
    """
    value = row.value
    if not isinstance(value, dict):
        return finished(messages_of(row, "", value), row)
    if column is None:
        column = next((key for key in (*COLUMNS, *CONVERSATIONS) if key in value), None)
        if column is None:
            known = ", ".join((*COLUMNS, *CONVERSATIONS))
            rule = f"has none of {known}: name the column with the text (--column)"
            raise ContrastError(f"{row.where}: {rule}")
    if column not in value:
        raise ContrastError(f"{row.where}: {column}: is missing")
    return finished(messages_of(row, column, value[column]), row)


def is_transcript(value: Any) -> bool:
    """Whether it is turns of "Human:" and "Assistant:" in one text, as HH-RLHF has them."""
    return isinstance(value, str) and value.lstrip().startswith("Human:")


def messages_of(row: Row, field: str, value: Any) -> Conversation:
    """The messages in a row's field: a text is the user's, or a transcript; a list is of messages,
    in OpenAI's words or ShareGPT's. Raises ContrastError."""
    place = f"{field}." if field else ""
    if is_transcript(value):
        _, *turns = _TURN.split(value.strip())
        value = [
            {"role": "user" if who == "Human" else "assistant", "content": said.strip()}
            for who, said in zip(turns[::2], turns[1::2], strict=True)
        ]
    if field in CONVERSATIONS and isinstance(value, str):
        # As a table of texts has it.
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise ContrastError(f"{row.where}: {field}: must be a list of messages") from None
    if not isinstance(value, list):
        return [text_message(row, place, value)]
    if not value:
        raise ContrastError(f"{row.where}: {place or 'messages '}holds no messages")
    return [_message(row, f"{place}{i}.", message) for i, message in enumerate(value)]


def _message(row: Row, place: str, message: Any) -> dict[str, str]:
    if not isinstance(message, Mapping):
        raise ContrastError(f"{row.where}: {place}: must be a message of role and content")
    said = message.get("role", message.get("from"))
    role = _ROLES.get(said) if isinstance(said, str) else None
    if role is None:
        rule = f"must be one of {', '.join(_ROLES)}, is {said!r}"
        raise ContrastError(f"{row.where}: {place}role: {rule}")
    content = message.get("content", message.get("value"))
    return {"role": role, "content": _content(row, f"{place}content", content)}


def text_message(row: Row, place: str, value: Any) -> dict[str, str]:
    """A text as the user's message; raises ContrastError."""
    return {"role": "user", "content": _content(row, place.rstrip(".") or "text", value)}


def _content(row: Row, field: str, value: Any) -> str:
    """A text, or OpenAI's parts of one."""
    if isinstance(value, list | tuple):
        for i, part in enumerate(value):
            if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
                raise ContrastError(f"{row.where}: {field}.{i}: must be a part of type text")
        value = "\n".join(part["text"] for part in value)
    if not isinstance(value, str) or not value.strip():
        what = "is empty" if isinstance(value, str) else f"must be text, is {type(value).__name__}"
        raise ContrastError(f"{row.where}: {field}: {what}")
    if not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
        raise ContrastError(f"{row.where}: {field}: holds half of a character (a lone surrogate)")
    return value


def finished(conversation: Conversation, row: Row) -> Example:
    """An example of all its messages; raises ContrastError where the last is a system prompt."""
    if conversation[-1]["role"] == "system":
        raise ContrastError(f"{row.where}: the last message must be the user's or the assistant's")
    return Example(conversation, row.where)
