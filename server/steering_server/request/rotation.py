"""One steering of one request, in the form that every process agrees on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

Mode = Literal["rotate_by", "rotate_to"]
Tokens = Literal["all", "prompt", "generated"]
MODES: tuple[str, ...] = get_args(Mode)
TOKENS: tuple[str, ...] = get_args(Tokens)

EXTRA_ARG = "steering"
"""The key of ``SamplingParams.extra_args`` under which admitted rotations travel inside vLLM."""

RESERVED_PREFIX = "steer"
"""Every key that begins so, in any case, is ours: one that we do not know is an error."""


@dataclass(frozen=True)
class Rotation:
    """An admitted rotation: complete, canonical and bound to a plane's exact content.

    Attributes:
        plane: the name under which the server holds the plane.
        digest: the plane's SHA-256, 64 hexadecimal digits.
        angle: degrees in [0, 360), from b1 towards b2.
        mode: rotate_by turns by the angle, rotate_to turns to it.
        tokens: which of the request's tokens are steered.
        gate: act on a token only where c1 exceeds it; None acts always.
    """

    plane: str
    digest: str
    angle: float
    mode: Mode
    tokens: Tokens
    gate: float | None

    def to_wire(self) -> dict[str, Any]:
        """As plain values, for ``extra_args``."""
        return asdict(self)


def admitted(extra_args: Mapping[str, Any] | None) -> tuple[Rotation, ...]:
    """The rotations that admission wrote into a request's ``extra_args``.

    Raises:
        RuntimeError: a steering field that admission has not seen. Past admission that is a broken
            invariant: the request would run unsteered and nobody would know.
    """
    if not extra_args:
        return ()
    raw = sorted(
        k for k in extra_args if k.casefold().startswith(RESERVED_PREFIX) and k != EXTRA_ARG
    )
    if raw:
        raise RuntimeError(f"steering fields {raw} reached the engine without admission")
    try:
        return tuple(Rotation(**wire) for wire in extra_args.get(EXTRA_ARG) or ())
    except TypeError as error:
        raise RuntimeError(f"steering reached the engine without admission: {error}") from error
