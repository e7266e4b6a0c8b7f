"""Contrast sets: what to show a model so that a feature is in one class and not in the other.

One file of both classes, in JSON:

    {"positive": {"system": "You are cheerful."}, "negative": {"system": "You are gloomy."},
     "prompts": ["Tell me about the ocean.", ...]}
    {"positive": {"prompts": [...]}, "negative": {"prompts": [...]}}

or a table of pairs ({positive, negative}, {chosen, rejected}, ... `PAIRS`; pairs of strings), or
one of {text, label}. Or two tables, a class each. `tables` says what a table may be; a row is a
text, a list of messages, or columns of which one is taken.

An example ends with the user's turn, which the model would answer, or with the assistant's, whose
tokens then count.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from steering_planes.tables import ContrastError, Row, Table, read_table

Prompt = Annotated[str, Field(min_length=1)]
Prompts = Annotated[tuple[Prompt, ...], Field(min_length=2)]
Conversation = list[dict[str, str]]
"""Messages of {role, content}, as chat templates take them."""

COLUMNS = ("prompt", "instruction", "text", "input", "goal", "question")
"""The first of them that a row has is its text."""

CONVERSATIONS = ("messages", "conversations", "conversation")

CONTEXT = ("prompt", "question", "instruction", "input")
"""What both sides of a pair answer: the first that a table's first row has."""

PAIRS = (
    ("positive", "negative"),
    ("pos", "neg"),
    ("harmful", "harmless"),
    ("chosen", "rejected"),
    ("answer_matching_behavior", "answer_not_matching_behavior"),
)
"""Columns of the positive and of the negative side."""

LABELS = ({"1", "0"}, {"true", "false"}, {"positive", "negative"}, {"pos", "neg"},
          {"harmful", "harmless"}, {"yes", "no"})  # fmt: skip
_POSITIVE = ("1", "true", "positive", "pos", "harmful", "yes")

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


@dataclass(frozen=True)
class Contrast:
    """Two classes of examples, and the files that they are from.

    paired: the n-th of one class belongs to the n-th of the other.
    changes: what was done to the files' examples, in words.
    seed: of the draw, where they were sampled.
    """

    positive: tuple[Example, ...]
    negative: tuple[Example, ...]
    files: tuple[Path, ...]
    paired: bool = False
    changes: tuple[str, ...] = ()
    seed: int | None = None

    def sampled(self, samples: int, seed: int) -> Self:
        """As many examples of each class, drawn at random; pairs stay together.

        Raises ContrastError where a class has fewer.
        """
        least = min(len(self.positive), len(self.negative))
        if not 2 <= samples <= least:
            where = ", ".join(map(str, self.files))
            raise ContrastError(f"{where}: samples={samples}: must be 2 to {least}, the classes' n")
        rng = random.Random(seed)  # noqa: S311
        drawn = sorted(rng.sample(range(len(self.positive)), samples))
        other = drawn if self.paired else sorted(rng.sample(range(len(self.negative)), samples))
        return replace(
            self,
            positive=tuple(self.positive[i] for i in drawn),
            negative=tuple(self.negative[i] for i in other),
            changes=(*self.changes, f"{samples} of {len(self.positive)} and {len(self.negative)}"),
            seed=seed,
        )

    def under(self, system: str) -> Self:
        """With this system prompt in both classes; raises ContrastError where one is already."""

        def with_system(example: Example) -> Example:
            if example.conversation[0]["role"] == "system":
                raise ContrastError(f"{example.where}: has a system prompt already")
            message = {"role": "system", "content": system}
            return replace(example, conversation=[message, *example.conversation])

        return replace(
            self,
            positive=tuple(map(with_system, self.positive)),
            negative=tuple(map(with_system, self.negative)),
            changes=(*self.changes, f"system prompt {system!r}"),
        )


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
    def load(cls, path: Path) -> Self:
        """Read a contrast set's JSON file; raises ContrastError."""
        return cls.of(path, _whole(path))

    @classmethod
    def of(cls, path: Path, value: Any) -> Self:
        """From what the file holds."""
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


