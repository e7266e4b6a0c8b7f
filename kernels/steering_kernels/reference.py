"""The kernels' twins in plain torch, and the code that Inductor compiles on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from steering_kernels.rows import (
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
    SIN,
    SLOT,
    STRENGTH,
    Mode,
)

# Plain numbers: the compiler cannot compare a tensor with an enumeration's member.
_OFF, _ROTATE_TO, _ADD, _ABLATE = map(float, (Mode.OFF, Mode.ROTATE_TO, Mode.ADD, Mode.ABLATE))


def steer(h: Tensor, bank: Tensor, classes: Tensor, rows: Tensor) -> Tensor:
    """Apply each token's operations to its activation, one plane after the other.

    For a basis (b1, b2), c = (h.b1, h.b2), and u at the row's angle, an operation takes c to c' as
    :class:`steering_kernels.rows.Mode` says. What lies outside the plane stays, so a rotation keeps
    the norm; with ``keep`` set the others are scaled back to it.

    Args:
        h: [T, d], activations as the norm returns them.
        bank: [slots, 2, d] float32, this site's bases; a slot whose plane does not select the site
            is zero and leaves h as it is.
        classes: [slots, 5] float32, the planes' class means at this site, in activation units, see
            :mod:`steering_kernels.rows`; zero likewise.
        rows: [T, planes, 7] float32, see :mod:`steering_kernels.rows`.

    Returns:
        [T, d] in h's dtype. Accumulation is in float32, with one rounding at the end; tokens that
        no row acts on come back bit-exact.
    """
    steered, acted = operate(h.float(), bank, classes, rows)
    return torch.where(acted, steered.to(h.dtype), h)


def operate(x: Tensor, bank: Tensor, classes: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The operations in float32: [T, d] operated on, and [T, 1] whether any plane acted."""
    acted = torch.zeros_like(rows[:, :1, 0], dtype=torch.bool)  # [T, 1]
    for plane in range(rows.shape[1]):
        row = rows[:, plane]  # [T, 7]
        slot = row[:, SLOT].to(torch.int32)
        basis = bank[slot]  # [T, 2, d]
        b1, b2 = basis[:, 0], basis[:, 1]
        c1 = (x * b1).sum(-1, keepdim=True)  # [T, 1]
        c2 = (x * b2).sum(-1, keepdim=True)
        cos, sin, gate, mode, strength, keep = (
            row[:, i : i + 1] for i in (COS, SIN, GATE, MODE, STRENGTH, KEEP)
        )
        squared = c1 * c1 + c2 * c2
        r = squared.sqrt()
        to = mode == _ROTATE_TO
        turned1 = torch.where(to, r * cos, cos * c1 - sin * c2)
        turned2 = torch.where(to, r * sin, sin * c1 + cos * c2)

        along = cos * c1 + sin * c2
        step = _step(mode, strength, cos, sin, along, classes[slot])
        rotates = mode <= _ROTATE_TO
        d1 = torch.where(rotates, turned1 - c1, step * cos)
        d2 = torch.where(rotates, turned2 - c2, step * sin)
        # A zero vector has no direction to rotate; it is also what an empty slot gives.
        moves = torch.where(rotates, squared, step.abs())
        acts = (mode != _OFF) & (c1 > gate) & (moves > 0)

        # |h'|^2 = |h|^2 + gain. Of the two the smaller one is summed, so that the other is a sum
        # too: a difference would lose its digits where little is left. What is gone but for
        # rounding has no direction to keep a length in.
        gain = step * (along + along + step)
        down = torch.where(gain < 0, step, 0.0)
        smaller = (x + down * cos * b1 + down * sin * b2).square().sum(-1, keepdim=True)
        new = smaller + gain.clamp(min=0.0)
        old = smaller - gain.clamp(max=0.0)
        scale = torch.where((keep != 0) & (new > GONE * old), (old / new).sqrt(), 1.0)
        d1, d2, scale, acts = map(_once, (d1, d2, scale, acts))
        x = torch.where(acts, (x + d1 * b1 + d2 * b2) * scale, x)
        acted = acted | acts
    return x, acted


def _once(x: Tensor) -> Tensor:
    """A value a token, [T, 1], that the compiler keeps. For a CPU it would compute it anew with
    each few of the token's elements; what is asked for by its strides it puts into memory."""
    if x.device.type != "cpu":
        return x
    # Not x.shape: vLLM writes a shape out into as many arguments before it cuts a graph.
    return x.as_strided((x.shape[0], 1), x.stride())


def _step(
    mode: Tensor, strength: Tensor, cos: Tensor, sin: Tensor, along: Tensor, classes: Tensor
) -> Tensor:
    """[T, 1]: how far add, ablate and cap move along u; ``classes`` is [T, 5]."""
    positive1, positive2, negative1, negative2, rho = (
        classes[:, i : i + 1] for i in (POSITIVE1, POSITIVE2, NEGATIVE1, NEGATIVE2, RHO)
    )
    low = cos * negative1 + sin * negative2
    high = cos * positive1 + sin * positive2
    capped = (low + strength * (high - low) - along).clamp(max=0.0)
    ablated = torch.where(mode == _ABLATE, -strength * along, capped)
    return torch.where(mode == _ADD, strength * rho, ablated)


def add_rms_norm_steer(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    bank: Tensor,
    classes: Tensor,
    rows: Tensor,
    unit_offset: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """RMS norm of x + residual, steered; and the sum. Rounds where vLLM's norm does.

    Args:
        x: [T, d].
        residual: as x, or None.
        weight: [d], the gain.
        eps: added to the mean square.
        bank: [slots, 2, d] float32.
        classes: [slots, 5] float32.
        rows: [T, planes, 7] float32.
        unit_offset: the gain is 1 + weight, in float32 (Gemma); else the normed value is rounded
            to the gain's dtype before the product, as vLLM's norm does.

    Returns:
        [T, d] in x's dtype, and x + residual likewise (None without one).
    """
    value = x.float()
    total = None
    if residual is not None:
        value = value + residual.float()
        total = value.to(x.dtype)
    normed = value * _once(torch.rsqrt(value.square().mean(-1, keepdim=True) + eps))
    if unit_offset:
        normed = normed * (weight.float() + 1.0)
    else:
        normed = normed.to(weight.dtype).float() * weight.float()
    steered, _ = operate(normed, bank, classes, rows)
    return steered.to(x.dtype), total
