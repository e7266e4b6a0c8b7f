"""What a request asks for -> canonical rotations, or an error that says what is wrong with it."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from vllm.exceptions import VLLMValidationError

from steering_planes import Plane, canonical_degrees
from steering_server.request import metrics
from steering_server.request.receipt import layers
from steering_server.request.rotation import (
    EXTRA_ARG,
    MODES,
    RESERVED_PREFIX,
    TOKENS,
    Mode,
    Rotation,
    Tokens,
)
from steering_server.request.words import parse_words

FIELDS = ("angle", "plane", "mode", "tokens", "gate")
RECEIPTS = ("layers", "digest")
"""What an answer says beside the fields: given back, it must be what the loaded plane has."""
MAX_DEGREES = 360.0
FLOAT32_MAX = torch.finfo(torch.float32).max


class SteeringError(VLLMValidationError):  # type: ignore[misc]
    """Steering that cannot be given exactly as asked: HTTP 400 in OpenAI's shape.

    Attributes:
        rule: what the value must be.
        reason: a short code, the label of ``steering_rejections_total``.
    """

    def __init__(self, field: str, value: Any, rule: str, *, reason: str) -> None:
        # The value goes into the message: vLLM's own suffix would leave a null value out.
        shown = "null" if value is None else reprlib.repr(value)
        super().__init__(f"{field} = {shown}: {rule}", parameter=field)
        self.rule = rule
        self.reason = reason


@dataclass(frozen=True)
class Ask:
    """One rotation as asked for: every present field is well-formed, none is filled in.

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


def _says_something(fields: Mapping[str, Any]) -> bool:
    # A null gate alone says nothing, nor does any other null.
    return any(value is not None for value in fields.values())


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
        except (ValueError, RecursionError) as error:
            rule = f"as text it must be JSON: {error}"
            raise SteeringError(EXTRA_ARG, fields[EXTRA_ARG], rule, reason="bad_list") from None
    if not isinstance(items, Sequence) or isinstance(items, str):
        raise SteeringError(EXTRA_ARG, items, "must be a list of objects", reason="bad_list")
    return [_item(i, item) for i, item in enumerate(items)]


def _item(i: int, item: Any) -> Ask:
    where = f"steering[{i}]"
    if not isinstance(item, Mapping):
        raise SteeringError(where, item, "must be an object", reason="bad_list")
    known = (*FIELDS, *RECEIPTS)
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
        if not _fits(value):
            raise SteeringError(where + name, value, "must be finite", reason=f"bad_{name}")
    angle = given.get("angle")
    if angle is not None and abs(angle) > MAX_DEGREES:
        rule = f"must be between {-MAX_DEGREES:g} and {MAX_DEGREES:g} degrees"
        raise SteeringError(f"{where}angle", angle, rule, reason="bad_angle")
    for name, allowed in (("mode", MODES), ("tokens", TOKENS)):
        value = given.get(name)
        if value is not None and (not isinstance(value, str) or value not in allowed):
            rule = f"must be one of {', '.join(allowed)}"
            raise SteeringError(where + name, value, rule, reason=f"bad_{name}")
    plane = given.get("plane")
    if plane is not None and not isinstance(plane, str):
        raise SteeringError(f"{where}plane", plane, "must be a string", reason="unknown_plane")
    return Ask(where, given)


def _fits(value: float) -> bool:
    """Whether a number is finite in float32, which is what the rows hold."""
    try:
        return abs(float(value)) <= FLOAT32_MAX
    except OverflowError:
        return False


class Admission:
    """Decides, for one server, what a request's steering fields mean.

    Args:
        planes: the loaded planes by name.
        max_planes: how many rotations one request may carry.
        default: what steers a request that says nothing of steering, in words (see
            :mod:`steering_server.request.words`); None leaves it alone.
        required: refuse a request that would be unsteered.
        presets: name -> words, model ids that stand for a steering.

    Raises:
        SteeringError: a default or a preset that no request could ask for.
    """

    def __init__(
        self,
        planes: Mapping[str, Plane],
        max_planes: int,
        *,
        default: str | None = None,
        required: bool = False,
        presets: Mapping[str, str] | None = None,
    ) -> None:
        self.planes = planes
        self.max_planes = max_planes
        self.required = required
        self.presets = dict(presets or {})
        self.default: tuple[Rotation, ...] = ()
        if default is not None:
            self.default = self._from_words("--steering-default", default)
        for name, words in self.presets.items():
            self._from_words(f"--steering-preset {name}", words)

    def _from_words(self, flag: str, words: str) -> tuple[Rotation, ...]:
        try:
            return self.admit({EXTRA_ARG: parse_words(words)})
        except SteeringError as error:
            raise SteeringError(flag, words, str(error), reason=error.reason) from None
        except ValueError as error:
            raise SteeringError(flag, words, str(error), reason="bad_words") from None

    def settle(self, extra_args: Mapping[str, Any] | None) -> tuple[Rotation, ...]:
        """What a request is steered by: what it asks for, else the server's default.

        A request that says that it wants none (an empty list, a turn by 0) gets none.

        Raises:
            SteeringError: see :meth:`admit`; or nothing would steer it where something must.
        """
        fields = steering_fields(extra_args)
        rotations = self.admit(fields) if _says_something(fields) else self.default
        if self.required and not rotations:
            rule = "required (--steering-required): ask for steering; a turn by 0 is none"
            metrics.count_rejection("required")
            raise SteeringError(EXTRA_ARG, fields.get(EXTRA_ARG), rule, reason="required")
        return rotations

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
        for field, loaded in (("digest", plane.digest), ("layers", layers(plane))):
            if (value := given.get(field, loaded)) != loaded:
                rule = f"the loaded plane {name!r} has {loaded}"
                raise SteeringError(f"{ask.where}{field}", value, rule, reason="unknown_plane")
        gate = given.get("gate", plane.config.gate)
        return Rotation(
            plane=name,
            digest=plane.digest,
            angle=canonical_degrees(angle),
            mode=cast(Mode, given.get("mode", plane.config.default_mode)),
            tokens=cast(Tokens, given.get("tokens", "all")),
            # One number, one key: 1 is 1.0, and -0.0 is 0.0.
            gate=None if gate is None else float(gate) + 0.0,
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
