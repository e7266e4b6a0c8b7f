"""Angles that change as a request's tokens are generated."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

PARTS = 1e9
"""Of a degree, to which angles on the way are rounded."""

_RAMP = re.compile(r"(.+?)\.\.(.+)/([0-9]{1,10})")


@dataclass(frozen=True)
class Ramp:
    """From one angle to another, linearly over the generated tokens, then held.

    Angles are as they were given, not canonical: from 270 to 90 is not from -90 to 90.

    Attributes:
        start: degrees of the prompt and of the first generated token.
        stop: degrees of the generated token after ``over`` others, and of all that follow.
        over: generated tokens, at least one.
    """

    start: float
    stop: float
    over: int

    def at(self, generated: int) -> float:
        """Degrees at a generated token, from 0; of the prompt's, which are below, the start.

        In between they are rounded, so that two ramps which agree at a token agree to the last
        digit, and one that passes a constant's angle has it.
        """
        if generated <= 0:
            return self.start
        if generated >= self.over:
            return self.stop
        degrees = self.start + (self.stop - self.start) * generated / self.over
        return round(degrees * PARTS) / PARTS

    def to_wire(self) -> dict[str, Any]:
        """As a request's JSON has it."""
        return {"from": self.start, "to": self.stop, "over": self.over}

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> Ramp:
        """What :meth:`to_wire` gave."""
        return cls(wire["from"], wire["to"], wire["over"])

    def __str__(self) -> str:
        """As :func:`read_ramp` reads it."""
        return f"{_short(self.start)}..{_short(self.stop)}/{self.over}"


def read_ramp(text: str) -> dict[str, Any]:
    """``FROM..TO/OVER``, as in ``180..0/64``, as a request's JSON would have it.

    Raises:
        ValueError: saying what cannot be read; values are admission's to judge.
    """
    try:
        if match := _RAMP.fullmatch(text):
            start, stop, over = match.groups()
            return {"from": float(start), "to": float(stop), "over": int(over)}
    except ValueError:
        pass
    raise ValueError("must be FROM..TO/OVER, as in 180..0/64")


def _short(degrees: float) -> str:
    return str(int(degrees)) if degrees == int(degrees) else repr(degrees)
