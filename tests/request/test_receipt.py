"""The receipt, as a structured dictionary and as an object, and exact."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from planes import random_plane
from steering_planes import Plane
from steering_server.request.admission import Admission
from steering_server.request.angle import Ramp
from steering_server.request.carriers import read_header
from steering_server.request.operation import Operation
from steering_server.request.receipt import header, member, receipt
from steering_server.request.window import ALL, NAMED, Window


@pytest.fixture(scope="module")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Plane:
    folder: Path = tmp_path_factory.mktemp("header") / "p"
    return Plane.load(random_plane(folder, ["10.mlp_in", "2.attn_in", "10.attn_in"]))


def test_one_operation(plane: Plane) -> None:
    r = Operation("p", plane.digest, 45.0, "rotate_to", ALL, None)
    assert header([r], {"p": plane}) == (
        f'plane="p", angle=45, mode=rotate_to, tokens=all, layers="2,10", digest="{plane.digest}"'
    )


def test_several_operations_are_inner_lists(plane: Plane) -> None:
    one = Operation("p", plane.digest, 45.0, "rotate_to", ALL, None)
    two = Operation("q", plane.digest, 0.5, "rotate_by", NAMED["prompt"], -0.25)
    assert header([one, two], {"p": plane, "q": plane}) == (
        'plane=("p" "q"), angle=(45 0.5), mode=(rotate_to rotate_by), tokens=(all prompt), '
        f'layers=("2,10" "2,10"), digest=("{plane.digest}" "{plane.digest}"), gate=(?0 -0.25)'
    )


@pytest.mark.parametrize(
    ("angle", "shown"),
    [(0.0, "0"), (359.0, "359"), (12.125, "12.125"), (0.1, "0.1"), (12.34567, '"12.34567"')],
)
def test_angles_are_exact(plane: Plane, angle: float, shown: str) -> None:
    r = Operation("p", plane.digest, angle, "rotate_by", ALL, None)
    assert f"angle={shown}, " in header([r], {"p": plane})


def test_what_the_others_have_beside(plane: Plane) -> None:
    digest, planes = plane.digest, {"p": plane}
    added = Operation("p", digest, 45.0, "add", ALL, None, 1.5, keep_norm=True)
    assert header([added], planes) == (
        'plane="p", angle=45, mode=add, strength=1.5, keep_norm=?1, tokens=all, layers="2,10", '
        f'digest="{digest}"'
    )
    part = Operation("p", digest, Ramp(180.0, 0.5, 64), "rotate_to", Window((-4, None), (2, 9)))
    assert receipt([part], planes) == {
        "plane": "p",
        "angle": {"from": 180.0, "to": 0.5, "over": 64},
        "mode": "rotate_to",
        "tokens": {"prompt": [-4, None], "generated": [2, 9]},
        "layers": "2,10",
        "digest": digest,
    }
    assert 'angle="180..0.5/64"' in header([part], planes)
    assert 'tokens="prompt[-4:],generated[2:9]"' in header([part], planes)


def test_an_angle_for_each_choice_is_listed(plane: Plane) -> None:
    fan = Operation("p", plane.digest, None, "rotate_by", fan=(0.0, 45.0, Ramp(0.0, 90.0, 3)))
    assert receipt([fan], {"p": plane})["angles"] == [
        0.0,
        45.0,
        {"from": 0.0, "to": 90.0, "over": 3},
    ]
    assert 'angles=(0 45 "0..90/3"), ' in header([fan], {"p": plane})


def test_a_long_list_is_counted_in_the_header(plane: Plane) -> None:
    fan = Operation("p", plane.digest, None, "rotate_to", fan=(*map(float, range(65)),))
    planes = {"p": plane}
    assert "choices=65, mode" in header([fan], planes)
    assert "angles" not in header([fan], planes)
    assert receipt([fan], planes)["angles"] == [*range(65)]
    assert receipt([fan], planes, brief=True)["choices"] == 65


def test_the_body_says_what_the_header_says(plane: Plane) -> None:
    planes = {"p": plane, "q": plane}
    one = Operation("p", plane.digest, 45.0, "rotate_to", ALL, None)
    two = Operation("q", plane.digest, 0.5, "rotate_by", NAMED["prompt"], -0.25)
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
    angle, part = Ramp(180.0, 0.5, 64), Window((-4, None), (2, 9))
    three = Operation("p", plane.digest, angle, "cap", part, None, -1.2345678, keep_norm=True)
    fan = Operation("p", plane.digest, None, "rotate_to", fan=(0.0, 45.0, 0.12345, angle))
    for operations in ([one], [one, two], [three], [one, three], [fan]):
        given_back = read_header(header(operations, planes))
        assert Admission(planes, 2).admit(given_back) == tuple(operations)
