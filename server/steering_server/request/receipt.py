"""What an answer says of its steering: a header, and an object in the body."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from steering_planes import Plane
from steering_server.request.rotation import Rotation

NAME = "steering"
"""Of the header, and of the body's object."""


def receipt(rotations: Sequence[Rotation], planes: Mapping[str, Plane]) -> dict[str, Any]:
    """What was applied, for the body.

    One rotation gives plain members, ``{"plane": "sentiment", "angle": 45.0, …}``; several give
    lists, in order of application. ``gate`` is there only where one is set.
    """
    columns = _columns(rotations, planes)
    return {name: values[0] if len(values) == 1 else values for name, values in columns.items()}


def member(rotations: Sequence[Rotation], planes: Mapping[str, Plane]) -> bytes:
    """The receipt as a member of a JSON object, ready to be put into one."""
    text = json.dumps(receipt(rotations, planes), separators=(",", ":"))
    return f'"{NAME}":{text}'.encode()


def header(rotations: Sequence[Rotation], planes: Mapping[str, Plane]) -> str:
    """The same as a structured dictionary (RFC 9651).

    One rotation gives plain members, ``plane="sentiment", angle=45, mode=rotate_to, …``; several
    give inner lists, ``plane=("sentiment" "style"), angle=(45 90), …``, in order of application.
    """
    shown = {
        name: [_SHOWN[name](value) for value in values]
        for name, values in _columns(rotations, planes).items()
    }
    return ", ".join(
        f"{name}={values[0] if len(values) == 1 else '(' + ' '.join(values) + ')'}"
        for name, values in shown.items()
    )


def layers(plane: Plane) -> str:
    """The layers that a plane steers, in order."""
    return ",".join(map(str, sorted({site.layer for site in plane.sites})))


def _columns(rotations: Sequence[Rotation], planes: Mapping[str, Plane]) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {
        "plane": [r.plane for r in rotations],
        "angle": [r.angle for r in rotations],
        "mode": [r.mode for r in rotations],
        "tokens": [r.tokens for r in rotations],
        "layers": [layers(planes[r.plane]) for r in rotations],
        "digest": [r.digest for r in rotations],
    }
    if any(r.gate is not None for r in rotations):
        columns["gate"] = [r.gate for r in rotations]
    return columns


def _string(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _number(value: float) -> str:
    """Exact: an integer or a decimal where the standard's three digits hold it, else a string."""
    if value == int(value) and abs(value) < 1e15:
        return str(int(value))
    short = f"{value:.3f}".rstrip("0")
    return short if float(short) == value and abs(value) < 1e12 else _string(repr(value))


_SHOWN: dict[str, Any] = {
    "plane": _string,
    "angle": _number,
    "mode": str,
    "tokens": str,
    "layers": _string,
    "digest": _string,
    "gate": lambda gate: "?0" if gate is None else _number(gate),
}
