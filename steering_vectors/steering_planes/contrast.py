"""Contrasts: what to show a model so that a feature is in one class and not in the other.

In one file of both classes: our own form (`contrast_set`), a table of pairs ({positive, negative},
{chosen, rejected}, ... `PAIRS`; pairs of strings), or one of {text, label}. Or in two tables, a
class each. `tables` says what a table may be, `examples` what a row.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from steering_planes.contrast_set import ContrastSet
from steering_planes.examples import (
    Example,
    example_of,
    finished,
    is_transcript,
    messages_of,
    text_message,
)
from steering_planes.tables import ContrastError, Row, Table, read_table

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
    examples = [tuple(example_of(row, column) for row in table.rows) for table in sides]
    files = tuple(file for table in sides for file in table.files)
    return _checked(Contrast(examples[0], examples[1], files), positive, negative)


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
                    example_of(Row(row, f"{path}: {name} item {number}"), column)
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
        return finished([text_message(row, f"{name}.", value[int(name)])], row)
    if not isinstance(value, dict) or name not in value:
        raise ContrastError(f"{row.where}: {name}: is missing")
    mine, common = value[name], []
    if asked is not None:
        if asked not in value:
            raise ContrastError(f"{row.where}: {asked}: is missing")
        common = messages_of(row, asked, value[asked])
    if isinstance(mine, list) or is_transcript(mine):
        messages = messages_of(row, name, mine)
        if messages[0]["role"] == "assistant":
            messages = [*common, *messages]
    elif common:
        messages = [*common, {**text_message(row, f"{name}.", mine), "role": "assistant"}]
    else:
        messages = [text_message(row, f"{name}.", mine)]
    system = value.get("system")
    if isinstance(system, str) and system.strip() and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    return finished(messages, row)


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
    examples = [example_of(row, column) for row in table.rows]
    positive, negative = (
        tuple(e for e, label in zip(examples, labels, strict=True) if (label == wanted) is side)
        for side in (True, False)
    )
    return _checked(Contrast(positive, negative, table.files), location, location)
