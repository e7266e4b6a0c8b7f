"""Contrast sets: what to show a model so that a feature is in one class and not in the other.

A JSON file in one of two forms. The same prompts under two system prompts:

    {"positive": {"system": "You are cheerful."}, "negative": {"system": "You are gloomy."},
     "prompts": ["Tell me about the ocean.", ...]}

or two lists of prompts:

    {"positive": {"prompts": [...]}, "negative": {"prompts": [...]}}

Or two JSONL files, a class each, of {"prompt": ...} or {"messages": [{"role": ..., "content": ...},
...]} lines.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

Prompt = Annotated[str, Field(min_length=1)]
Prompts = Annotated[tuple[Prompt, ...], Field(min_length=2)]
Conversation = list[dict[str, str]]
"""Messages of {role, content}, as chat templates take them."""


class ContrastError(ValueError):
    """A contrast set that can't be used, said in one line: file, place in it, and rule."""


@dataclass(frozen=True)
class Example:
    """A conversation that ends with the user's turn, and where it stands, as "a.jsonl:3"."""

    conversation: Conversation
    where: str

    @property
    def prompt(self) -> str:
        """The last message's text."""
        return self.conversation[-1]["content"]


@dataclass(frozen=True)
class Contrast:
    """Two classes of examples, and the files that they are from."""

    positive: tuple[Example, ...]
    negative: tuple[Example, ...]
    files: tuple[Path, ...]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Side(_Model):
    """What sets one class apart: a system prompt, or its own prompts."""

    system: Prompt | None = None
    prompts: Prompts | None = None


class ContrastSet(_Model):
    """Two classes of conversations."""

    positive: Side
    negative: Side
    prompts: Prompts | None = None

    @model_validator(mode="after")
    def _is_of_one_form(self) -> Self:
        sides = (self.positive, self.negative)
        shared = self.prompts is not None
        if any((side.prompts is None) != shared for side in sides):
            raise ValueError("prompts are given once for both sides, or on each side")
        if (self.positive.system is None) != (self.negative.system is None):
            raise ValueError("either both sides have a system prompt or neither has")
        if shared and self.positive.system == self.negative.system:
            raise ValueError("the same prompts need two different system prompts")
        return self

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a contrast set's JSON file; raises ContrastError or OSError."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"])) or "contrast set"
            raise ContrastError(f"{path}: {where}: {first['msg']}") from None

    def positive_prompts(self) -> tuple[str, ...]:
        return self.positive.prompts or self.prompts or ()

    def negative_prompts(self) -> tuple[str, ...]:
        return self.negative.prompts or self.prompts or ()

    def conversations(self) -> tuple[list[Conversation], list[Conversation]]:
        """(positive, negative), each a list of conversations that end with the user's turn."""
        return (
            [_conversation(self.positive.system, text) for text in self.positive_prompts()],
            [_conversation(self.negative.system, text) for text in self.negative_prompts()],
        )


def read_contrast(path: Path) -> Contrast:
    """A contrast set's JSON file as examples; raises ContrastError or OSError."""
    positive, negative = (
        tuple(
            Example(conversation, f"{path}: {side} prompt {number}")
            for number, conversation in enumerate(conversations, 1)
        )
        for side, conversations in zip(
            ("positive", "negative"), ContrastSet.load(path).conversations(), strict=True
        )
    )
    return Contrast(positive, negative, (path,))


def read_classes(positive: Path, negative: Path) -> Contrast:
    """Two JSONL files, a class each; raises ContrastError or OSError."""
    contrast = Contrast(read_examples(positive), read_examples(negative), (positive, negative))
    for path, side in ((positive, contrast.positive), (negative, contrast.negative)):
        if len(side) < 2:
            raise ContrastError(f"{path}: holds {len(side)} prompt: a class needs at least 2")
    return contrast


def read_examples(path: Path) -> tuple[Example, ...]:
    """The examples of a JSONL file; blank lines are passed over.

    Raises ContrastError, naming file, line and rule, or OSError.
    """
    examples = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            examples.append(Example(_Line.model_validate_json(line).conversation(), where))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            field = ".".join(map(str, first["loc"]))
            raise ContrastError(f"{where}: {field + ': ' if field else ''}{first['msg']}") from None
    if not examples:
        raise ContrastError(f"{path}: holds no prompts")
    return tuple(examples)


def load_prompts(path: Path) -> list[str]:
    """The prompts of a JSONL file, the last message of each line; raises as `read_examples`."""
    return [example.prompt for example in read_examples(path)]


class _Message(_Model):
    role: Literal["system", "user", "assistant"]
    content: Prompt


class _Line(_Model):
    prompt: Prompt | None = None
    messages: Annotated[tuple[_Message, ...], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _is_a_prompt_or_messages(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("a line has either a prompt or messages")
        if self.messages is not None and self.messages[-1].role != "user":
            raise ValueError("the last message must be the user's")
        return self

    def conversation(self) -> Conversation:
        if self.messages is None:
            return _conversation(None, self.prompt or "")
        return [{"role": m.role, "content": m.content} for m in self.messages]


def _conversation(system: str | None, user: str) -> Conversation:
    messages = [] if system is None else [{"role": "system", "content": system}]
    return [*messages, {"role": "user", "content": user}]
