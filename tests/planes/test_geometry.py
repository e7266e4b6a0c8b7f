"""steering_planes.geometry: the properties that METHOD.md promises."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from steering_planes.geometry import (
    canonical_degrees,
    cos_sin,
    orthonormalise,
    orthonormality_error,
    rotate_by,
    rotate_to,
)

angles = st.floats(-720, 720)


@st.composite
def planes(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Activations [5, d] and an orthonormal float64 basis [2, d]."""
    d = draw(st.integers(2, 67))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    q, _ = torch.linalg.qr(torch.randn(d, 2, generator=generator, dtype=torch.float64))
    return torch.randn(5, d, generator=generator, dtype=torch.float64), q.T


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@given(planes(), angles)
def test_both_modes_preserve_the_norm(plane: tuple[Tensor, Tensor], angle: float) -> None:
    h, basis = plane
    for rotate in (rotate_by, rotate_to):
        close(rotate(h, basis, angle).norm(dim=-1), h.norm(dim=-1))


@given(planes(), angles, angles)
def test_rotations_add(plane: tuple[Tensor, Tensor], a: float, b: float) -> None:
    h, basis = plane
    close(rotate_by(rotate_by(h, basis, a), basis, b), rotate_by(h, basis, a + b))


@given(planes(), angles)
def test_rotate_to_sets_the_angle_and_is_idempotent(
    plane: tuple[Tensor, Tensor], angle: float
) -> None:
    h, basis = plane
    once = rotate_to(h, basis, angle)
    close(rotate_to(once, basis, angle), once)
    r = (h @ basis.T).norm(dim=-1)
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    close(once @ basis.T, torch.stack((r * cos, r * sin), dim=-1))


@given(planes(), angles)
def test_nothing_outside_the_plane_changes(plane: tuple[Tensor, Tensor], angle: float) -> None:
    h, basis = plane
    outside = torch.eye(h.shape[-1], dtype=torch.float64) - basis.T @ basis
    for rotate in (rotate_by, rotate_to):
        close(rotate(h, basis, angle) @ outside, h @ outside)


@given(planes(), angles, st.floats(-1, 1))
def test_the_gate_lets_rows_through_bit_exact(
    plane: tuple[Tensor, Tensor], angle: float, gate: float
) -> None:
    h, basis = plane
    open_rows = h @ basis[0] > gate
    for rotate in (rotate_by, rotate_to):
        out = rotate(h, basis, angle, gate)
        assert torch.equal(out[~open_rows], h[~open_rows])
        close(out[open_rows], rotate(h, basis, angle)[open_rows])


def test_the_gate_is_strict() -> None:
    h, basis = torch.tensor([[1.0, 0.0]]), torch.eye(2)
    assert torch.equal(rotate_by(h, basis, 180, gate=1.0), h.double())
    assert torch.equal(rotate_by(h, basis, 180, gate=0.5), -h.double())


def test_angles_grow_from_b1_toward_b2() -> None:
    h, basis = torch.tensor([2.0, 0.0, 5.0]), torch.eye(3)[:2]
    assert rotate_by(h, basis, 90).tolist() == [0.0, 2.0, 5.0]
    assert rotate_to(-h, basis, 90).tolist() == [0.0, 2.0, -5.0]


@given(planes())
def test_a_turn_of_zero_is_the_identity_bit_for_bit(plane: tuple[Tensor, Tensor]) -> None:
    h, basis = plane
    for angle in (0.0, 360.0, -360.0, 720.0):
        assert torch.equal(rotate_by(h, basis, angle), h)


def test_computes_in_float64_whatever_comes_in() -> None:
    h = torch.randn(3, 4, 8, dtype=torch.bfloat16)
    out = rotate_by(h, torch.eye(8)[:2], 30)
    assert out.dtype == torch.float64
    assert out.shape == h.shape


def test_a_basis_of_another_width_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\[2, 9\].*\[2, 8\]"):
        rotate_to(torch.zeros(8), torch.eye(9)[:2], 0)


@pytest.mark.parametrize(
    ("angle", "canonical"),
    [
        (360, 0.0),
        (-360, 0.0),
        (-90, 270.0),
        (725, 5.0),
        (-0.0, 0.0),
        (-1e-300, 0.0),
        (359.999, 359.999),
    ],
)
def test_canonical_degrees(angle: float, canonical: float) -> None:
    got = canonical_degrees(angle)
    assert got == canonical
    assert math.copysign(1.0, got) == 1.0


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_canonical_degrees_lie_in_one_turn(angle: float) -> None:
    got = canonical_degrees(angle)
    assert 0.0 <= got < 360.0
    assert canonical_degrees(got) == got


@pytest.mark.parametrize("angle", [math.nan, math.inf, -math.inf])
def test_canonical_degrees_refuses_what_is_no_angle(angle: float) -> None:
    with pytest.raises(ValueError, match="finite number of degrees"):
        canonical_degrees(angle)


def test_cos_sin_is_exact_on_the_axes() -> None:
    exact = {0: (1, 0), 90: (0, 1), 180: (-1, 0), 270: (0, -1), 360: (1, 0), -90: (0, -1)}
    for angle, expected in exact.items():
        assert cos_sin(angle) == expected
        assert all(math.copysign(1, x) == 1 for x in cos_sin(angle) if x == 0)


@given(st.floats(-360, 360))
def test_cos_sin_agrees_with_the_library(angle: float) -> None:
    expected = (math.cos(math.radians(angle)), math.sin(math.radians(angle)))
    assert cos_sin(angle) == pytest.approx(expected, abs=1e-14)


@given(planes(), st.floats(-0.9, 0.9), st.floats(0.1, 10))
def test_orthonormalise_keeps_b1_and_the_plane(
    plane: tuple[Tensor, Tensor], shear: float, scale: float
) -> None:
    _, basis = plane
    skewed = torch.stack((scale * basis[0], basis[1] + shear * basis[0]))
    out = orthonormalise(skewed)
    assert out.dtype == torch.float32
    assert orthonormality_error(out) < 1e-6
    torch.testing.assert_close(out, basis.float(), rtol=0, atol=1e-5)


def test_orthonormality_error_sees_length_and_angle() -> None:
    assert orthonormality_error(torch.eye(4)[:2]) == 0.0
    assert orthonormality_error(torch.tensor([[1.1, 0.0], [0.0, 1.0]])) == pytest.approx(0.21)
    assert orthonormality_error(torch.tensor([[1.0, 0.0], [0.3, 1.0]])) == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("basis", "rule"),
    [
        (torch.eye(3), r"shape \[3, 3\]"),
        (torch.ones(2), r"shape \[2\]"),
        (torch.tensor([[1.0, math.nan], [0.0, 1.0]]), "NaN"),
        (torch.tensor([[0.0, 0.0], [0.0, 1.0]]), "zeros"),
        (torch.tensor([[1.0, 2.0], [2.0, 4.0]]), "parallel"),
    ],
)
def test_orthonormalise_refuses_what_spans_no_plane(basis: Tensor, rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        orthonormalise(basis)
