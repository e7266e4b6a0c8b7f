"""The kernels' twins in plain torch, and the code that Inductor fuses on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from steering_kernels.rows import COS, GATE, MODE, SIN, SLOT, Mode

# Plain numbers: the compiler cannot compare a tensor with an enumeration's member.
_OFF, _ROTATE_TO = float(Mode.OFF), float(Mode.ROTATE_TO)


def rotate(h: Tensor, bank: Tensor, rows: Tensor) -> Tensor:
    """Rotate each token's activation in its planes, one plane after the other.

    For a basis (b1, b2), c1 = h.b1, c2 = h.b2 and r = |(c1, c2)|, rotate_by takes (c1, c2) to
    R(angle)(c1, c2) (Selective Steering, Eq. 6) and rotate_to takes it to r (cos, sin) (Angular
    Steering). What lies outside the plane stays, so the norm does.

    Args:
        h: [T, d], activations as the norm returns them.
        bank: [slots, 2, d] float32, this site's bases; a slot whose plane does not select the site
            is zero and leaves h as it is.
        rows: [T, planes, 5] float32, see :mod:`steering_kernels.rows`.

    Returns:
        [T, d] in h's dtype. Accumulation is in float32, with one rounding at the end; tokens that
        no row acts on come back bit-exact.
    """
    turned, acted = turn(h.float(), bank, rows)
    return torch.where(acted, turned.to(h.dtype), h)


def turn(x: Tensor, bank: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The rotation in float32: [T, d] turned, and [T, 1] whether any plane acted."""
    acted = torch.zeros_like(rows[:, :1, 0], dtype=torch.bool)  # [T, 1]
    for plane in range(rows.shape[1]):
        row = rows[:, plane]  # [T, 5]
        basis = bank[row[:, SLOT].to(torch.int32)]  # [T, 2, d]
        b1, b2 = basis[:, 0], basis[:, 1]
        c1 = (x * b1).sum(-1, keepdim=True)  # [T, 1]
        c2 = (x * b2).sum(-1, keepdim=True)
        cos, sin, gate = (row[:, i : i + 1] for i in (COS, SIN, GATE))
        squared = c1 * c1 + c2 * c2
        r = squared.sqrt()
        to = row[:, MODE : MODE + 1] == _ROTATE_TO
        new1 = torch.where(to, r * cos, cos * c1 - sin * c2)
        new2 = torch.where(to, r * sin, sin * c1 + cos * c2)
        # A zero vector has no direction to rotate; it is also what an empty slot gives.
        acts = (row[:, MODE : MODE + 1] != _OFF) & (c1 > gate) & (squared > 0)
        x = torch.where(acts, x + (new1 - c1) * b1 + (new2 - c2) * b2, x)
        acted = acted | acts
    return x, acted


def add_rms_norm_rotate(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    bank: Tensor,
    rows: Tensor,
    unit_offset: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """RMS norm of x + residual, rotated; and the sum. Rounds where vLLM's norm does.

    Args:
        x: [T, d].
        residual: as x, or None.
        weight: [d], the gain.
        eps: added to the mean square.
        bank: [slots, 2, d] float32.
        rows: [T, planes, 5] float32.
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
    normed = value * torch.rsqrt(value.square().mean(-1, keepdim=True) + eps)
    if unit_offset:
        normed = normed * (weight.float() + 1.0)
    else:
        normed = normed.to(weight.dtype).float() * weight.float()
    turned, _ = turn(normed, bank, rows)
    return turned.to(x.dtype), total
