"""Requests' steering as rows of tokens."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch

from planes import random_plane
from steering_kernels.rows import COS, KEEP, MODE, RHO, SIN, SLOT, STRENGTH, Mode
from steering_planes import Plane, Site, cos_sin
from steering_server.engine.bank import SLOTS, Bank
from steering_server.engine.rows import Rows
from steering_server.request.angle import Ramp
from steering_server.request.operation import Operation
from steering_server.request.window import ALL, NAMED, Window


@pytest.fixture(scope="module")
def two_planes(tmp_path_factory: pytest.TempPathFactory) -> list[Plane]:
    folder = tmp_path_factory.mktemp("rows")
    return [
        Plane.load(random_plane(folder / "a", ["1.attn_in"], seed=1)),
        Plane.load(random_plane(folder / "b", ["1.attn_in", "2.mlp_in"], seed=2)),
    ]


@pytest.fixture
def rows(two_planes: list[Plane]) -> Rows:
    bank = Bank(two_planes, [Site(1, "attn_in"), Site(2, "mlp_in")], torch.device("cpu"))
    return Rows(4, 16, 2, bank, torch.device("cpu"))


def rotation(plane: Plane, angle: float | Ramp, tokens: Window = ALL) -> Operation:
    return Operation(plane.name, plane.digest, angle, "rotate_to", tokens)


def write(rows: Rows, *step: tuple[int, int, int]) -> None:
    """A step of (place, scheduled, computed)."""
    places, scheduled, computed = (np.array(column) for column in zip(*step, strict=True))
    rows.write(places, scheduled.astype(np.int32), computed.astype(np.int32))


def modes(rows: Rows, plane: int = 0) -> list[int]:
    return [int(m) for m in rows.tokens[:, plane, MODE]]


ON, OFF = int(Mode.ROTATE_TO), int(Mode.OFF)


def test_the_bank_is_zero_where_a_plane_does_not_select_a_site(two_planes: list[Plane]) -> None:
    site = Site(2, "mlp_in")
    bank = Bank(two_planes, [site], torch.device("cpu"))
    assert bank.bases[site].shape == (SLOTS, 2, 576)
    assert torch.equal(bank.bases[site][1], two_planes[1].bases[site])
    assert not bank.bases[site][[0, *range(2, SLOTS)]].any()
    means = two_planes[1].means
    assert means is not None
    assert bank.classes[site][1, RHO] == means[site].rho
    assert bank.classes[site][1, :4].tolist() == [*means[site].positive, *means[site].negative]
    assert not bank.classes[site][[0, *range(2, SLOTS)]].any()
    with pytest.raises(RuntimeError, match="no plane with digest"):
        bank.slot("0" * 64)


def test_each_token_has_its_requests_row(rows: Rows, two_planes: list[Plane]) -> None:
    rows.put(2, (rotation(two_planes[0], 180),), 3)
    rows.put(0, (), 3)
    rows.put(1, (rotation(two_planes[1], 60), rotation(two_planes[0], 0)), 3)
    write(rows, (2, 3, 0), (0, 1, 7), (1, 2, 0))
    assert modes(rows)[:7] == [ON, ON, ON, OFF, ON, ON, OFF]
    assert modes(rows, 1)[:7] == [OFF, OFF, OFF, OFF, ON, ON, OFF]
    assert rows.tokens[:3, 0, COS].tolist() == [-1.0] * 3
    assert rows.tokens[4, 0, COS] == pytest.approx(0.5)
    assert rows.tokens[4:6, :, SLOT].tolist() == [[1, 0], [1, 0]]


def test_what_a_longer_step_left_behind_is_reset(rows: Rows, two_planes: list[Plane]) -> None:
    rows.put(0, (rotation(two_planes[0], 180),), 9)
    rows.put(1, (), 9)
    write(rows, (0, 9, 0))
    assert modes(rows) == [ON] * 9 + [OFF] * 7
    write(rows, (0, 1, 9))
    assert modes(rows) == [ON] + [OFF] * 15
    write(rows, (1, 5, 0))
    assert modes(rows) == [OFF] * 16


def test_a_place_forgets_its_last_request(rows: Rows, two_planes: list[Plane]) -> None:
    rows.put(0, (rotation(two_planes[0], 180, NAMED["generated"]), rotation(two_planes[1], 5)), 0)
    rows.put(0, (rotation(two_planes[0], 180),), 4)
    write(rows, (0, 4, 0))
    assert modes(rows)[:4] == [ON] * 4
    assert modes(rows, 1)[:4] == [OFF] * 4


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [("all", [ON] * 6), ("prompt", [ON] * 3 + [OFF] * 3), ("generated", [OFF] * 3 + [ON] * 3)],
)
def test_scopes_go_by_position_however_the_tokens_are_dealt(
    rows: Rows, two_planes: list[Plane], tokens: str, expected: list[int]
) -> None:
    """A prompt of three and three generated tokens, in every way to cut them into steps."""
    rows.put(3, (rotation(two_planes[0], 180, NAMED[tokens]),), 3)
    rows.put(0, (rotation(two_planes[0], 90),), 8)
    for cuts in range(2**5):
        edges = [0, *(i + 1 for i in range(5) if cuts >> i & 1), 6]
        seen: list[int] = []
        for start, end in itertools.pairwise(edges):
            write(rows, (0, 2, 0), (3, end - start, start))
            seen += modes(rows)[2 : 2 + end - start]
        assert seen == expected


def test_too_much_is_refused_loudly(rows: Rows, two_planes: list[Plane]) -> None:
    with pytest.raises(RuntimeError, match="3 operations in a graph built for 2"):
        rows.put(0, (rotation(two_planes[0], 1),) * 3, 4)
    with pytest.raises(RuntimeError, match="17 tokens in a step, rows for 16"):
        write(rows, (0, 17, 0))


def test_what_fails_leaves_every_row_as_it_was(rows: Rows, two_planes: list[Plane]) -> None:
    rows.put(0, (rotation(two_planes[0], 180),), 4)
    rows.put(1, (rotation(two_planes[1], 60, NAMED["prompt"]),), 2)
    write(rows, (0, 2, 0), (1, 3, 0))
    before = rows.tokens.clone()
    stranger = Operation("no", "0" * 64, 3.0, "rotate_by")
    for place in (0, 1, 2):
        with pytest.raises(RuntimeError, match="no plane with digest"):
            rows.put(place, (rotation(two_planes[1], 5), stranger), 9)
    write(rows, (0, 2, 0), (1, 3, 0))
    assert torch.equal(rows.tokens, before)


def test_an_operations_numbers_are_in_its_row(rows: Rows, two_planes: list[Plane]) -> None:
    capped = Operation("b", two_planes[1].digest, 60.0, "cap", strength=-1.5, keep_norm=True)
    rows.put(0, (capped,), 3)
    write(rows, (0, 1, 0))
    row = rows.tokens[0, 0]
    assert row[[MODE, SLOT, STRENGTH, KEEP]].tolist() == [Mode.CAP, 1, -1.5, 1]
    with pytest.raises(RuntimeError, match="an angle for each of 2 choices"):
        rows.put(0, (Operation("b", two_planes[1].digest, None, "cap", fan=(0.0, 1.0)),), 3)
    assert torch.equal(rows.tokens[0, 0], row)


@pytest.mark.parametrize("by_device", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_windows_and_ramps_are_what_each_token_is_asked(
    rows: Rows, two_planes: list[Plane], seed: int, by_device: bool
) -> None:
    """Several requests, cut into steps at random, against each token's own steering; where only the
    device knows positions, the host's are wrong."""
    rng = random.Random(seed)
    asked = {}
    for place in range(3):
        prompt = rng.randint(1, 12)
        operations = tuple(_timed(rng, plane) for plane in two_planes[: rng.randint(0, 2)])
        rows.put(place, operations, prompt)
        asked[place] = (operations, prompt, 0)
    for _ in range(8):
        step = []
        for place, (operations, prompt, at) in asked.items():
            count = rng.randint(1, 5)
            step.append((place, count, at))
            asked[place] = (operations, prompt, at + count)
        places, scheduled, computed = (np.array(column) for column in zip(*step, strict=True))
        positions = np.concatenate([np.arange(at, at + count) for _, count, at in step])
        if by_device:
            given = torch.from_numpy(np.append(positions, [7, 7]))
            rows.write(places, scheduled.astype(np.int32), computed + 3, given)
        else:
            rows.write(places, scheduled.astype(np.int32), computed)
        owners = np.repeat(places, scheduled)
        for t, (owner, position) in enumerate(zip(owners, positions, strict=True)):
            operations, prompt, _ = asked[owner]
            for k in range(2):
                row = rows.tokens[t, k]
                degrees = (
                    operations[k].degrees_at(position, prompt) if k < len(operations) else None
                )
                if degrees is None:
                    assert row[MODE] == Mode.OFF
                else:
                    assert row[MODE] != Mode.OFF
                    assert row[[COS, SIN]].tolist() == pytest.approx(cos_sin(degrees), abs=1e-7)
        assert (rows.tokens[len(owners) :, :, MODE] == Mode.OFF).all()


def _timed(rng: random.Random, plane: Plane) -> Operation:
    angle = rng.choice(
        (45.0, Ramp(90.0, 0.0, rng.randint(1, 20)), Ramp(-90.0, 270.0, 7), Ramp(359.9, 0.0, 3))
    )
    start = rng.choice((-5, -1, 0, 2))
    part = Window((start, None), (rng.randint(0, 4), rng.choice((None, 9))))
    tokens = rng.choice((ALL, NAMED["prompt"], NAMED["generated"], part))
    return Operation(
        plane.name, plane.digest, angle, rng.choice(("rotate_by", "rotate_to")), tokens
    )


def test_a_quarter_turn_on_a_ramp_is_exact(rows: Rows, two_planes: list[Plane]) -> None:
    rows.put(0, (rotation(two_planes[0], Ramp(0.0, 360.0, 4)),), 0)
    write(rows, (0, 6, 0))
    assert rows.tokens[:6, 0, COS].tolist() == [1, 0, -1, 0, 1, 1]
    assert rows.tokens[:6, 0, SIN].tolist() == [0, 1, 0, -1, 0, 0]
