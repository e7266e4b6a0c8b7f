"""A request's steering fields, well-formed or an error that says what is wrong with them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from vllm import envs

from steering_server.request.angle import Ramp, read_ramp
from steering_server.request.error import SteeringError
from steering_server.request.operation import EXTRA_ARG, MODES, RESERVED_PREFIX
from steering_server.request.window import Window, parse_window

FIELDS = ("angle", "plane", "mode", "strength", "keep_norm", "tokens", "gate")
FAN = "angles"
"""Instead of an angle, one for each choice of the answer."""
RECEIPTS = ("layers", "digest")
"""What an answer says beside the fields: given back, it must be what the loaded plane has."""
MAX_DEGREES = 360.0
MAX_OVER = 1 << 31
FLOAT32_MAX = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Ask:
    """One operation as asked for: every present field is well-formed, none is filled in.

    Angles are numbers or ramps, tokens a window.

    ``where`` is the prefix of the fields' names in errors, ``steering_`` or ``steering[i].``.
    """

    where: str
    fields: Mapping[str, Any]


def is_reserved(key: str) -> bool:
    """Whether a key is ours: known to us or an error, near misses included, never ignored."""
    return key.casefold().startswith(RESERVED_PREFIX)


def steering_fields(extra_args: Mapping[str, Any] | None) -> dict[str, Any]:
    """The part of a request's ``extra_args`` (or JSON body) that is about steering."""
    return {k: v for k, v in (extra_args or {}).items() if is_reserved(k)}


def parse(fields: Mapping[str, Any]) -> list[Ask]:
    """Check everything about a request's steering fields that needs no knowledge of the planes.

    Args:
        fields: what :func:`steering_fields` returns.

    Raises:
        SteeringError: naming field, value and rule.
    """
    flat = {f"steering_{name}": name for name in (*FIELDS, FAN)}
    for key, value in fields.items():
        if key not in flat and key != EXTRA_ARG:
            rule = f"unknown field; known are {', '.join([*flat, EXTRA_ARG])}"
            raise SteeringError(key, value, rule, reason="unknown_field")
    # A null gate is a statement (no gate); any other null is an absent field.
    given = {
        name: fields[key]
        for key, name in flat.items()
        if key in fields and (fields[key] is not None or name == "gate")
    }
    items = fields.get(EXTRA_ARG)
    if items is None:
        if not given or given == {"gate": None}:
            return []
        return [_ask("steering_", given)]
    if given:
        rule = f"excludes the flat fields, got {', '.join(f'steering_{name}' for name in given)}"
        raise SteeringError(EXTRA_ARG, items, rule, reason="conflicting_fields")
    items = _unpacked(EXTRA_ARG, items, "bad_list")
    if not isinstance(items, Sequence) or isinstance(items, str):
        raise SteeringError(EXTRA_ARG, items, "must be a list of objects", reason="bad_list")
    asks = [_item(i, item) for i, item in enumerate(items)]
    fanned = next((ask for ask in asks if FAN in ask.fields), None)
    if fanned is not None and len(asks) > 1:
        rule = f"an angle for each choice takes one plane, got {len(asks)}"
        value = fanned.fields[FAN]
        raise SteeringError(f"{fanned.where}{FAN}", value, rule, reason="bad_fan")
    return asks


def _unpacked(field: str, value: Any, reason: str) -> Any:
    """An object or a list that came as text: vllm_xargs holds no objects, and forms hold neither.

    Raises:
        SteeringError: text that is no JSON.
    """
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise SteeringError(
            field, value, f"as text it must be JSON: {error}", reason=reason
        ) from None


def _item(i: int, item: Any) -> Ask:
    where = f"steering[{i}]"
    if not isinstance(item, Mapping):
        raise SteeringError(where, item, "must be an object", reason="bad_list")
    known = (*FIELDS, FAN, *RECEIPTS)
    for name, value in item.items():
        if name not in known:
            rule = f"unknown field; known are {', '.join((*FIELDS, FAN))}"
            raise SteeringError(f"{where}.{name}", value, rule, reason="unknown_field")
    return _ask(f"{where}.", {k: v for k, v in item.items() if v is not None or k == "gate"})


