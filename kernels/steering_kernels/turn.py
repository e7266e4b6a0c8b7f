"""The rotation of one token's activation, in registers: the part that every kernel shares."""

import triton
import triton.language as tl

from steering_kernels.rows import COS, GATE, MODE, ROW_WIDTH, SIN, SLOT, Mode

# A kernel sees only constants of its own kind.
_COS, _SIN, _GATE = tl.constexpr(COS), tl.constexpr(SIN), tl.constexpr(GATE)
_MODE, _SLOT = tl.constexpr(MODE), tl.constexpr(SLOT)
WIDTH = tl.constexpr(ROW_WIDTH)
_OFF, _ROTATE_TO = tl.constexpr(float(Mode.OFF)), tl.constexpr(float(Mode.ROTATE_TO))


@triton.jit
def is_steered(row, PLANES: tl.constexpr):
    """Whether any of a token's rows is on; ``row`` points at [PLANES, 5] float32."""
    steered = tl.load(row + _MODE) != _OFF
    for plane in tl.static_range(1, PLANES):
        steered |= tl.load(row + plane * WIDTH + _MODE) != _OFF
    return steered


@triton.jit
def turn(x, row, bank, columns, within, HIDDEN: tl.constexpr, PLANES: tl.constexpr):
    """Rotate x in one plane after the other, as :func:`steering_kernels.reference.turn` does.

    Args:
        x: [BLOCK] float32, zero beyond HIDDEN.
        row: pointer to [PLANES, 5] float32.
        bank: pointer to [slots, 2, HIDDEN] float32.
        columns: [BLOCK], 0, 1, ….
        within: [BLOCK], columns < HIDDEN.

    Returns:
        x rotated, and whether any plane acted on it.
    """
    acted = False
    for plane in tl.static_range(PLANES):
        at = row + plane * WIDTH
        mode = tl.load(at + _MODE)
        if mode != _OFF:
            basis = bank + tl.load(at + _SLOT).to(tl.int64) * (2 * HIDDEN)
            b1 = tl.load(basis + columns, mask=within, other=0.0)
            b2 = tl.load(basis + HIDDEN + columns, mask=within, other=0.0)
            c1 = tl.sum(x * b1)
            c2 = tl.sum(x * b2)
            squared = c1 * c1 + c2 * c2
            # A zero vector has no direction to rotate; it is also what an empty slot gives.
            if (c1 > tl.load(at + _GATE)) & (squared > 0):
                cos = tl.load(at + _COS)
                sin = tl.load(at + _SIN)
                r = tl.sqrt_rn(squared)
                to = mode == _ROTATE_TO
                new1 = tl.where(to, r * cos, cos * c1 - sin * c2)
                new2 = tl.where(to, r * sin, sin * c1 + cos * c2)
                x += (new1 - c1) * b1 + (new2 - c2) * b2
                acted = True
    return x, acted
