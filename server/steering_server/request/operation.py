"""One operation of one request, in the form that every process agrees on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

from steering_planes import canonical_degrees
from steering_planes.artifact import Mode
from steering_server.request.angle import Ramp
from steering_server.request.window import ALL, Window

MODES: tuple[str, ...] = get_args(Mode)
ROTATIONS = ("rotate_by", "rotate_to")
"""They keep the norm by themselves, and take no strength."""

EXTRA_ARG = "steering"
"""The key of ``SamplingParams.extra_args`` under which admitted operations travel inside vLLM."""

TINY = 2.0**-126
"""Of a strength: what is less is none in a row, which is float32."""

RESERVED_PREFIX = "steer"
"""Every key that begins so, in any case, is ours: one that we do not know is an error."""


@dataclass(frozen=True)
class Operation:
    """An admitted operation: complete, canonical and bound to a plane's exact content.

    Attributes:
        plane: the name under which the server holds the plane.
        digest: the plane's SHA-256, 64 hexadecimal digits.
        angle: degrees in [0, 360), from b1 towards b2, of the direction u; or a ramp of them.
        mode: what is done to the activation's coordinates in the plane, see
            :class:`steering_kernels.rows.Mode`.
        tokens: which of the request's tokens are steered.
        gate: act on a token only where c1 exceeds it; None acts always.
        strength: of ``add`` in units of each site's rho, of ``ablate`` a share, of ``cap`` the
            limit in class coordinates; None of a rotation.
        keep_norm: scale the result back to the activation's length; never of a rotation.
        fan: several angles, one for each choice of the request's answer; ``angle`` is then None.
    """

    plane: str
    digest: str
    angle: float | Ramp | None
    mode: Mode
    tokens: Window = ALL
    gate: float | None = None
    strength: float | None = None
    keep_norm: bool = False
    fan: tuple[float | Ramp, ...] = ()

    @property
    def is_idle(self) -> bool:
        """Whether nothing at all is done, to any token."""
        moves_none = self.mode in ("add", "ablate") and abs(self.strength or 0.0) < TINY
        return not self.fan and (moves_none or self._stands_still(self.angle))

    def _stands_still(self, degrees: float | Ramp | None) -> bool:
        if isinstance(degrees, Ramp):
            # No longer one turns by whole turns alone.
            steps = range(degrees.over + 1) if degrees.over <= 2 else ()
            return bool(steps) and all(self._stands_still(degrees.at(k) % 360) for k in steps)
        return self.mode == "rotate_by" and degrees == 0.0

    def choice(self, index: int) -> Operation:
        """The operation of one choice of the answer."""
        return replace(self, angle=self.fan[index], fan=()) if self.fan else self

    def degrees_at(self, position: int, prompt_tokens: int) -> float | None:
        """The angle at a token in [0, 360); None where it is not steered.

        Args:
            position: the token's, from 0.
            prompt_tokens: where the generated tokens begin.
        """
        if not any(start <= position < stop for start, stop in self.tokens.spans(prompt_tokens)):
            return None
        return self.degrees_within(position - prompt_tokens)

    def degrees_within(self, generated: int) -> float | None:
        """As :meth:`degrees_at`, of a token that is known to lie in the window.

        Args:
            generated: the token's position from the first generated one.

        Raises:
            ValueError: each choice has an angle of its own.
        """
        degrees = self.angle
        if degrees is None:
            raise ValueError(f"an angle for each of {len(self.fan)} choices in one request")
        if isinstance(degrees, Ramp):
            degrees = canonical_degrees(degrees.at(generated))
        return None if self._stands_still(degrees) else degrees

    def to_wire(self) -> dict[str, Any]:
        """As plain values, for ``extra_args``: what a client could have sent."""
        wire = {
            "plane": self.plane,
            "digest": self.digest,
            "mode": self.mode,
            "tokens": self.tokens.to_wire(),
            "gate": self.gate,
        }
        if self.angle is None:
            wire["angles"] = [_plain(degrees) for degrees in self.fan]
        else:
            wire["angle"] = _plain(self.angle)
        if self.strength is not None:
            wire["strength"] = self.strength
        if self.keep_norm:
            wire["keep_norm"] = True
        return wire

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> Operation:
        """What :meth:`to_wire` gave.

        Raises:
            TypeError, ValueError, KeyError: anything else.
        """
        fields = dict(wire)
        tokens = Window.from_wire(fields.pop("tokens"))
        fan = tuple(map(_degrees, fields.pop("angles", ())))
        angle = None if fan else _degrees(fields.pop("angle"))
        return cls(angle=angle, tokens=tokens, fan=fan, **fields)


def _plain(degrees: float | Ramp) -> Any:
    return degrees.to_wire() if isinstance(degrees, Ramp) else degrees


def _degrees(wire: Any) -> float | Ramp:
    return Ramp.from_wire(wire) if isinstance(wire, Mapping) else wire


def choose(operations: Sequence[Operation], index: int) -> tuple[Operation, ...]:
    """What one choice of a request's answer is steered by."""
    chosen = (operation.choice(index) for operation in operations)
    return tuple(operation for operation in chosen if not operation.is_idle)


def fan_of(operations: Sequence[Operation]) -> int:
    """How many choices a request's operations give an angle each; 0 where all share theirs."""
    return max((len(operation.fan) for operation in operations), default=0)


def admitted(extra_args: Mapping[str, Any] | None) -> tuple[Operation, ...]:
    """The operations that admission wrote into a request's ``extra_args``.

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
        return tuple(Operation.from_wire(wire) for wire in extra_args.get(EXTRA_ARG) or ())
    except (TypeError, ValueError, KeyError) as error:
        raise RuntimeError(f"steering reached the engine without admission: {error}") from error