def read_contrast(
    location: str | Path, *, column: str | None = None, positive_label: str | None = None
) -> Contrast:
    """One file of both classes as examples.

    Args:
        location: a file, or ``hf://datasets/organisation/name[@revision]:split``.
        column: where a row's text is; of pairs the two sides, with a comma.
        positive_label: of a table of {text, label}, the label of the positive class.

    Raises:
        ContrastError: naming file, place in it and rule.
    """
    if str(location).endswith(".json"):
        value = _whole(Path(location))
        if isinstance(value, dict) and isinstance(value.get("positive"), dict):
            return _of_our_form(Path(location), ContrastSet.of(Path(location), value))
        if isinstance(value, dict) and (found := _lists(Path(location), value, column)):
            if positive_label is not None:
                raise ContrastError(f"{location}: has an array of each class, and no labels")
            return _checked(found, location, location)
    table = read_table(location)
    sides = _sides(table, column, positive_label)
    if sides is None:
        return _labelled(location, table, column, positive_label)
    first = table.rows[0].value
    asked = [
        key for key in CONTEXT if isinstance(first, dict) and key in first and key not in sides
    ]
    positive, negative = (
        tuple(_side(row, name, asked[0] if asked else None) for row in table.rows) for name in sides
    )
    return _checked(Contrast(positive, negative, table.files, paired=True), location, location)


def read_classes(
    positive: str | Path, negative: str | Path, *, column: str | None = None
) -> Contrast:
    """Two tables, a class each; raises as :func:`read_contrast`."""
    sides = [read_table(location) for location in (positive, negative)]
    examples = [tuple(_example(row, column) for row in table.rows) for table in sides]
    files = tuple(file for table in sides for file in table.files)
    return _checked(Contrast(examples[0], examples[1], files), positive, negative)


def load_prompts(path: str | Path) -> list[str]:
    """The prompts of a table, the last message of each row; raises as `read_contrast`."""
    return [_example(row, None).prompt for row in read_table(path).rows]


