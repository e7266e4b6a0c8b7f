"""Bases, angles and operations in double precision: the truth that every kernel is held to.

Degrees outside, radians inside. A basis is a tensor [2, d] with rows b1, b2; for an activation h
the plane's coordinates are c1 = h.b1 and c2 = h.b2, and r = sqrt(c1^2 + c2^2).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

# b2 is what is left of the second row after b1 is taken out; below this share of its length it is
# noise of the input's own rounding (bf16 planes are off by 5e-3).
_PARALLEL = 1e-2

_QUARTERS = ((1.0, 0.0), (0.0, 1.0), (-1.0, 0.0), (0.0, -1.0))


def orthonormalise(basis: Tensor) -> Tensor:
    """The orthonormal basis [2, d] float32 that keeps b1's direction and the plane.

    Gram-Schmidt in float64, twice, since one pass loses digits on nearly parallel rows. Raises
    ValueError for a wrong shape, non-finite entries, a zero row or (nearly) parallel rows.
    """
    if basis.ndim != 2 or basis.shape[0] != 2 or basis.shape[1] < 2:
        raise ValueError(f"basis has shape {list(basis.shape)}: must be [2, d] with d >= 2")
    rows = basis.detach().to(torch.float64)
    if not bool(rows.isfinite().all()):
        raise ValueError("basis has entries that are NaN or infinite")
    lengths = rows.norm(dim=1)
    if float(lengths.min()) == 0.0:
        raise ValueError("basis has a row of zeros")
    b1, b2 = rows / lengths[:, None]
    b2 = b2 - (b2 @ b1) * b1
    left = float(b2.norm())
    if left < _PARALLEL:
        raise ValueError(f"rows of the basis are parallel: {left:.1e} of b2 is orthogonal to b1")
    b2 = b2 / left
    b2 = b2 - (b2 @ b1) * b1
    return torch.stack((b1, b2 / b2.norm())).to(torch.float32)


def orthonormality_error(basis: Tensor) -> float:
    """max |B B^T - I| over the four entries, in float64, for a basis B [2, d]."""
    rows = basis.detach().to(torch.float64)
    gram = rows @ rows.T
    return float((gram - torch.eye(2, dtype=gram.dtype, device=gram.device)).abs().max())


def canonical_degrees(angle: float) -> float:
    """The same direction in [0, 360): 360 -> 0, -90 -> 270, -0.0 -> 0.0.

    Raises ValueError if the angle isn't finite.
    """
    if not math.isfinite(angle):
        raise ValueError(f"angle={angle}: must be a finite number of degrees")
    turned = math.fmod(angle, 360.0)  # exact, with the angle's sign
    if turned < 0.0:
        turned += 360.0  # rounds to 360.0 for a tiny negative
    return 0.0 if turned in (0.0, 360.0) else turned


def cos_sin(degrees: float) -> tuple[float, float]:
    """(cos, sin) of an angle in degrees, exact at multiples of 90."""
    turned = canonical_degrees(degrees)
    quarter = round(turned / 90.0)
    rest = math.radians(turned - 90.0 * quarter)  # within 45 degrees of an axis
    c, s = math.cos(rest), math.sin(rest)
    qc, qs = _QUARTERS[quarter % 4]
    # + 0.0 turns -0.0 into 0.0
    return qc * c - qs * s + 0.0, qs * c + qc * s + 0.0


def rotate_by(h: Tensor, basis: Tensor, degrees: float, gate: float | None = None) -> Tensor:
    """Rotate activations [..., d] by an angle within the plane; returns float64 [..., d].

    h' = h + ((cos - 1) c1 - sin c2) b1 + (sin c1 + (cos - 1) c2) b2, with cos and sin of the angle
    (Selective Steering, arXiv 2601.19375, Eq. 6 and 10). With a gate only rows with c1 > gate
    change; the others come through bit-exact.
    """
    x, b1, b2, c1, c2 = _coordinates(h, basis)
    cos, sin = cos_sin(degrees)
    out = x + ((cos - 1) * c1 - sin * c2) * b1 + (sin * c1 + (cos - 1) * c2) * b2
    return _gated(x, out, c1, gate)


def rotate_to(h: Tensor, basis: Tensor, degrees: float, gate: float | None = None) -> Tensor:
    """Turn activations [..., d] to an absolute angle from b1; returns float64 [..., d].

    (c1', c2') = r (cos, sin): idempotent, and 0 degrees isn't the identity (Angular Steering,
    arXiv 2510.26243, "standard"). With a gate only rows with c1 > gate change ("adaptive").
    """
    x, b1, b2, c1, c2 = _coordinates(h, basis)
    cos, sin = cos_sin(degrees)
    r = torch.hypot(c1, c2)
    out = x + (r * cos - c1) * b1 + (r * sin - c2) * b2
    return _gated(x, out, c1, gate)


def add(
    h: Tensor, basis: Tensor, degrees: float, distance: float, gate: float | None = None
) -> Tensor:
    """Move activations [..., d] by a distance along u, the direction at an angle; float64.

    c' = c + distance u: activation addition (Turner et al., arXiv 2308.10248; CAA, Rimsky et al.,
    arXiv 2312.06681). `distance` is in the activations' own units. With a gate only rows with
    c1 > gate change.
    """
    return _along(h, basis, degrees, lambda a: a + distance, gate)


def ablate(
    h: Tensor, basis: Tensor, degrees: float, share: float = 1.0, gate: float | None = None
) -> Tensor:
    """Take a share of what activations [..., d] have along u, the direction at an angle; float64.

    c' = c - share (c.u) u: directional ablation (Arditi et al., arXiv 2406.11717). With a gate only
    rows with c1 > gate change.
    """
    return _along(h, basis, degrees, lambda a: a - share * a, gate)


def cap(
    h: Tensor, basis: Tensor, degrees: float, limit: float, gate: float | None = None
) -> Tensor:
    """Hold activations [..., d] to a limit along u, the direction at an angle; returns float64.

    c' = c - max(c.u - limit, 0) u: activation capping (Lu et al., arXiv 2601.10387). The angle
    + 180 with the limit's negative is a floor. With a gate only rows with c1 > gate change.
    """
    return _along(h, basis, degrees, lambda a: a.clamp(max=limit), gate)


def keep_norm(h: Tensor, out: Tensor) -> Tensor:
    """`out` [..., d] scaled to the lengths of `h`, float64; a row of zeros stays."""
    wanted = h.to(torch.float64).norm(dim=-1, keepdim=True)
    length = out.norm(dim=-1, keepdim=True)
    return out * torch.where(length > 0, wanted / length, 1.0)


def _along(
    h: Tensor,
    basis: Tensor,
    degrees: float,
    change: Callable[[Tensor], Tensor],
    gate: float | None,
) -> Tensor:
    """`change` applied to the coordinate along u; what is across it stays."""
    x, b1, b2, c1, c2 = _coordinates(h, basis)
    cos, sin = cos_sin(degrees)
    along = cos * c1 + sin * c2
    return _gated(x, x + (change(along) - along) * (cos * b1 + sin * b2), c1, gate)


def _coordinates(h: Tensor, basis: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(h, b1, b2, c1, c2) in float64; c1 and c2 are [..., 1]."""
    if basis.shape != (2, h.shape[-1]):
        raise ValueError(
            f"basis has shape {list(basis.shape)}: must be [2, {h.shape[-1]}] for activations "
            f"{list(h.shape)}"
        )
    x = h.to(torch.float64)
    b1, b2 = basis.to(device=h.device, dtype=torch.float64)
    return x, b1, b2, (x @ b1)[..., None], (x @ b2)[..., None]


def _gated(x: Tensor, out: Tensor, c1: Tensor, gate: float | None) -> Tensor:
    return out if gate is None else torch.where(c1 > gate, out, x)
