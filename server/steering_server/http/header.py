"""The response header that says what was applied."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from steering_planes import Plane
from steering_server.rotation import Rotation

NAME = "steering"


def header(rotations: Sequence[Rotation], planes: Mapping[str, Plane]) -> str:
    """A structured dictionary (RFC 9651) naming what was applied.

    One rotation gives plain members, ``plane="sentiment", angle=45, mode=rotate_to, …``; several
    give inner lists, ``plane=("sentiment" "style"), angle=(45 90), …``, in order of application.
    """
    members: dict[str, list[str]] = {
        "plane": [_string(r.plane) for r in rotations],
        "angle": [_number(r.angle) for r in rotations],
        "mode": [r.mode for r in rotations],
        "tokens": [r.tokens for r in rotations],
        "layers": [_string(_layers(planes[r.plane])) for r in rotations],
        "digest": [_string(r.digest) for r in rotations],
    }
    if any(r.gate is not None for r in rotations):
        members["gate"] = ["?0" if r.gate is None else _number(r.gate) for r in rotations]
    return ", ".join(
        f"{key}={values[0] if len(values) == 1 else '(' + ' '.join(values) + ')'}"
        for key, values in members.items()
    )


def _layers(plane: Plane) -> str:
    return ",".join(map(str, sorted({site.layer for site in plane.sites})))


def _string(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _number(value: float) -> str:
    """Exact: an integer or a decimal where the standard's three digits hold it, else a string."""
    if value == int(value) and abs(value) < 1e15:
        return str(int(value))
    short = f"{value:.3f}".rstrip("0")
    return short if float(short) == value and abs(value) < 1e12 else _string(repr(value))
