"""Triton's kernels against double precision and against their twins in plain torch.

Without a GPU they run on Triton's interpreter.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from steering_kernels import Mode, add_rms_norm_rotate, encode_row, identity_row, reference, rotate
from steering_planes import orthonormalise

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WIDTHS = (2, 3, 64, 123, 252, 507, 576, 896, 2304, 3584, 8192)
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
EPS = 1e-5


class Case:
    """Random activations, bases and rows. Gates keep clear of c1: rounding never decides."""

    def __init__(self, seed: int, *, widest: int = max(WIDTHS)) -> None:
        self.rng = rng = random.Random(seed)
        torch.manual_seed(seed)
        self.hidden = rng.choice([w for w in WIDTHS if w <= widest])
        self.tokens = rng.randint(1, 3 if self.hidden > 1000 else 7)
        self.dtype = rng.choice(list(BITS))
        self.planes = rng.randint(1, 3)
        self.unit_offset = rng.random() < 0.3
        self.x, self.residual = self._activations(), self._activations()
        self.weight = (torch.rand(self.hidden) + 0.5).to(self.dtype)
        self.bank = torch.stack([orthonormalise(torch.randn(2, self.hidden)) for _ in range(3)])
        self.bank[2] = 0.0  # A plane that does not select this site.
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
        if self.rng.random() < 0.3:
            return identity_row()
        mode = self.rng.choice((Mode.ROTATE_BY, Mode.ROTATE_TO))
        gate = self.rng.choice((None, None, -1e6, 1e6))
        return encode_row(mode, self.rng.uniform(-360, 360), self.rng.randrange(3), gate)

    def on(self, *names: str) -> list[Any]:
        """Tensors, on the device under test."""
        return [getattr(self, name).to(DEVICE) for name in names]

    def truth(self, normed: Tensor) -> Tensor:
        """``normed`` [T, d] rotated, in double precision."""
        h = normed.double().clone()
        for t, rows in enumerate(self.rows.double()):
            for cos, sin, gate, mode, slot in rows:
                b1, b2 = self.bank[int(slot)].double()
                c1, c2 = h[t] @ b1, h[t] @ b2
                if mode == Mode.OFF or c1 <= gate:
                    continue
                new1, new2 = cos * c1 - sin * c2, sin * c1 + cos * c2
                if mode == Mode.ROTATE_TO:
                    r = torch.hypot(c1, c2)
                    new1, new2 = r * cos, r * sin
                h[t] += (new1 - c1) * b1 + (new2 - c2) * b2
        return h

    def norm_truth(self, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """The norm, unrotated, and the sum, in double precision."""
        total = self.x.double() + (0 if residual is None else residual.double())
        gain = self.weight.double() + (1 if self.unit_offset else 0)
        return total / (total.square().mean(-1, keepdim=True) + EPS).sqrt() * gain, total


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel leaves unwritten is not a number."""
    empty, empty_like = torch.empty, torch.empty_like

    def poison(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: Any, **kwargs: Any) -> Tensor:
            tensor = make(*args, **kwargs)
            return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

        return made

    monkeypatch.setattr(torch, "empty", poison(empty))
    monkeypatch.setattr(torch, "empty_like", poison(empty_like))


def error(got: Tensor, truth: Tensor) -> float:
    """The largest error, relative to the longest token."""
    assert got.isfinite().all()
    scale = max(float(truth.norm(dim=-1).max()), 1.0)
    return float((got.cpu().double() - truth).abs().max()) / scale


@pytest.mark.parametrize("seed", range(110))
def test_rotate_is_as_exact_as_plain_torch(seed: int) -> None:
    case = Case(seed)
    x, bank, rows = case.on("x", "bank", "rows")
    truth = case.truth(case.x)
    plain = reference.rotate(x, bank, rows)
    fast = rotate(x.clone(memory_format=torch.preserve_format), bank, rows, "triton")
    assert fast.dtype == case.dtype
    assert error(fast, truth) <= error(plain, truth) + 1e-6


@pytest.mark.parametrize("seed", range(110))
def test_add_rms_norm_rotate_is_as_exact_as_plain_torch(seed: int) -> None:
    case = Case(1000 + seed)
    x, weight, bank, rows = case.on("x", "weight", "bank", "rows")
    kept = x.clone()
    for residual in (None, *case.on("residual")):
        args = (x, residual, weight, EPS, bank, rows, case.unit_offset)
        plain, plain_total = add_rms_norm_rotate(*args)
        fast, total = add_rms_norm_rotate(*args, kernels="triton")
        normed, summed = case.norm_truth(None if residual is None else case.residual)
        truth = case.truth(normed)
        assert fast.dtype == case.dtype
        assert error(fast, truth) <= error(plain, truth) + 1e-6
        if residual is None:
            assert total is None
        else:
            assert total is not None
            assert plain_total is not None
            assert torch.equal(total, plain_total)
            assert torch.equal(total.cpu(), summed.to(case.dtype))
    assert torch.equal(x, kept)


