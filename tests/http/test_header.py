"""The response header is a structured dictionary, and exact."""

from __future__ import annotations

from pathlib import Path

import pytest

from planes import random_plane
from steering_planes import Plane
from steering_server.http.header import header
from steering_server.rotation import Rotation


@pytest.fixture(scope="module")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Plane:
    folder: Path = tmp_path_factory.mktemp("header") / "p"
    return Plane.load(random_plane(folder, ["10.mlp_in", "2.attn_in", "10.attn_in"]))


def test_one_rotation(plane: Plane) -> None:
    r = Rotation("p", plane.digest, 45.0, "rotate_to", "all", None)
    assert header([r], {"p": plane}) == (
        f'plane="p", angle=45, mode=rotate_to, tokens=all, layers="2,10", digest="{plane.digest}"'
    )


def test_several_rotations_are_inner_lists(plane: Plane) -> None:
    one = Rotation("p", plane.digest, 45.0, "rotate_to", "all", None)
    two = Rotation("q", plane.digest, 0.5, "rotate_by", "prompt", -0.25)
    assert header([one, two], {"p": plane, "q": plane}) == (
        'plane=("p" "q"), angle=(45 0.5), mode=(rotate_to rotate_by), tokens=(all prompt), '
        f'layers=("2,10" "2,10"), digest=("{plane.digest}" "{plane.digest}"), gate=(?0 -0.25)'
    )


@pytest.mark.parametrize(
    ("angle", "shown"),
    [(0.0, "0"), (359.0, "359"), (12.125, "12.125"), (0.1, "0.1"), (12.34567, '"12.34567"')],
)
def test_angles_are_exact(plane: Plane, angle: float, shown: str) -> None:
    r = Rotation("p", plane.digest, angle, "rotate_by", "all", None)
    assert f"angle={shown}, " in header([r], {"p": plane})
