"""Contrast sets: what to show a model so that a feature is in one class and not in the other.

A JSON file in one of two forms. The same prompts under two system prompts:

    {"positive": {"system": "You are cheerful."}, "negative": {"system": "You are gloomy."},
     "prompts": ["Tell me about the ocean.", ...]}

or two lists of prompts:

    {"positive": {"prompts": [...]}, "negative": {"prompts": [...]}}
"""

from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

Prompt = Annotated[str, Field(min_length=1)]
Prompts = Annotated[tuple[Prompt, ...], Field(min_length=2)]
Conversation = list[dict[str, str]]
"""Messages of {role, content}, as chat templates take them."""


class ContrastSetError(ValueError):
    """A contrast set that can't be used, said in one line."""


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
        """Read a contrast set's JSON file; raises ContrastSetError or OSError."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"])) or "contrast set"
            raise ContrastSetError(f"{path}: {where}: {first['msg']}") from None

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


def load_prompts(path: Path) -> list[str]:
    """The prompts of a JSONL file of {"prompt": ...} lines; raises ContrastSetError or OSError."""
    prompts = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        try:
            prompts.append(_Line.model_validate_json(line).prompt)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]["msg"]
            raise ContrastSetError(f"{path}:{number}: {first}") from None
    if not prompts:
        raise ContrastSetError(f"{path}: holds no prompts")
    return prompts


class _Line(_Model):
    prompt: Prompt


def _conversation(system: str | None, user: str) -> Conversation:
    messages = [] if system is None else [{"role": "system", "content": system}]
    return [*messages, {"role": "user", "content": user}]