@pytest.mark.parametrize("dtype", list(BITS), ids=str)
def test_a_token_without_steering_is_bit_exact(dtype: torch.dtype) -> None:
    """Off, gated out, at an empty slot: as the same kernel gives with no row on; in place, bits
    of NaN and of signed zeros too, and what lies beyond the rows."""
    torch.manual_seed(0)
    bank = torch.cat([orthonormalise(torch.randn(2, 96))[None], torch.zeros(1, 2, 96)])
    rows = torch.tensor(
        [
            [identity_row()],
            [encode_row(Mode.ROTATE_BY, 90, 0, gate=1e6)],
            [encode_row(Mode.ROTATE_TO, 90, 1)],
            [encode_row(Mode.ROTATE_TO, 90, 0)],
        ]
    )
    h = torch.randn(6, 100).to(dtype)
    h[0, 0], h[1, 1], h[0, 2] = -0.0, -0.0, torch.nan
    before = h.clone()
    rotate(h[:4, :96].to(DEVICE), bank.to(DEVICE), rows.to(DEVICE), "triton")
    on_device, bank, rows = h.to(DEVICE), bank.to(DEVICE), rows.to(DEVICE)
    rotate(on_device[:4, :96], bank, rows, "triton")
    after = on_device.cpu()
    same = after.view(BITS[dtype]) == before.view(BITS[dtype])
    assert same[[0, 1, 2, 4, 5]].all()
    assert same[3, 96:].all()
    assert not same[3, :96].all()

    x = torch.randn(4, 96).to(dtype).to(DEVICE)
    weight = torch.rand(96).to(dtype).to(DEVICE)
    off = torch.tensor([[identity_row()]] * 4).to(DEVICE)
    args = (x, x * 3, weight, EPS, bank)
    steered, total = add_rms_norm_rotate(*args, rows, kernels="triton")
    plain, plain_total = add_rms_norm_rotate(*args, off, kernels="triton")
    assert total is not None
    assert plain_total is not None
    assert torch.equal(total, plain_total)
    assert torch.equal(steered[:3], plain[:3])
    assert not torch.equal(steered[3], plain[3])


@pytest.mark.parametrize("hidden", [576, 4096])
def test_norms_are_kept(hidden: int) -> None:
    """In bf16, to 3e-4: what a kernel was given against what it returns, rounded once."""
    torch.manual_seed(hidden)
    bank = orthonormalise(torch.randn(2, hidden))[None].to(DEVICE)
    x = torch.randn(24, hidden).bfloat16().to(DEVICE)
    weight = (torch.rand(hidden) + 0.5).bfloat16().to(DEVICE)
    modes = (Mode.ROTATE_BY, Mode.ROTATE_TO)
    rows = torch.tensor([[encode_row(modes[i % 2], 15.0 * i, 0)] for i in range(24)]).to(DEVICE)
    normed = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + EPS)
    gained = normed.bfloat16().double() * weight.double()
    out, _ = add_rms_norm_rotate(x, None, weight, EPS, bank, rows, kernels="triton")
    for before, after in ((gained, out), (x, rotate(x.clone(), bank, rows, "triton"))):
        ratio = after.double().norm(dim=-1) / before.double().norm(dim=-1)
        assert float((ratio - 1).abs().max()) <= 3e-4


def test_no_tokens_are_no_launch() -> None:
    h, bank, rows = torch.zeros(0, 64), torch.zeros(1, 2, 64), torch.zeros(0, 1, 5)
    h, bank, rows = (t.to(DEVICE) for t in (h, bank, rows))
    assert rotate(h, bank, rows, "triton").shape == (0, 64)
    out, total = add_rms_norm_rotate(h, h, torch.ones(64).to(DEVICE), EPS, bank, rows)
    assert out.shape == (0, 64)
    assert total is not None


def test_shapes_that_do_not_fit_are_named() -> None:
    x, bank, rows = torch.zeros(4, 32), torch.zeros(1, 2, 32), torch.zeros(4, 1, 5)
    with pytest.raises(ValueError, match=r"residual must be \[4, 32\], got \[3, 32\]"):
        add_rms_norm_rotate(x, x[:3], torch.ones(32), EPS, bank, rows, kernels="triton")
    with pytest.raises(ValueError, match=r"weight must be \[32\], got \[31\]"):
        add_rms_norm_rotate(x, None, torch.ones(31), EPS, bank, rows, kernels="triton")


@pytest.mark.parametrize("op", ["rotate_", "rms_norm_rotate", "add_rms_norm_rotate"])
def test_the_compiler_is_told_the_truth(op: str) -> None:
    """Schema, aliasing and fake implementation, by torch's own checks."""
    case = Case(3, widest=252)
    x, residual, weight, bank, rows = case.on("x", "residual", "weight", "bank", "rows")
    args = {
        "rotate_": (x.contiguous(), bank, rows),
        "rms_norm_rotate": (x, weight, EPS, bank, rows, False),
        "add_rms_norm_rotate": (x, residual, weight, EPS, bank, rows, False),
    }[op]
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(getattr(torch.ops.steering, op).default, args, test_utils=checks)


def test_a_graph_with_the_kernels_in_it_is_the_eager_one() -> None:
    case = Case(5, widest=252)
    x, residual, weight, bank, rows = case.on("x", "residual", "weight", "bank", "rows")

    def layer(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        out, total = add_rms_norm_rotate(x, residual, weight, EPS, bank, rows, kernels="triton")
        assert total is not None
        return rotate(out * 2, bank, rows, "triton") + 1, total

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(x, residual), layer(x, residual), strict=True):
        assert torch.equal(got, expected)
