"""The receipt, as a structured dictionary and as an object, and exact."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from planes import random_plane
from steering_planes import Plane
from steering_server.request.admission import Admission
from steering_server.request.carriers import read_header
from steering_server.request.receipt import header, member, receipt
from steering_server.request.rotation import Rotation


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


def test_the_body_says_what_the_header_says(plane: Plane) -> None:
    planes = {"p": plane, "q": plane}
    one = Rotation("p", plane.digest, 45.0, "rotate_to", "all", None)
    two = Rotation("q", plane.digest, 0.5, "rotate_by", "prompt", -0.25)
    assert receipt([one], planes) == {
        "plane": "p",
        "angle": 45.0,
        "mode": "rotate_to",
        "tokens": "all",
        "layers": "2,10",
        "digest": plane.digest,
    }
    assert receipt([one, two], planes)["gate"] == [None, -0.25]
    assert json.loads(b"{" + member([one, two], planes) + b"}") == {
        "steering": receipt([one, two], planes)
    }
    for rotations in ([one], [one, two]):
        given_back = read_header(header(rotations, planes))
        assert Admission(planes, 2).admit(given_back) == tuple(rotations)
