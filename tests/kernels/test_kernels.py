"""Triton's kernels against double precision and against their twins in plain torch.

Without a GPU they run on Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._device import _device_constructors

from cases import BITS, DEVICE, EPS, OPERATIONS, ROTATIONS, Case, error, row
from steering_kernels import (
    Mode,
    add_rms_norm_steer,
    encode_row,
    identity_row,
    norm_kernel,
    reference,
    steer,
)
from steering_kernels.tuning import LAYOUTS, Layout
from steering_planes import orthonormalise


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel leaves unwritten is not a number."""
    # torch remembers what makes tensors when a device's context is first entered. Remembering ours,
    # it would never again put a model on "meta".
    _device_constructors()
    empty, empty_like = torch.empty, torch.empty_like

    def poison(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: Any, **kwargs: Any) -> Tensor:
            tensor = make(*args, **kwargs)
            return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

        return made

    monkeypatch.setattr(torch, "empty", poison(empty))
    monkeypatch.setattr(torch, "empty_like", poison(empty_like))


@pytest.mark.parametrize("seed", range(110))
def test_steer_is_as_exact_as_plain_torch(seed: int) -> None:
    case = Case(seed)
    x, bank, classes, rows = case.on("x", "bank", "classes", "rows")
    truth = case.truth(case.x)
    plain = reference.steer(x, bank, classes, rows)
    fast = steer(x.clone(memory_format=torch.preserve_format), bank, classes, rows, "triton")
    assert fast.dtype == case.dtype
    assert error(fast, truth) <= error(plain, truth) + 1e-6


@pytest.mark.parametrize("seed", range(110))
def test_add_rms_norm_steer_is_as_exact_as_plain_torch(seed: int) -> None:
    case = Case(1000 + seed)
    x, weight, bank, classes, rows = case.on("x", "weight", "bank", "classes", "rows")
    kept = x.clone()
    for residual in (None, *case.on("residual")):
        args = (x, residual, weight, EPS, bank, classes, rows, case.unit_offset)
        plain, plain_total = add_rms_norm_steer(*args)
        fast, total = add_rms_norm_steer(*args, kernels="triton")
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


@pytest.mark.parametrize(
    "layout", [layout for layout in LAYOUTS if layout.columns == 1024], ids=str
)
@pytest.mark.parametrize("dtype", list(BITS), ids=str)
@pytest.mark.parametrize("operation", ["rotations", "any"])
def test_every_layout_gives_the_same(operation: str, dtype: torch.dtype, layout: Layout) -> None:
    """Programs of several tokens, the last of them not full; slots that stay and change."""
    case = Case(7, dtype=dtype, hidden=576, tokens=7 if operation == "rotations" else 15, planes=1)
    if operation == "rotations":
        for t, slot in enumerate((0, 0, 1, 0, 2, 2, 1)):
            case.rows[t, 0] = torch.tensor(encode_row(Mode.ROTATE_TO, 50.0 * t, slot))
    case.rows[2, 0] = torch.tensor(identity_row())
    off = torch.tensor(identity_row()).repeat(case.tokens, 1, 1).to(DEVICE)
    x, residual, weight, bank, classes, rows = case.on(
        "x", "residual", "weight", "bank", "classes", "rows"
    )
    for unit_offset, added in ((False, residual), (True, None)):
        case.unit_offset = unit_offset
        args = (x, added, weight, EPS, bank, classes, rows, unit_offset)
        plain, plain_total = add_rms_norm_steer(*args)
        fast, total = norm_kernel.add_rms_norm_steer(*args, layout)
        normed, _ = case.norm_truth(None if added is None else case.residual)
        truth = case.truth(normed)
        assert error(fast, truth) <= error(plain, truth) + 1e-6
        unsteered, _ = norm_kernel.add_rms_norm_steer(
            x, added, weight, EPS, bank, classes, off, unit_offset, layout
        )
        assert torch.equal(fast[2], unsteered[2])
        assert (total is None) == (added is None)
        if total is not None:
            assert plain_total is not None
            assert torch.equal(total, plain_total)


