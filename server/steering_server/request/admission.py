"""What a request asks for -> canonical operations, by the planes that are loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from steering_planes import Plane, canonical_degrees
from steering_planes.artifact import STRENGTHS, Mode, PlaneConfig
from steering_server.request import metrics
from steering_server.request.angle import Ramp
from steering_server.request.ask import FAN, Ask, parse, steering_fields
from steering_server.request.error import SteeringError
from steering_server.request.operation import (
    EXTRA_ARG,
    ROTATIONS,
    Operation,
    choose,
    fan_of,
)
from steering_server.request.receipt import layers
from steering_server.request.window import ALL
from steering_server.request.words import parse_words


class Admission:
    """Decides, for one server, what a request's steering fields mean.

    Args:
        planes: the loaded planes by name.
        max_planes: how many operations one request may carry.
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
        self.default: tuple[Operation, ...] = ()
        if default is not None:
            self.default = self._from_words("--steering-default", default)
        for name, words in self.presets.items():
            self._from_words(f"--steering-preset {name}", words)

    def _from_words(self, flag: str, words: str) -> tuple[Operation, ...]:
        try:
            return self.admit({EXTRA_ARG: parse_words(words)})
        except SteeringError as error:
            raise SteeringError(flag, words, str(error), reason=error.reason) from None
        except ValueError as error:
            raise SteeringError(flag, words, str(error), reason="bad_words") from None

    def settle(self, extra_args: Mapping[str, Any] | None) -> tuple[Operation, ...]:
        """What a request is steered by: what it asks for, else the server's default.

        A request that says that it wants none (an empty list, a turn by 0) gets none.

        Raises:
            SteeringError: see :meth:`admit`; or nothing would steer it where something must.
        """
        fields = steering_fields(extra_args)
        operations = self.admit(fields) if _says_something(fields) else self.default
        choices = range(max(1, fan_of(operations)))
        if self.required and not all(choose(operations, i) for i in choices):
            rule = "required (--steering-required): ask for steering; a turn by 0 is none"
            metrics.count_rejection("required")
            raise SteeringError(EXTRA_ARG, fields.get(EXTRA_ARG), rule, reason="required")
        return operations

    def admit(self, extra_args: Mapping[str, Any] | None) -> tuple[Operation, ...]:
        """The request's operations in order; empty when nothing is to be steered.

        Admitted operations are admitted again unchanged.

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
            operations = tuple(self._operation(ask) for ask in asks)
        except SteeringError as error:
            metrics.count_rejection(error.reason)
            raise
        return tuple(operation for operation in operations if not operation.is_idle)

    def _operation(self, ask: Ask) -> Operation:
        given = ask.fields
        name, plane = self._plane(ask)
        for field, loaded in (("digest", plane.digest), ("layers", layers(plane))):
            if (value := given.get(field, loaded)) != loaded:
                rule = f"the loaded plane {name!r} has {loaded}"
                raise SteeringError(f"{ask.where}{field}", value, rule, reason="unknown_plane")
        fan = tuple(map(_canonical, given.get(FAN, ())))
        angle = given.get("angle", plane.config.default_angle)
        if angle is None and not fan:
            field = f"{ask.where}angle"
            rule = f"required: plane {name!r} has no default angle"
            raise SteeringError(field, None, rule, reason="no_angle")
        mode = given.get("mode", plane.config.default_mode)
        if mode not in plane.modes:
            rule = f"plane {name!r} was made without class means; calibrate it again"
            raise SteeringError(f"{ask.where}mode", mode, rule, reason="no_class_means")
        gate = given.get("gate", plane.config.gate)
        return Operation(
            plane=name,
            digest=plane.digest,
            angle=None if fan else _canonical(angle),
            mode=cast(Mode, mode),
            tokens=given.get("tokens", ALL),
            gate=None if gate is None else float(gate) + 0.0,
            strength=_strength(ask, mode, plane.config),
            keep_norm=given.get("keep_norm", False) and mode not in ROTATIONS,
            fan=fan,
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


def _canonical(degrees: float | Ramp) -> float | Ramp:
    return degrees if isinstance(degrees, Ramp) else canonical_degrees(degrees)


def _strength(ask: Ask, mode: str, config: PlaneConfig) -> float | None:
    """How much of an operation, the plane's default of its default mode; None of a rotation.

    Raises:
        SteeringError: a strength where none is taken, none where one is required, or one too much.
    """
    field = f"{ask.where}strength"
    strength: float | None = ask.fields.get("strength")
    if mode in ROTATIONS:
        if strength is not None:
            rule = f"{mode} takes no strength; {', '.join(STRENGTHS)} do"
            raise SteeringError(field, strength, rule, reason="bad_strength")
        return None
    if strength is None and mode == config.default_mode:
        strength = config.default_strength
    if strength is None:
        if mode == "ablate":
            return 1.0
        raise SteeringError(field, None, f"required with {mode}", reason="bad_strength")
    least, most = STRENGTHS[mode]
    if not least <= strength <= most:
        rule = f"must be between {least:g} and {most:g} with {mode}"
        raise SteeringError(field, strength, rule, reason="bad_strength")
    return strength


def _says_something(fields: Mapping[str, Any]) -> bool:
    # A null gate alone says nothing, nor does any other null.
    return any(value is not None for value in fields.values())
