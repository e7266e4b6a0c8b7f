"""What one token carries to a site: seven numbers for each plane applied to it."""

from __future__ import annotations

import math
from enum import IntEnum

from steering_planes import cos_sin

COS, SIN, GATE, MODE, SLOT, STRENGTH, KEEP = range(7)
ROW_WIDTH = 7

POSITIVE1, POSITIVE2, NEGATIVE1, NEGATIVE2, RHO = range(5)
CLASSES_WIDTH = 5
"""What a site knows of a plane's two classes beside the basis: the coordinates (c1, c2) of the
positive and of the negative class's mean, and rho, the length of the means' difference."""


GONE = 1e-10
"""The share of an activation's squared length below which what is left of it is rounding."""


class Mode(IntEnum):
    """How a row acts on the coordinates c in a plane; u is the direction at the row's angle.

    OFF leaves the activation bit-exact. The rotations come first: kernels tell them by that.
    """

    OFF = 0
    ROTATE_BY = 1
    """c' = R(angle) c: Selective Steering, Eq. 6 (arXiv 2601.19375)."""
    ROTATE_TO = 2
    """c' = |c| u: Angular Steering (arXiv 2510.26243)."""
    ADD = 3
    """c' = c + s rho u: activation addition (Turner et al., arXiv 2308.10248; Rimsky et al.,
    arXiv 2312.06681)."""
    ABLATE = 4
    """c' = c - s (c.u) u: directional ablation (Arditi et al., arXiv 2406.11717)."""
    CAP = 5
    """c' = c - max(c.u - t, 0) u: activation capping (Lu et al., arXiv 2601.10387)."""


def encode_row(
    mode: Mode,
    degrees: float,
    slot: int,
    gate: float | None = None,
    strength: float = 0.0,
    keep_norm: bool = False,
) -> list[float]:
    """One row as ``[cos, sin, gate, mode, slot, strength, keep]``.

    Mode, slot and keep travel as floats so that a step needs a single tensor and a single copy;
    all are small integers, which float32 holds exactly.

    Args:
        mode: the operation.
        degrees: the angle of u from b1 towards b2.
        slot: the plane's place in the bank, from 0.
        gate: act only where c1 > gate; None acts everywhere.
        strength: s of ADD, in units of the site's rho, and of ABLATE, a share; of CAP the limit,
            0 where the negative class's mean lies on u, 1 where the positive one's does.
            Rotations have none.
        keep_norm: scale what comes out to the length of what came in. Rotations keep it anyway.
    """
    cos, sin = cos_sin(degrees)
    threshold = -math.inf if gate is None else gate
    return [cos, sin, threshold, float(mode), float(slot), strength, float(keep_norm)]


def identity_row() -> list[float]:
    """The row of a token that nothing steers."""
    return [1.0, 0.0, -math.inf, float(Mode.OFF), 0.0, 0.0, 0.0]
