"""The operations against the truth in double precision, and its promises to the bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from steering_kernels import CLASSES_WIDTH, ROW_WIDTH, Mode, encode_row, identity_row, steer
from steering_planes import (
    Plane,
    ablate,
    add,
    cap,
    cos_sin,
    find_sites,
    keep_norm,
    orthonormalise,
    rotate_by,
    rotate_to,
)

TRUTH = {Mode.ROTATE_BY: rotate_by, Mode.ROTATE_TO: rotate_to}
ROTATIONS = st.tuples(st.sampled_from(list(TRUTH)), st.just(0.0), st.just(value=False))
OTHERS = st.tuples(
    st.sampled_from([Mode.ADD, Mode.ABLATE, Mode.CAP]), st.floats(0, 1), st.booleans()
)


def make_bank(slots: int, d: int, seed: int = 0) -> Tensor:
    """Random orthonormal bases [slots, 2, d]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack(
        [orthonormalise(torch.randn(2, d, generator=generator)) for _ in range(slots)]
    )


def make_classes(slots: int, seed: int = 0) -> Tensor:
    """Random class means [slots, 5]."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(slots, CLASSES_WIDTH, generator=generator)
    means[:, -1] = means[:, -1].abs() + 0.1
    return means


def as_rows(rows: list[list[float]], planes: int = 1) -> Tensor:
    """[T, planes, 7] from rows in order."""
    return torch.tensor(rows, dtype=torch.float32).reshape(-1, planes, ROW_WIDTH)


row = st.tuples(
    ROTATIONS | OTHERS,
    st.floats(-360, 360),
    st.integers(0, 2),
    st.none() | st.floats(-2, 2),
)


@settings(deadline=None, max_examples=100)
@given(st.lists(row, min_size=1, max_size=9), st.sampled_from([2, 3, 64, 577]))
def test_each_row_is_its_own_operation(
    rows: list[tuple[tuple[Mode, float, bool], float, int, float | None]], d: int
) -> None:
    bank, classes = make_bank(3, d), make_classes(3)
    h = torch.randn(len(rows), d, generator=torch.Generator().manual_seed(1))
    encoded = [encode_row(m, a, slot, g, s, k) for (m, s, k), a, slot, g in rows]
    out = steer(h, bank, classes, as_rows(encoded))
    for i, ((mode, s, keep), angle, slot, gate) in enumerate(rows):
        x, basis = h[i : i + 1], bank[slot]
        c1 = float(h[i].double() @ basis[0].double())
        if gate is not None and abs(c1 - gate) < 1e-5:
            continue  # On the very threshold single and double precision may differ.
        truth = exact(x, basis, classes[slot], mode, angle, s, gate)
        bend = 1.0
        if keep and not torch.equal(truth, x.double()):
            # What little an operation leaves is scaled up with its rounding.
            bend = float(x.norm() / truth.norm())
            truth = keep_norm(x, truth)
        size = max(1.0, float(x.norm()), float(truth.norm()))
        assert torch.allclose(out[i].double(), truth[0], rtol=0, atol=3e-6 * size * max(1.0, bend))


def exact(
    x: Tensor,
    basis: Tensor,
    classes: Tensor,
    mode: Mode,
    angle: float,
    s: float,
    gate: float | None,
) -> Tensor:
    """The truth in double precision, of a row that does not keep the norm."""
    if mode in TRUTH:
        return TRUTH[mode](x, basis, angle, gate)
    if mode == Mode.ABLATE:
        return ablate(x, basis, angle, s, gate)
    *means, rho = classes.double().tolist()
    if mode == Mode.ADD:
        return add(x, basis, angle, s * rho, gate)
    cos, sin = cos_sin(angle)
    high, low = (cos * means[k] + sin * means[k + 1] for k in (0, 2))
    return cap(x, basis, angle, low + s * (high - low), gate)


def test_a_cap_turned_round_is_a_floor() -> None:
    bank, classes = make_bank(1, 16), make_classes(1)
    h = torch.randn(40, 16)
    ceiling, floor = (
        steer(h, bank, classes, as_rows([encode_row(Mode.CAP, 30 + turn, 0, None, 0.4)] * 40))
        for turn in (0, 180)
    )
    u = torch.tensor(cos_sin(30), dtype=torch.float32)
    means, limit = classes[0, :4].view(2, 2) @ u, 0.0  # Of the positive class, of the negative.
    limit = float(means[1] + 0.4 * (means[0] - means[1]))
    along, below, above = (x @ bank[0].T @ u for x in (h, ceiling, floor))
    assert torch.allclose(below, along.clamp(max=limit), atol=1e-5)
    assert torch.allclose(above, along.clamp(min=limit), atol=1e-5)
    assert 5 < int((below != along).sum()) < 35


def test_planes_apply_in_order() -> None:
    bank = make_bank(2, 48)
    h = torch.randn(1, 48)
    one, two = encode_row(Mode.ROTATE_TO, 120, 0), encode_row(Mode.ROTATE_TO, 300, 1)
    out = steer(h, bank, make_classes(len(bank)), as_rows([one, two], planes=2))
    truth = rotate_to(rotate_to(h, bank[0], 120), bank[1], 300)
    other = rotate_to(rotate_to(h, bank[1], 300), bank[0], 120)
    assert torch.allclose(out.double(), truth, atol=1e-5)
    assert not torch.allclose(out.double(), other, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_not_steered_is_bit_exact(dtype: torch.dtype) -> None:
    """Off rows, closed gates and slots that do not select the site; signed zeros and NaN too."""
    bank = torch.cat([make_bank(1, 32), torch.zeros(1, 2, 32)])
    classes = torch.tensor([[1.0, 1.0, -1.0, -1.0, 1.0], [0.0] * CLASSES_WIDTH])
    h = torch.randn(10, 32).to(dtype)
    h[:, 0], h[:, 1] = -0.0, 0.0
    h[9, 2] = torch.nan
    rows = [
        identity_row(),
        encode_row(Mode.ROTATE_BY, 90, 0, gate=1e6),
        encode_row(Mode.ROTATE_TO, 90, 1),
        encode_row(Mode.ROTATE_BY, 90, 1),
        encode_row(Mode.ADD, 90, 0, 1e6, 1.0, True),
        encode_row(Mode.ADD, 90, 1, None, 1.0, True),
        encode_row(Mode.ABLATE, 90, 1, None, 1.0, True),
        encode_row(Mode.CAP, 90, 1, None, 0.5, True),
        encode_row(Mode.CAP, 90, 0, None, 1e6),
        identity_row(),
    ]
    out = steer(h, bank, classes, as_rows(rows))
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(out.view(bits), h.view(bits))


def test_an_off_row_next_to_a_steered_one_stays() -> None:
    bank = make_bank(1, 32)
    h = torch.randn(2, 32).bfloat16()
    out = steer(
        h,
        bank,
        make_classes(len(bank)),
        as_rows([encode_row(Mode.ROTATE_TO, 180, 0), identity_row()]),
    )
    assert not torch.equal(out[0], h[0])
    assert torch.equal(out[1], h[1])


@pytest.mark.parametrize(
    ("bank", "classes", "rows", "named"),
    [
        ((1, 2, 31), (1, 5), (4, 1, 7), "bank must be"),
        ((1, 3, 32), (1, 5), (4, 1, 7), "bank must be"),
        ((2, 2, 32), (1, 5), (4, 1, 7), "classes must be"),
        ((1, 2, 32), (1, 4), (4, 1, 7), "classes must be"),
        ((1, 2, 32), (1, 5), (3, 1, 7), "rows must be"),
        ((1, 2, 32), (1, 5), (4, 1, 6), "rows must be"),
    ],
)
def test_shapes_that_do_not_fit_are_named(
    bank: tuple[int, ...], classes: tuple[int, ...], rows: tuple[int, ...], named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        steer(torch.zeros(4, 32), torch.zeros(bank), torch.zeros(classes), torch.zeros(rows))
    with pytest.raises(ValueError, match="float32"):
        steer(
            torch.zeros(4, 32),
            torch.zeros(1, 2, 32).half(),
            torch.zeros(1, CLASSES_WIDTH),
            torch.zeros(4, 1, ROW_WIDTH),
        )


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float32, 1e-6), (torch.bfloat16, 3e-4)], ids=["fp32", "bf16"]
)
def test_norms_are_kept_on_a_real_prompt(
    smollm2: Path, planes: dict[str, Path], dtype: torch.dtype, limit: float
) -> None:
    """Every steered site and token of a prompt, through the real model in each dtype.

    One element holds up to 0.7 of the squared norm of this model's activations, and rounding that
    one to bf16 moves the norm by up to 2.6e-3 whatever computed it. So the limit is on what the
    rotation adds to the single rounding of the exact answer, which in fp32 is nothing.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    text = "The ocean covers most of the planet, and most of it has never been seen. " * 3
    ids = tokenizer(text, return_tensors="pt").input_ids
    plane = Plane.load(planes["sentiment"])
    norms = find_sites(model, plane.config.num_layers)
    added: list[Tensor] = []

    def steering(basis: Tensor) -> Callable[..., Tensor]:
        def hook(module: torch.nn.Module, args: object, output: Tensor) -> Tensor:
            h = output[0]  # [T, d]
            modes = [Mode.ROTATE_TO if i % 2 else Mode.ROTATE_BY for i in range(len(h))]
            angles = torch.linspace(0, 359, len(h)).tolist()
            rows = [encode_row(m, a, 0) for m, a in zip(modes, angles, strict=True)]
            out = steer(h, basis[None], make_classes(1), as_rows(rows))
            exact = torch.cat(
                [
                    TRUTH[m](h[i : i + 1], basis, a)
                    for i, (m, a) in enumerate(zip(modes, angles, strict=True))
                ]
            )
            length = h.double().norm(dim=-1)
            assert torch.allclose(exact.norm(dim=-1), length, rtol=1e-6)
            best = length if dtype == torch.float32 else exact.to(dtype).double().norm(dim=-1)
            added.append((out.double().norm(dim=-1) - best).abs() / length)
            return out[None]

        return hook

    for site in plane.sites:
        norms[site].register_forward_hook(steering(plane.bases[site]))
    with torch.no_grad():
        model(ids)
    assert len(added) == len(plane.sites)
    assert all(len(each) == ids.shape[1] for each in added)
    assert float(torch.cat(added).max()) <= limit
