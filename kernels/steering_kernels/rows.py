"""What one token carries to a site: five numbers for each plane applied to it."""

from __future__ import annotations

import math
from enum import IntEnum

from steering_planes import cos_sin

COS, SIN, GATE, MODE, SLOT = range(5)
ROW_WIDTH = 5


class Mode(IntEnum):
    """How a row acts. OFF leaves the activation bit-exact."""

    OFF = 0
    ROTATE_BY = 1
    ROTATE_TO = 2


def encode_row(mode: Mode, degrees: float, slot: int, gate: float | None = None) -> list[float]:
    """One row as ``[cos, sin, gate, mode, slot]``.

    Mode and slot travel as floats so that a step needs a single tensor and a single copy; both are
    small integers, which float32 holds exactly.

    Args:
        mode: the transform (METHOD: rotate_by is Eq. 6 of Selective Steering, rotate_to is
            Angular Steering's target angle).
        degrees: the angle from b1 towards b2.
        slot: the plane's place in the bank, from 0.
        gate: act only where c1 > gate; None acts everywhere.
    """
    cos, sin = cos_sin(degrees)
    return [cos, sin, -math.inf if gate is None else gate, float(mode), float(slot)]


def identity_row() -> list[float]:
    """The row of a token that nothing steers."""
    return [1.0, 0.0, -math.inf, float(Mode.OFF), 0.0]
