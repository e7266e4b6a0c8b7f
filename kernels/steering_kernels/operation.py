"""What a row does to one token's activation, in registers: the part that every kernel shares."""

import triton
import triton.language as tl

from steering_kernels.rows import (
    CLASSES_WIDTH,
    COS,
    GATE,
    GONE,
    KEEP,
    MODE,
    NEGATIVE1,
    NEGATIVE2,
    POSITIVE1,
    POSITIVE2,
    RHO,
    ROW_WIDTH,
    SIN,
    SLOT,
    STRENGTH,
    Mode,
)

# A kernel sees only constants of its own kind.
_COS, _SIN, _GATE = tl.constexpr(COS), tl.constexpr(SIN), tl.constexpr(GATE)
_MODE, _SLOT = tl.constexpr(MODE), tl.constexpr(SLOT)
_STRENGTH, _KEEP = tl.constexpr(STRENGTH), tl.constexpr(KEEP)
_POSITIVE1, _POSITIVE2 = tl.constexpr(POSITIVE1), tl.constexpr(POSITIVE2)
_NEGATIVE1, _NEGATIVE2 = tl.constexpr(NEGATIVE1), tl.constexpr(NEGATIVE2)
_RHO = tl.constexpr(RHO)
_GONE = tl.constexpr(GONE)
WIDTH, _CLASSES = tl.constexpr(ROW_WIDTH), tl.constexpr(CLASSES_WIDTH)
OFF, _ROTATE_TO = tl.constexpr(float(Mode.OFF)), tl.constexpr(float(Mode.ROTATE_TO))
_ADD, _ABLATE = tl.constexpr(float(Mode.ADD)), tl.constexpr(float(Mode.ABLATE))


@triton.jit
def is_steered(row, PLANES: tl.constexpr):
    """Whether any of a token's rows is on; ``row`` points at [PLANES, 7] float32."""
    steered = tl.load(row + _MODE) != OFF
    for plane in tl.static_range(1, PLANES):
        steered |= tl.load(row + plane * WIDTH + _MODE) != OFF
    return steered


@triton.jit
def operate(x, row, bank, classes, columns, within, HIDDEN: tl.constexpr, PLANES: tl.constexpr):
    """Apply one row after the other to x, as :func:`steering_kernels.reference.operate` does.

    Args:
        x: [BLOCK] float32, zero beyond HIDDEN.
        row: pointer to [PLANES, 7] float32.
        bank: pointer to [slots, 2, HIDDEN] float32.
        classes: pointer to [slots, 5] float32.
        columns: [BLOCK], 0, 1, ….
        within: [BLOCK], columns < HIDDEN.

    Returns:
        x operated on, and whether any plane acted on it.
    """
    acted = False
    for plane in tl.static_range(PLANES):
        at = row + plane * WIDTH
        mode = tl.load(at + _MODE)
        if mode != OFF:
            slot = tl.load(at + _SLOT).to(tl.int64)
            basis = bank + slot * (2 * HIDDEN)
            b1 = tl.load(basis + columns, mask=within, other=0.0)
            b2 = tl.load(basis + HIDDEN + columns, mask=within, other=0.0)
            x, acts = act(x, b1, b2, tl.sum(x * b1), tl.sum(x * b2), at, mode, classes, slot)
            acted |= acts
    return x, acted


@triton.jit
def mode_and_slot(row):
    """A row's mode and slot; ``row`` points at [7] float32."""
    return tl.load(row + _MODE), tl.load(row + _SLOT).to(tl.int64)


@triton.jit
def act(x, b1, b2, c1, c2, row, mode, classes, slot):
    """Apply one row, which is on, to x.

    Args:
        x: [BLOCK] float32, zero beyond the hidden size.
        b1, b2: [BLOCK] float32, likewise.
        c1, c2: x's coordinates.
        row: pointer to [7] float32.
        mode: of the row.
        classes: pointer to [slots, 5] float32.
        slot: of the row.

    Returns:
        x operated on, and whether the row acted on it.
    """
    cos = tl.load(row + _COS)
    sin = tl.load(row + _SIN)
    squared = c1 * c1 + c2 * c2
    along = cos * c1 + sin * c2
    step = 0.0
    if mode <= _ROTATE_TO:
        r = tl.sqrt_rn(squared)
        to = mode == _ROTATE_TO
        d1 = tl.where(to, r * cos, cos * c1 - sin * c2) - c1
        d2 = tl.where(to, r * sin, sin * c1 + cos * c2) - c2
        # A zero vector has no direction to rotate; it is also what an empty slot gives.
        moves = squared
    else:
        strength = tl.load(row + _STRENGTH)
        means = classes + slot * _CLASSES
        if mode == _ADD:
            step = strength * tl.load(means + _RHO)
        elif mode == _ABLATE:
            step = -strength * along
        else:
            low = cos * tl.load(means + _NEGATIVE1) + sin * tl.load(means + _NEGATIVE2)
            high = cos * tl.load(means + _POSITIVE1) + sin * tl.load(means + _POSITIVE2)
            step = tl.minimum(low + strength * (high - low) - along, 0.0)
        d1 = step * cos
        d2 = step * sin
        moves = tl.abs(step)
    acts = (c1 > tl.load(row + _GATE)) & (moves > 0)
    if acts:
        scale = 1.0
        if tl.load(row + _KEEP) != 0:
            # |h'|^2 = |h|^2 + gain. Of the two the smaller one is summed, so that the other is a
            # sum too: a difference would lose its digits where little is left.
            gain = step * (along + along + step)
            down = tl.where(gain < 0, step, 0.0)
            least = x + down * cos * b1 + down * sin * b2
            smaller = tl.sum(least * least)
            new = smaller + tl.maximum(gain, 0.0)
            old = smaller + tl.maximum(-gain, 0.0)
            # What is gone but for rounding has no direction to keep a length in.
            if new > _GONE * old:
                scale = tl.sqrt_rn(old / new)
        x = (x + d1 * b1 + d2 * b2) * scale
    return x, acts
