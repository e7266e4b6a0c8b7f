"""Which of a request's tokens are steered."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

WORDS = ("all", "prompt", "generated")
PARTS = ("prompt", "generated")
LAST = 1 << 62
"""A position that no token reaches."""

Part = tuple[int, int | None]
"""Start and stop as Python's slices have them; None is an open end."""

_WHOLE: Part = (0, None)
_SLICE = re.compile(r"(prompt|generated)\[(-?[0-9]{1,18}|):(-?[0-9]{1,18}|)\]")


@dataclass(frozen=True)
class Window:
    """A part of the prompt, a part of the generated tokens, or both; None is nothing of it.

    Negative positions of the prompt count from its end.
    """

    prompt: Part | None
    generated: Part | None

    def spans(self, prompt_tokens: int) -> tuple[tuple[int, int], ...]:
        """Positions [start, stop) of a request whose prompt is so long, in order and apart."""
        spans = []
        if self.prompt is not None:
            start, stop, _ = slice(*self.prompt).indices(prompt_tokens)
            spans.append((start, stop))
        if self.generated is not None:
            start, end = self.generated
            spans.append((prompt_tokens + start, LAST if end is None else prompt_tokens + end))
        spans = [(start, stop) for start, stop in spans if start < stop]
        if len(spans) == 2 and spans[0][1] == spans[1][0]:
            spans = [(spans[0][0], spans[1][1])]
        return tuple(spans)

    def count(self, prompt_tokens: int, generated_tokens: int) -> tuple[int, int]:
        """How many of so many tokens are within: of the prompt, and generated."""
        end = prompt_tokens + generated_tokens
        within = [0, 0]
        for start, stop in self.spans(prompt_tokens):
            within[0] += max(0, min(stop, prompt_tokens) - start)
            within[1] += max(0, min(stop, end) - max(start, prompt_tokens))
        return within[0], within[1]

    def to_wire(self) -> Any:
        """As a request's JSON has it: a word where there is one."""
        for word in WORDS:
            if self == NAMED[word]:
                return word
        return {
            part: list(given)
            for part, given in (("prompt", self.prompt), ("generated", self.generated))
            if given is not None
        }

    @classmethod
    def from_wire(cls, wire: Any) -> Window:
        """What :meth:`to_wire` gave."""
        if isinstance(wire, str):
            return NAMED[wire]
        return cls(*(tuple(wire[part]) if part in wire else None for part in PARTS))

    def __str__(self) -> str:
        """As :func:`read_slices` reads it, or the word."""
        wire = self.to_wire()
        if isinstance(wire, str):
            return wire
        return ",".join(
            f"{part}[{start or ''}:{'' if stop is None else stop}]"
            for part, (start, stop) in wire.items()
        )


NAMED = {
    "all": Window(_WHOLE, _WHOLE),
    "prompt": Window(_WHOLE, None),
    "generated": Window(None, _WHOLE),
}
ALL = NAMED["all"]


def parse_window(given: Any) -> Window:
    """``all``, ``prompt``, ``generated``, or ``{"prompt": [start, stop], "generated": [start,
    stop]}``, or the latter as text in Python's notation, ``prompt[-4:],generated[:16]``.

    Raises:
        ValueError: the rule that is broken.
    """
    if isinstance(given, str):
        if given in WORDS:
            return NAMED[given]
        given = read_slices(given)
    if not isinstance(given, Mapping) or not given.keys() <= set(PARTS):
        raise ValueError(f"must be one of {', '.join(WORDS)}, or an object of prompt and generated")
    parts = {part: _part(part, given[part]) for part in PARTS if given.get(part) is not None}
    if not parts:
        raise ValueError("selects no token: needs a slice of prompt or generated")
    return Window(parts.get("prompt"), parts.get("generated"))


def read_slices(text: str) -> dict[str, Any]:
    """``prompt[-4:],generated[:16]``, either of them or both, as a request's JSON would have it.

    Raises:
        ValueError: saying what cannot be read.
    """
    parts: dict[str, Any] = {}
    for word in text.split(","):
        if (match := _SLICE.fullmatch(word.strip())) is None or match[1] in parts:
            raise ValueError(
                f"must be one of {', '.join(WORDS)}, or slices as in prompt[-4:],generated[:16]"
            )
        parts[match[1]] = [int(end) if end else None for end in match.groups()[1:]]
    return parts


def _part(name: str, given: Any) -> Part:
    if not isinstance(given, Sequence) or isinstance(given, str) or len(given) != 2:
        raise ValueError(f"{name} must be [start, stop]")
    for end in given:
        if end is not None and (isinstance(end, bool) or not isinstance(end, int)):
            raise ValueError(f"{name}: start and stop must be integers or null")
        if end is not None and abs(end) >= LAST:
            raise ValueError(f"{name}: start and stop must be below {LAST}")
        if name == "generated" and end is not None and end < 0:
            raise ValueError(f"{name}: must not be negative, the answer's end is not known")
    start, stop = given[0] or 0, given[1]
    is_comparable = stop is not None and (start < 0) == (stop < 0)
    if stop == 0 or (is_comparable and start >= stop):
        raise ValueError(f"{name}: selects no token, stop must lie beyond start")
    return start, stop
