"""Both classes in one JSON file, in the form of our own.

{"positive": {"system": "You are cheerful."}, "negative": {"system": "You are gloomy."},
 "prompts": ["Tell me about the ocean.", ...]}
{"positive": {"prompts": [...]}, "negative": {"prompts": [...]}}
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from steering_planes.examples import Conversation
from steering_planes.tables import ContrastError

Prompt = Annotated[str, Field(min_length=1)]
Prompts = Annotated[tuple[Prompt, ...], Field(min_length=2)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Side(_Model):
    """What sets one class apart: a system prompt, or its own prompts."""

    system: Prompt | None = None
    prompts: Prompts | None = None


class ContrastSet(_Model):
    """Two classes of conversations, in the form of our own."""

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
    def of(cls, path: Path, value: Any) -> Self:
        """From what a file holds; raises ContrastError."""
        try:
            # Of JSON's values: a list is a tuple there, and nothing else is anything else.
            return cls.model_validate(value, strict=False)
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
            [_turns(self.positive.system, text) for text in self.positive_prompts()],
            [_turns(self.negative.system, text) for text in self.negative_prompts()],
        )


def _turns(system: str | None, user: str) -> Conversation:
    messages = [] if system is None else [{"role": "system", "content": system}]
    return [*messages, {"role": "user", "content": user}]
