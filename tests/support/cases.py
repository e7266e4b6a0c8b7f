"""Random activations, bases and rows, and what double precision makes of them."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from steering_kernels import Mode, encode_row, identity_row
from steering_planes import orthonormalise

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WIDTHS = (2, 3, 64, 123, 252, 507, 576, 896, 2304, 3584, 8192)
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
EPS = 1e-5


ROTATIONS = (Mode.ROTATE_BY, Mode.ROTATE_TO)
OPERATIONS = (*ROTATIONS, Mode.ADD, Mode.ABLATE, Mode.CAP)


def row(
    rng: random.Random, mode: Mode, slot: int, gate: float | None, *, keep_norm: bool
) -> list[float]:
    """A row of an operation, at a random angle and with a strength that it may have."""
    strength = {
        Mode.ADD: rng.uniform(-3, 3),
        Mode.ABLATE: rng.random(),
        Mode.CAP: rng.uniform(-2, 1),
    }
    keep_norm &= mode not in ROTATIONS
    return encode_row(mode, rng.uniform(-360, 360), slot, gate, strength.get(mode, 0.0), keep_norm)


class Case:
    """Random activations, bases and rows. Gates keep clear of c1: rounding never decides."""

    def __init__(self, seed: int, *, widest: int = max(WIDTHS), **chosen: Any) -> None:
        self.rng = rng = random.Random(seed)
        torch.manual_seed(seed)
        self.hidden = rng.choice([w for w in WIDTHS if w <= widest])
        self.tokens = rng.randint(1, 3 if self.hidden > 1000 else 7)
        self.dtype = rng.choice(list(BITS))
        self.planes = rng.randint(1, 3)
        self.unit_offset = rng.random() < 0.3
        vars(self).update(chosen)
        self.x, self.residual = self._activations(), self._activations()
        self.weight = (torch.rand(self.hidden) + 0.5).to(self.dtype)
        self.bank = torch.stack([orthonormalise(torch.randn(2, self.hidden)) for _ in range(3)])
        self.classes = torch.cat([torch.randn(3, 4), torch.rand(3, 1) + 0.1], 1)
        # A plane that does not select this site.
        self.bank[2] = 0.0
        self.classes[2] = 0.0
        self.rows = torch.tensor(
            [[self._row() for _ in range(self.planes)] for _ in range(self.tokens)]
        )

    def _activations(self) -> Tensor:
        """[tokens, hidden], now and then with a stride between tokens that is not its width."""
        room = self.rng.choice((0, 0, 8, 5))
        scale = self.rng.choice((0.1, 1.0, 30.0))
        wide = torch.randn(self.tokens, self.hidden + room) * scale
        return wide.to(self.dtype)[:, : self.hidden]

    def _row(self) -> list[float]:
        rng = self.rng
        if rng.random() < 0.3:
            return identity_row()
        mode, gate = rng.choice(OPERATIONS), rng.choice((None, None, -1e6, 1e6))
        return row(rng, mode, rng.randrange(3), gate, keep_norm=rng.random() < 0.5)

    def on(self, *names: str) -> list[Any]:
        """Tensors, on the device under test."""
        return [getattr(self, name).to(DEVICE) for name in names]

    def truth(self, normed: Tensor) -> Tensor:
        """``normed`` [T, d] steered, in double precision."""
        h = normed.double().clone()
        for t, rows in enumerate(self.rows.double()):
            for cos, sin, gate, mode, slot, s, keep in rows:
                basis, (pos1, pos2, neg1, neg2, rho) = (
                    each[int(slot)].double() for each in (self.bank, self.classes)
                )
                c, u = basis @ h[t], torch.stack((cos, sin))
                if mode == Mode.OFF or c[0] <= gate or not basis.any():
                    continue
                a = c @ u
                low, high = u[0] * neg1 + u[1] * neg2, u[0] * pos1 + u[1] * pos2
                limit = low + s * (high - low)
                new = {
                    Mode.ROTATE_BY: torch.stack((cos * c[0] - sin * c[1], sin * c[0] + cos * c[1])),
                    Mode.ROTATE_TO: c.norm() * u,
                    Mode.ADD: c + s * rho * u,
                    Mode.ABLATE: c - s * a * u,
                    Mode.CAP: c - (a - limit).clamp(min=0) * u,
                }[Mode(int(mode))]
                length = h[t].norm()
                h[t] += (new - c) @ basis
                if keep:
                    h[t] *= length / h[t].norm()
        return h

    def norm_truth(self, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """The norm, unrotated, and the sum, in double precision."""
        total = self.x.double() + (0 if residual is None else residual.double())
        gain = self.weight.double() + (1 if self.unit_offset else 0)
        return total / (total.square().mean(-1, keepdim=True) + EPS).sqrt() * gain, total


def error(got: Tensor, truth: Tensor) -> float:
    """The largest error, relative to the longest token."""
    assert got.isfinite().all()
    scale = max(float(truth.norm(dim=-1).max()), 1.0)
    return float((got.cpu().double() - truth).abs().max()) / scale
