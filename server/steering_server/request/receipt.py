"""What an answer says of its steering: a header, and an object in the body."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from steering_planes import Plane
from steering_server.request.angle import Ramp
from steering_server.request.operation import Operation, fan_of
from steering_server.request.window import WORDS, Window

NAME = "steering"
"""Of the header, and of the body's object."""


LISTED = 64
"""Angles of choices that a header lists, and a stream after its first event: a longer list is said
as ``choices``, how many there are, since proxies and clients bound a header."""


def receipt(
    operations: Sequence[Operation], planes: Mapping[str, Plane], *, brief: bool = False
) -> dict[str, Any]:
    """What was applied, for the body.

    One operation gives plain members, ``{"plane": "sentiment", "angle": 45.0, …}``; several give
    lists, in order of application. ``strength``, ``keep_norm`` and ``gate`` are there only where
    one is set. An angle for each choice gives ``angles``, in the order of the choices, if ``brief``
    at most :data:`LISTED` of them.
    """
    columns = _columns(operations, planes, brief=brief)
    return {
        name: _plain(values[0]) if len(values) == 1 else [*map(_plain, values)]
        for name, values in columns.items()
    }


def member(
    operations: Sequence[Operation], planes: Mapping[str, Plane], *, brief: bool = False
) -> bytes:
    """The receipt as a member of a JSON object, ready to be put into one."""
    text = json.dumps(receipt(operations, planes, brief=brief), separators=(",", ":"))
    return f'"{NAME}":{text}'.encode()


def header(operations: Sequence[Operation], planes: Mapping[str, Plane]) -> str:
    """The same as a structured dictionary (RFC 9651).

    One operation gives plain members, ``plane="sentiment", angle=45, mode=rotate_to, …``; several
    give inner lists, ``plane=("sentiment" "style"), angle=(45 90), …``, in order of application.
    """
    shown = {
        name: [_SHOWN[name](value) for value in values]
        for name, values in _columns(operations, planes, brief=True).items()
    }
    return ", ".join(
        f"{name}={values[0] if len(values) == 1 else '(' + ' '.join(values) + ')'}"
        for name, values in shown.items()
    )


def layers(plane: Plane) -> str:
    """The layers that a plane steers, in order."""
    return ",".join(map(str, sorted({site.layer for site in plane.sites})))


def _columns(
    operations: Sequence[Operation], planes: Mapping[str, Plane], *, brief: bool
) -> dict[str, list[Any]]:
    choices = fan_of(operations)
    is_counted = brief and choices > LISTED
    columns: dict[str, list[Any]] = {
        "plane": [o.plane for o in operations],
        "angle": [o.angle for o in operations],
        "angles": [None if is_counted else o.fan or None for o in operations],
        "choices": [choices if is_counted else None for _ in operations],
        "mode": [o.mode for o in operations],
        "strength": [o.strength for o in operations],
        "keep_norm": [o.keep_norm or None for o in operations],
        "tokens": [o.tokens for o in operations],
        "layers": [layers(planes[o.plane]) for o in operations],
        "digest": [o.digest for o in operations],
        "gate": [o.gate for o in operations],
    }
    return {name: values for name, values in columns.items() if any(v is not None for v in values)}


def _plain(value: Any) -> Any:
    """As JSON has it."""
    if isinstance(value, tuple):
        return [*map(_plain, value)]
    return value.to_wire() if isinstance(value, Ramp | Window) else value


def _string(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _number(value: float) -> str:
    """Exact: an integer or a decimal where the standard's three digits hold it, else a string."""
    if value == int(value) and abs(value) < 1e15:
        return str(int(value))
    short = f"{value:.3f}".rstrip("0")
    return short if float(short) == value and abs(value) < 1e12 else _string(repr(value))


def _angle(angle: float | Ramp) -> str:
    return _string(str(angle)) if isinstance(angle, Ramp) else _number(angle)


def _optional(value: float | None) -> str:
    return "?0" if value is None else _number(value)


def _tokens(window: Window) -> str:
    text = str(window)
    return text if text in WORDS else _string(text)


_SHOWN: dict[str, Any] = {
    "plane": _string,
    "angle": _angle,
    "angles": lambda angles: f"({' '.join(map(_angle, angles))})",
    "choices": str,
    "mode": str,
    "strength": _optional,
    "keep_norm": lambda keep: "?1" if keep else "?0",
    "tokens": _tokens,
    "layers": _string,
    "digest": _string,
    "gate": _optional,
}