def _ask(where: str, given: Mapping[str, Any]) -> Ask:
    fields = dict(given)
    if FAN in given:
        if "angle" in given:
            rule = f"excludes {where}{FAN}: one angle for all choices, or one for each"
            raise SteeringError(f"{where}angle", given["angle"], rule, reason="conflicting_fields")
        fields[FAN] = _fan(f"{where}{FAN}", given[FAN])
    if "angle" in given:
        fields["angle"] = _angle(f"{where}angle", given["angle"])
    for name in ("gate", "strength"):
        if given.get(name) is not None:
            rule = "must be a number" + (" or null" if name == "gate" else "")
            fields[name] = _number(where + name, given[name], rule, f"bad_{name}")
    mode = given.get("mode")
    if mode is not None and (not isinstance(mode, str) or mode not in MODES):
        rule = f"must be one of {', '.join(MODES)}"
        raise SteeringError(f"{where}mode", mode, rule, reason="bad_mode")
    if not isinstance(keep := given.get("keep_norm", False), bool):
        raise SteeringError(f"{where}keep_norm", keep, "must be a boolean", reason="bad_keep_norm")
    if "tokens" in given:
        fields["tokens"] = _window(f"{where}tokens", given["tokens"])
    plane = given.get("plane")
    if plane is not None and not isinstance(plane, str):
        raise SteeringError(f"{where}plane", plane, "must be a string", reason="unknown_plane")
    return Ask(where, fields)


def _number(field: str, value: Any, rule: str, reason: str) -> float:
    # bool is an int to Python, but not a number to a caller.
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise SteeringError(field, value, rule, reason=reason)
    if not _fits(value):
        raise SteeringError(field, value, "must be finite", reason=reason)
    # One number, one key: 1 is 1.0, and -0.0 is 0.0.
    return float(value) + 0.0


def _angle(field: str, value: Any) -> float | Ramp:
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.startswith("{") else read_ramp(value)
        except (ValueError, RecursionError):
            rule = "must be a number in degrees, or from one to another as in 180..0/64"
            raise SteeringError(field, value, rule, reason="bad_angle") from None
    if not isinstance(value, Mapping):
        return _degrees(field, value)
    if value.keys() != {"from", "to", "over"}:
        rule = "an angle that changes must have from, to and over"
        raise SteeringError(field, value, rule, reason="bad_angle")
    over = value["over"]
    if isinstance(over, bool) or not isinstance(over, int) or not 1 <= over <= MAX_OVER:
        rule = f"must be a number of generated tokens, an integer from 1 to {MAX_OVER}"
        raise SteeringError(f"{field}.over", over, rule, reason="bad_angle")
    start, stop = (_degrees(f"{field}.{end}", value[end]) for end in ("from", "to"))
    return start if start == stop else Ramp(start, stop, over)


def _degrees(field: str, value: Any) -> float:
    degrees = _number(field, value, "must be a number in degrees", "bad_angle")
    if abs(degrees) > MAX_DEGREES:
        rule = f"must be between {-MAX_DEGREES:g} and {MAX_DEGREES:g} degrees"
        raise SteeringError(field, value, rule, reason="bad_angle")
    return degrees


def _fan(field: str, value: Any) -> tuple[float | Ramp, ...]:
    value = _unpacked(field, value, "bad_fan")
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        rule = "must be a list of angles, one for each choice"
        raise SteeringError(field, value, rule, reason="bad_fan")
    if len(value) > (most := envs.VLLM_MAX_N_SEQUENCES):
        rule = f"at most {most} choices (VLLM_MAX_N_SEQUENCES), got {len(value)}"
        raise SteeringError(field, value, rule, reason="bad_fan")
    return tuple(_angle(f"{field}[{i}]", each) for i, each in enumerate(value))


def _window(field: str, value: Any) -> Window:
    given = value
    if isinstance(value, str) and value.startswith("{"):
        given = _unpacked(field, value, "bad_tokens")
    try:
        return parse_window(given)
    except ValueError as error:
        raise SteeringError(field, value, str(error), reason="bad_tokens") from None


def _fits(value: float) -> bool:
    """Whether a number is finite in float32, which is what the rows hold."""
    try:
        return abs(float(value)) <= FLOAT32_MAX
    except OverflowError:
        return False