def _whole(path: Path) -> Any:
    """What a JSON file holds; None where that is more than one value, or none."""
    try:
        return json.loads(path.read_bytes().decode("utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        return None  # the table's reader says it, with the place


def _checked(contrast: Contrast, positive: str | Path, negative: str | Path) -> Contrast:
    for location, side in ((positive, contrast.positive), (negative, contrast.negative)):
        if len(side) < 2:
            raise ContrastError(f"{location}: holds {len(side)} prompt: a class needs at least 2")
    answers = [
        {example.has_answer for example in side} for side in (contrast.positive, contrast.negative)
    ]
    if answers in ([{True}, {False}], [{False}, {True}]):
        one, other = contrast.positive[0].where, contrast.negative[0].where
        rule = (
            "one class ends with answers, the other with prompts: their last tokens say only that"
        )
        raise ContrastError(f"{one}, {other}: {rule}")
    return contrast


def _of_our_form(path: Path, found: ContrastSet) -> Contrast:
    positive, negative = (
        tuple(
            Example(conversation, f"{path}: {side} prompt {number}")
            for number, conversation in enumerate(conversations, 1)
        )
        for side, conversations in zip(("positive", "negative"), found.conversations(), strict=True)
    )
    return Contrast(positive, negative, (path,), paired=found.prompts is not None)


# Tables of both classes.


def _lists(path: Path, value: Mapping[str, Any], column: str | None) -> Contrast | None:
    """A JSON object with an array of each class; None of another."""
    for names in PAIRS:
        if all(isinstance(value.get(name), list) for name in names):
            positive, negative = (
                tuple(
                    _example(Row(row, f"{path}: {name} item {number}"), column)
                    for number, row in enumerate(value[name], 1)
                )
                for name in names
            )
            return Contrast(positive, negative, (path,))
    return None


def _sides(table: Table, column: str | None, positive_label: str | None) -> tuple[str, str] | None:
    """The columns of the two sides; None of a table with labels."""
    first = table.rows[0]
    if column is not None and "," in column:
        positive, _, negative = column.partition(",")
        return positive.strip(), negative.strip()
    if column is not None or positive_label is not None:
        return None
    if isinstance(first.value, list) and len(first.value) == 2:
        return "0", "1"
    if isinstance(first.value, dict):
        return next((pair for pair in PAIRS if set(pair) <= first.value.keys()), None)
    return None


def _side(row: Row, name: str, asked: str | None) -> Example:
    """One side of a pair: a text, messages, or the answer to what both sides are asked."""
    value = row.value
    if isinstance(value, list) and len(value) == 2 and name in ("0", "1"):
        return _finished([_text_message(row, f"{name}.", value[int(name)])], row)
    if not isinstance(value, dict) or name not in value:
        raise ContrastError(f"{row.where}: {name}: is missing")
    mine, common = value[name], []
    if asked is not None:
        if asked not in value:
            raise ContrastError(f"{row.where}: {asked}: is missing")
        common = _messages(row, asked, value[asked])
    if isinstance(mine, list) or _is_transcript(mine):
        messages = _messages(row, name, mine)
        if messages[0]["role"] == "assistant":
            messages = [*common, *messages]
    elif common:
        messages = [*common, {**_text_message(row, f"{name}.", mine), "role": "assistant"}]
    else:
        messages = [_text_message(row, f"{name}.", mine)]
    system = value.get("system")
    if isinstance(system, str) and system.strip() and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    return _finished(messages, row)


def _labelled(
    location: str | Path, table: Table, column: str | None, positive_label: str | None
) -> Contrast:
    """A table of texts with a label each."""
    labels = []
    for row in table.rows:
        if not isinstance(row.value, dict) or "label" not in row.value:
            pairs = ", ".join(f"{a} and {b}" for a, b in PAIRS)
            rule = f"has no two sides ({pairs}; or --column A,B) and no label"
            raise ContrastError(f"{row.where}: {rule}")
        label = row.value["label"]
        if isinstance(label, float) and label.is_integer():
            label = int(label)  # as pandas writes a column that once had a gap
        labels.append(str(label).strip().lower())
    distinct = sorted(set(labels))
    if len(distinct) != 2:
        shown = ", ".join(distinct[:6]) + (", …" if len(distinct) > 6 else "")
        raise ContrastError(
            f"{location}: label: has {len(distinct)} classes ({shown}): must be two"
        )
    wanted = None if positive_label is None else positive_label.strip().lower()
    if wanted is None and set(distinct) in LABELS:
        wanted = next(label for label in distinct if label in _POSITIVE)
    if wanted not in distinct:
        rule = f"which is the positive class, {distinct[0]} or {distinct[1]}? (--positive-label)"
        raise ContrastError(f"{location}: label: {rule}")
    examples = [_example(row, column) for row in table.rows]
    positive, negative = (
        tuple(e for e, label in zip(examples, labels, strict=True) if (label == wanted) is side)
        for side in (True, False)
    )
    return _checked(Contrast(positive, negative, table.files), location, location)


# A row of one class.


def _example(row: Row, column: str | None) -> Example:
    value = row.value
    if not isinstance(value, dict):
        return _finished(_messages(row, "", value), row)
    if column is None:
        column = next((key for key in (*COLUMNS, *CONVERSATIONS) if key in value), None)
        if column is None:
            known = ", ".join((*COLUMNS, *CONVERSATIONS))
            rule = f"has none of {known}: name the column with the text (--column)"
            raise ContrastError(f"{row.where}: {rule}")
    if column not in value:
        raise ContrastError(f"{row.where}: {column}: is missing")
    return _finished(_messages(row, column, value[column]), row)


_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant): ?")


def _is_transcript(value: Any) -> bool:
    return isinstance(value, str) and value.lstrip().startswith("Human:")


def _messages(row: Row, field: str, value: Any) -> Conversation:
    """A text is the user's, or a transcript of "Human:" and "Assistant:" (HH-RLHF); a list is of
    messages, in OpenAI's words or ShareGPT's."""
    place = f"{field}." if field else ""
    if _is_transcript(value):
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
        return [_text_message(row, place, value)]
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


def _text_message(row: Row, place: str, value: Any) -> dict[str, str]:
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


def _finished(conversation: Conversation, row: Row) -> Example:
    if conversation[-1]["role"] == "system":
        raise ContrastError(f"{row.where}: the last message must be the user's or the assistant's")
    return Example(conversation, row.where)


def _turns(system: str | None, user: str) -> Conversation:
    messages = [] if system is None else [{"role": "system", "content": system}]
    return [*messages, {"role": "user", "content": user}]
