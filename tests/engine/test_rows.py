"""Requests' steering as rows of tokens."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from planes import random_plane
from steering_kernels.rows import COS, MODE, SLOT, Mode
from steering_planes import Plane, Site
from steering_server.engine.bank import SLOTS, Bank
from steering_server.engine.rows import Rows
from steering_server.request.rotation import Rotation, Tokens


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


def rotation(plane: Plane, angle: float, tokens: Tokens = "all") -> Rotation:
    return Rotation(plane.name, plane.digest, angle, "rotate_to", tokens, None)


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
    rows.put(0, (rotation(two_planes[0], 180, "generated"), rotation(two_planes[1], 5)), 0)
    rows.put(0, (rotation(two_planes[0], 180),), 4)
    write(rows, (0, 4, 0))
    assert modes(rows)[:4] == [ON] * 4
    assert modes(rows, 1)[:4] == [OFF] * 4


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [("all", [ON] * 6), ("prompt", [ON] * 3 + [OFF] * 3), ("generated", [OFF] * 3 + [ON] * 3)],
)
def test_scopes_go_by_position_however_the_tokens_are_dealt(
    rows: Rows, two_planes: list[Plane], tokens: Tokens, expected: list[int]
) -> None:
    """A prompt of three and three generated tokens, in every way to cut them into steps."""
    rows.put(3, (rotation(two_planes[0], 180, tokens),), 3)
    rows.put(0, (rotation(two_planes[0], 90),), 8)
    for cuts in range(2**5):
        edges = [0, *(i + 1 for i in range(5) if cuts >> i & 1), 6]
        seen: list[int] = []
        for start, end in itertools.pairwise(edges):
            write(rows, (0, 2, 0), (3, end - start, start))
            seen += modes(rows)[2 : 2 + end - start]
        assert seen == expected


def test_too_much_is_refused_loudly(rows: Rows, two_planes: list[Plane]) -> None:
    with pytest.raises(RuntimeError, match="3 rotations in a graph built for 2"):
        rows.put(0, (rotation(two_planes[0], 1),) * 3, 4)
    with pytest.raises(RuntimeError, match="17 tokens in a step, rows for 16"):
        write(rows, (0, 17, 0))


def test_what_fails_leaves_every_row_as_it_was(rows: Rows, two_planes: list[Plane]) -> None:
    rows.put(0, (rotation(two_planes[0], 180),), 4)
    rows.put(1, (rotation(two_planes[1], 60, "prompt"),), 2)
    write(rows, (0, 2, 0), (1, 3, 0))
    before = rows.tokens.clone()
    stranger = Rotation("no", "0" * 64, 3.0, "rotate_by", "all", None)
    for place in (0, 1, 2):
        with pytest.raises(RuntimeError, match="no plane with digest"):
            rows.put(place, (rotation(two_planes[1], 5), stranger), 9)
    write(rows, (0, 2, 0), (1, 3, 0))
    assert torch.equal(rows.tokens, before)
