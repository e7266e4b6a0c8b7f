"""What a request asks for -> canonical rotations, or an error that says what is wrong with it."""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from vllm.exceptions import VLLMValidationError

from steering_planes import Plane, canonical_degrees
from steering_server import metrics
from steering_server.rotation import (
    EXTRA_ARG,
    MODES,
    RESERVED_PREFIX,
    TOKENS,
    Mode,
    Rotation,
    Tokens,
)

FIELDS = ("angle", "plane", "mode", "tokens", "gate")
MAX_DEGREES = 360.0


class SteeringError(VLLMValidationError):  # type: ignore[misc]
    """Steering that cannot be given exactly as asked: HTTP 400 in OpenAI's shape.

    Attributes:
        reason: a short code, the label of ``steering_rejections_total``.
    """

    def __init__(self, field: str, value: Any, rule: str, *, reason: str) -> None:
        # The value goes into the message: vLLM's own suffix would leave a null value out.
        shown = "null" if value is None else reprlib.repr(value)
        super().__init__(f"{field} = {shown}: {rule}", parameter=field)
        self.reason = reason


@dataclass(frozen=True)
class Ask:
    """One rotation as asked for: every present field is well-formed, none is filled in.

    ``where`` is the prefix of the fields' names in errors, ``steering_`` or ``steering[i].``.
    """

    where: str
    fields: Mapping[str, Any]


def steering_fields(extra_args: Mapping[str, Any] | None) -> dict[str, Any]:
    """The part of a request's ``extra_args`` (or JSON body) that is about steering."""
    return {k: v for k, v in (extra_args or {}).items() if k.startswith(RESERVED_PREFIX)}


def parse(fields: Mapping[str, Any]) -> list[Ask]:
    """Check everything about a request's steering fields that needs no knowledge of the planes.

    Args:
        fields: what :func:`steering_fields` returns.

    Raises:
        SteeringError: naming field, value and rule.
    """
    flat = {f"steering_{name}": name for name in FIELDS}
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
    if isinstance(items, str):  # vllm_xargs holds no objects, but it does hold text.
        try:
            items = json.loads(items)
        except ValueError as error:
            rule = f"as text it must be JSON: {error}"
            raise SteeringError(EXTRA_ARG, fields[EXTRA_ARG], rule, reason="bad_list") from None
    if not isinstance(items, Sequence) or isinstance(items, str):
        raise SteeringError(EXTRA_ARG, items, "must be a list of objects", reason="bad_list")
    return [_item(i, item) for i, item in enumerate(items)]


def _item(i: int, item: Any) -> Ask:
    where = f"steering[{i}]"
    if not isinstance(item, Mapping):
        raise SteeringError(where, item, "must be an object", reason="bad_list")
    known = (*FIELDS, "digest")
    for name, value in item.items():
        if name not in known:
            rule = f"unknown field; known are {', '.join(FIELDS)}"
            raise SteeringError(f"{where}.{name}", value, rule, reason="unknown_field")
    return _ask(f"{where}.", {k: v for k, v in item.items() if v is not None or k == "gate"})


def _ask(where: str, given: Mapping[str, Any]) -> Ask:
    for name in ("angle", "gate"):
        value = given.get(name)
        if value is None:
            continue
        # bool is an int to Python, but not a number to a caller.
        if isinstance(value, bool) or not isinstance(value, int | float):
            rule = "must be a number" + (" in degrees" if name == "angle" else " or null")
            raise SteeringError(where + name, value, rule, reason=f"bad_{name}")
        if not math.isfinite(value):
            raise SteeringError(where + name, value, "must be finite", reason=f"bad_{name}")
    angle = given.get("angle")
    if angle is not None and abs(angle) > MAX_DEGREES:
        rule = f"must be between {-MAX_DEGREES:g} and {MAX_DEGREES:g} degrees"
        raise SteeringError(f"{where}angle", angle, rule, reason="bad_angle")
    for name, allowed in (("mode", MODES), ("tokens", TOKENS)):
        value = given.get(name)
        if value is not None and value not in allowed:
            rule = f"must be one of {', '.join(allowed)}"
            raise SteeringError(where + name, value, rule, reason=f"bad_{name}")
    plane = given.get("plane")
    if plane is not None and not isinstance(plane, str):
        raise SteeringError(f"{where}plane", plane, "must be a string", reason="unknown_plane")
    return Ask(where, given)


class Admission:
    """Decides, for one server, what a request's steering fields mean.

    Args:
        planes: the loaded planes by name.
        max_planes: how many rotations one request may carry.
    """

    def __init__(self, planes: Mapping[str, Plane], max_planes: int) -> None:
        self.planes = planes
        self.max_planes = max_planes

    def admit(self, extra_args: Mapping[str, Any] | None) -> tuple[Rotation, ...]:
        """The request's rotations in order; empty when nothing is to be steered.

        Admitted rotations are admitted again unchanged.

        Raises:
            SteeringError: counted in ``steering_rejections_total`` under its reason.
        """
        fields = steering_fields(extra_args)
        if not fields:
            return ()
        try:
            asks = parse(fields)
            if len(asks) > self.max_planes:
                rule = f"at most {self.max_planes} planes a request (--steering-max-planes)"
                raise SteeringError(EXTRA_ARG, fields[EXTRA_ARG], rule, reason="too_many_planes")
            rotations = tuple(self._rotation(ask) for ask in asks)
        except SteeringError as error:
            metrics.count_rejection(error.reason)
            raise
        return tuple(r for r in rotations if r.mode != "rotate_by" or r.angle != 0.0)

    def _rotation(self, ask: Ask) -> Rotation:
        given = ask.fields
        name, plane = self._plane(ask)
        angle = given.get("angle", plane.config.default_angle)
        if angle is None:
            field = f"{ask.where}angle"
            rule = f"required: plane {name!r} has no default angle"
            raise SteeringError(field, None, rule, reason="no_angle")
        digest = given.get("digest", plane.digest)
        if digest != plane.digest:
            rule = f"the loaded plane {name!r} has {plane.digest}"
            raise SteeringError(f"{ask.where}digest", digest, rule, reason="unknown_plane")
        return Rotation(
            plane=name,
            digest=plane.digest,
            angle=canonical_degrees(angle),
            mode=cast(Mode, given.get("mode", plane.config.default_mode)),
            tokens=cast(Tokens, given.get("tokens", "all")),
            gate=given.get("gate", plane.config.gate),
        )

    def _plane(self, ask: Ask) -> tuple[str, Plane]:
        name = ask.fields.get("plane")
        field = f"{ask.where}plane"
        if not self.planes:
            rule = "this server has no steering plane; start it with --steering-plane NAME=PATH"
            raise SteeringError(field, name, rule, reason="no_plane_loaded")
        loaded = ", ".join(sorted(self.planes))
        if name is None:
            if len(self.planes) > 1:
                rule = f"required where several planes are loaded: {loaded}"
                raise SteeringError(field, name, rule, reason="plane_ambiguous")
            (only,) = self.planes.items()
            return only
        if name not in self.planes:
            rule = f"no such plane; loaded: {loaded}"
            raise SteeringError(field, name, rule, reason="unknown_plane")
        return name, self.planes[name]