@pytest.mark.parametrize("planes", [1, 3])
@pytest.mark.parametrize("gated", [False, True], ids=["free", "gated"])
@pytest.mark.parametrize("keep_norm", [False, True], ids=["as-it-is", "norm-kept"])
@pytest.mark.parametrize("dtype", list(BITS), ids=str)
@pytest.mark.parametrize("mode", OPERATIONS, ids=lambda mode: mode.name)
def test_every_operation_is_as_exact_as_plain_torch(
    mode: Mode, dtype: torch.dtype, keep_norm: bool, gated: bool, planes: int
) -> None:
    """The operation alone, in each of the request's planes, of a width that fills no block."""
    case = Case(int(mode), dtype=dtype, hidden=507, tokens=16, planes=planes)
    rng = case.rng
    for t in range(case.tokens):
        # Near the boundary, and on either side of it.
        h = case.x[t].double()
        for k in range(planes):
            slot = rng.randrange(2)
            gate = float(h @ case.bank[slot, 0].double()) + rng.choice((-1, 1)) if gated else None
            case.rows[t, k] = torch.tensor(row(rng, mode, slot, gate, keep_norm=keep_norm))
    x, residual, weight, bank, classes, rows = case.on(
        "x", "residual", "weight", "bank", "classes", "rows"
    )
    steered = case.truth(case.x)
    assert not torch.equal(steered, case.x.double())
    plain = reference.steer(x, bank, classes, rows)
    fast = steer(x.clone(), bank, classes, rows, "triton")
    assert error(fast, steered) <= error(plain, steered) + 1e-6
    args = (x, residual, weight, EPS, bank, classes, rows, case.unit_offset)
    truth = case.truth(case.norm_truth(case.residual)[0])
    plain, _ = add_rms_norm_steer(*args)
    fast, _ = add_rms_norm_steer(*args, kernels="triton")
    assert error(fast, truth) <= error(plain, truth) + 1e-6
    if dtype == torch.float32:
        assert error(plain, truth) <= 1e-6


@pytest.mark.parametrize("dtype", list(BITS), ids=str)
def test_a_token_without_steering_is_bit_exact(dtype: torch.dtype) -> None:
    """Off, gated out, at an empty slot, below a cap: as the same kernel gives with no row on; in
    place, bits of NaN and of signed zeros too, and what lies beyond the rows."""
    torch.manual_seed(0)
    bank = torch.cat([orthonormalise(torch.randn(2, 96))[None], torch.zeros(1, 2, 96)])
    classes = torch.tensor([[1.0, 1.0, -1.0, -1.0, 1.0], [0.0] * 5])
    idle = [
        identity_row(),
        encode_row(Mode.ROTATE_BY, 90, 0, gate=1e6),
        encode_row(Mode.ADD, 90, 0, gate=1e6, strength=2.0, keep_norm=True),
        encode_row(Mode.ROTATE_TO, 90, 1),
        encode_row(Mode.ADD, 90, 1, strength=2.0),
        encode_row(Mode.ABLATE, 90, 1, strength=1.0, keep_norm=True),
        encode_row(Mode.CAP, 90, 1, strength=0.5),
        encode_row(Mode.CAP, 90, 0, strength=1e6),
    ]
    busy = len(idle)
    rows = torch.tensor([[each] for each in (*idle, encode_row(Mode.ROTATE_TO, 90, 0))])
    h = torch.randn(busy + 3, 100).to(dtype)
    h[0, 0], h[1, 1], h[0, 2] = -0.0, -0.0, torch.nan
    h[2:busy, 3] = -0.0
    before = h.clone()
    on_device, bank, classes, rows = (each.to(DEVICE) for each in (h, bank, classes, rows))
    steer(on_device[: busy + 1, :96], bank, classes, rows, "triton")
    same = on_device.cpu().view(BITS[dtype]) == before.view(BITS[dtype])
    assert same[:busy].all()
    assert same[busy + 1 :].all()
    assert same[busy, 96:].all()
    assert not same[busy, :96].all()

    x = torch.randn(busy + 1, 96).to(dtype).to(DEVICE)
    weight = torch.rand(96).to(dtype).to(DEVICE)
    off = torch.tensor([[identity_row()]] * (busy + 1)).to(DEVICE)
    args = (x, x * 3, weight, EPS, bank, classes)
    steered, total = add_rms_norm_steer(*args, rows, kernels="triton")
    plain, plain_total = add_rms_norm_steer(*args, off, kernels="triton")
    assert total is not None
    assert plain_total is not None
    assert torch.equal(total, plain_total)
    assert torch.equal(steered[:busy], plain[:busy])
    assert not torch.equal(steered[busy], plain[busy])


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float32, 1e-6), (torch.bfloat16, 3e-4)], ids=["fp32", "bf16"]
)
@pytest.mark.parametrize("hidden", [576, 4096])
def test_norms_are_kept(hidden: int, dtype: torch.dtype, limit: float) -> None:
    """What a kernel was given against what it returns, rounded once: under rotations, and under
    the others where asked."""
    torch.manual_seed(hidden)
    bank = orthonormalise(torch.randn(2, hidden))[None].to(DEVICE)
    classes = torch.tensor([[0.5, 0.3, -0.7, 0.1, 9.0]]).to(DEVICE)
    x = torch.randn(30, hidden).to(dtype).to(DEVICE)
    weight = (torch.rand(hidden) + 0.5).to(dtype).to(DEVICE)
    rows = torch.tensor(
        [
            [encode_row(mode, 12.0 * i, 0, None, strength, mode not in ROTATIONS)]
            for i in range(30)
            for mode, strength in [
                ((*OPERATIONS, Mode.ADD)[i % 6], (0.0, 0.0, 1.0, 0.9, -3.0, -4.0)[i % 6])
            ]
        ]
    ).to(DEVICE)
    normed = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + EPS)
    gained = normed.to(dtype).double() * weight.double()
    out, _ = add_rms_norm_steer(x, None, weight, EPS, bank, classes, rows, kernels="triton")
    plain, _ = add_rms_norm_steer(x, None, weight, EPS, bank, classes, rows)
    steered = steer(x.clone(), bank, classes, rows, "triton")
    for before, after in ((gained, out), (gained, plain), (x, steered)):
        assert not torch.equal(before, after)
        ratio = after.double().norm(dim=-1) / before.double().norm(dim=-1)
        assert float((ratio - 1).abs().max()) <= limit


def test_a_length_is_kept_even_where_little_is_left() -> None:
    """Of an activation in the plane, nearly along u, an ablation leaves a thousandth: what is
    scaled up again has the digits of what was left, not of what is gone."""
    basis = torch.eye(2, 64)
    h = torch.zeros(3, 64)
    h[0, 0], h[0, 1] = 30.0, 0.03
    h[1, 0] = 30.0  # Of which nothing is left: no direction to keep a length in.
    h[2, 0], h[2, 1] = 30.0, 1e-5  # Nor in what is as small as rounding.
    rows = torch.tensor([[encode_row(Mode.ABLATE, 0, 0, None, 1.0, True)]] * 3)
    args = (basis[None].to(DEVICE), torch.zeros(1, 5).to(DEVICE), rows.to(DEVICE))
    for kernels in ("torch", "triton"):
        out = steer(h.clone().to(DEVICE), *args, kernels).cpu()
        assert float(out[0].norm()) == pytest.approx(float(h[0].norm()), rel=1e-6)
        assert not out[1].any()
        assert float(out[2].norm()) == pytest.approx(1e-5)


def test_no_tokens_are_no_launch() -> None:
    h, bank, rows = torch.zeros(0, 64), torch.zeros(1, 2, 64), torch.zeros(0, 1, 7)
    classes = torch.zeros(1, 5)
    h, bank, classes, rows = (t.to(DEVICE) for t in (h, bank, classes, rows))
    assert steer(h, bank, classes, rows, "triton").shape == (0, 64)
    out, total = add_rms_norm_steer(h, h, torch.ones(64).to(DEVICE), EPS, bank, classes, rows)
    assert out.shape == (0, 64)
    assert total is not None


def test_shapes_that_do_not_fit_are_named() -> None:
    x, bank, rows = torch.zeros(4, 32), torch.zeros(1, 2, 32), torch.zeros(4, 1, 7)
    classes = torch.zeros(1, 5)
    with pytest.raises(ValueError, match=r"residual must be \[4, 32\], got \[3, 32\]"):
        add_rms_norm_steer(x, x[:3], torch.ones(32), EPS, bank, classes, rows, kernels="triton")
    with pytest.raises(ValueError, match=r"weight must be \[32\], got \[31\]"):
        add_rms_norm_steer(x, None, torch.ones(31), EPS, bank, classes, rows, kernels="triton")


@pytest.mark.parametrize("op", ["steer_", "rms_norm_steer", "add_rms_norm_steer"])
def test_the_compiler_is_told_the_truth(op: str) -> None:
    """Schema, aliasing and fake implementation, by torch's own checks."""
    case = Case(3, widest=252)
    x, residual, weight, bank, classes, rows = case.on(
        "x", "residual", "weight", "bank", "classes", "rows"
    )
    args = {
        "steer_": (x.contiguous(), bank, classes, rows),
        "rms_norm_steer": (x, weight, EPS, bank, classes, rows, False),
        "add_rms_norm_steer": (x, residual, weight, EPS, bank, classes, rows, False),
    }[op]
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(getattr(torch.ops.steering, op).default, args, test_utils=checks)


def test_a_graph_with_the_kernels_in_it_is_the_eager_one() -> None:
    case = Case(5, widest=252)
    x, residual, weight, bank, classes, rows = case.on(
        "x", "residual", "weight", "bank", "classes", "rows"
    )

    def layer(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        out, total = add_rms_norm_steer(
            x, residual, weight, EPS, bank, classes, rows, kernels="triton"
        )
        assert total is not None
        return steer(out * 2, bank, classes, rows, "triton") + 1, total

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(x, residual), layer(x, residual), strict=True):
        assert torch.equal(got, expected)
