"""What a request asks for, admitted or refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
from prometheus_client import REGISTRY

from planes import random_plane
from steering_planes import Plane
from steering_server.request.admission import Admission, SteeringError
from steering_server.request.rotation import Rotation, admitted


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Plane]:
    folder = tmp_path_factory.mktemp("admission")
    bare = random_plane(folder / "bare", ["1.attn_in"], seed=1, default_mode="rotate_to")
    full = random_plane(folder / "full", ["1.attn_in"], seed=2, default_angle=-45.0, gate=0.25)
    return {"bare": Plane.load(bare), "named": Plane.load(full)}


def admit(loaded: dict[str, Plane], fields: dict[str, Any], most: int = 2) -> tuple[Rotation, ...]:
    return Admission(loaded, most).admit(fields)


def test_defaults_come_from_the_plane(loaded: dict[str, Plane]) -> None:
    digest = loaded["bare"].digest
    assert admit(loaded, {"steering_plane": "bare", "steering_angle": 90}) == (
        Rotation("bare", digest, 90.0, "rotate_to", "all", None),
    )
    digest = loaded["named"].digest
    assert admit(loaded, {"steering_plane": "named"}) == (
        Rotation("named", digest, 315.0, "rotate_by", "all", 0.25),
    )
    (given,) = admit(
        loaded,
        {
            "steering_plane": "named",
            "steering_angle": 5,
            "steering_mode": "rotate_to",
            "steering_tokens": "prompt",
            "steering_gate": None,
        },
    )
    assert given == Rotation("named", digest, 5.0, "rotate_to", "prompt", None)


def test_a_single_plane_need_not_be_named(loaded: dict[str, Plane]) -> None:
    (only,) = admit({"bare": loaded["bare"]}, {"steering_angle": 10})
    assert only.plane == "bare"


@pytest.mark.parametrize(("angle", "canonical"), [(360, 0), (-90, 270), (-360, 0), (0.5, 0.5)])
def test_angles_are_canonical(loaded: dict[str, Plane], angle: float, canonical: float) -> None:
    (r,) = admit(loaded, {"steering_plane": "bare", "steering_angle": angle})
    assert r.angle == canonical
    assert math.copysign(1, r.angle) == 1


def test_no_fields_and_rotate_by_zero_are_no_steering(loaded: dict[str, Plane]) -> None:
    assert admit(loaded, {}) == ()
    assert admit(loaded, {"kv_transfer_params": {}}) == ()
    assert admit(loaded, {"steering_angle": None, "steering_gate": None}) == ()
    off = {"steering_plane": "bare", "steering_mode": "rotate_by", "steering_angle": 360}
    assert admit(loaded, off) == ()


def test_several_planes_keep_their_order(loaded: dict[str, Plane]) -> None:
    items = [{"plane": "named", "angle": 1}, {"plane": "bare", "angle": 2, "tokens": "generated"}]
    assert [(r.plane, r.angle) for r in admit(loaded, {"steering": items})] == [
        ("named", 1.0),
        ("bare", 2.0),
    ]


def test_what_is_admitted_is_admitted_again(loaded: dict[str, Plane]) -> None:
    rotations = admit(loaded, {"steering_plane": "named"})
    wire = {"steering": [r.to_wire() for r in rotations]}
    assert admit(loaded, wire) == rotations
    assert admitted(wire) == rotations


@pytest.mark.parametrize(
    ("fields", "field", "reason"),
    [
        ({"steering_angle": "x"}, "steering_angle", "bad_angle"),
        ({"steering_angle": True}, "steering_angle", "bad_angle"),
        ({"steering_angle": math.nan}, "steering_angle", "bad_angle"),
        ({"steering_angle": math.inf}, "steering_angle", "bad_angle"),
        ({"steering_angle": 361}, "steering_angle", "bad_angle"),
        ({"steering_angle": -360.5}, "steering_angle", "bad_angle"),
        ({"steering_angle": [1, 2]}, "steering_angle", "bad_angle"),
        ({"steering_angle": 1}, "steering_plane", "plane_ambiguous"),
        ({"steering_plane": "bare"}, "steering_angle", "no_angle"),
        ({"steering_plane": "no", "steering_angle": 1}, "steering_plane", "unknown_plane"),
        ({"steering_plane": 3, "steering_angle": 1}, "steering_plane", "unknown_plane"),
        ({"steering_mode": "turn", "steering_angle": 1}, "steering_mode", "bad_mode"),
        ({"steering_tokens": "some", "steering_angle": 1}, "steering_tokens", "bad_tokens"),
        ({"steering_gate": "low", "steering_angle": 1}, "steering_gate", "bad_gate"),
        ({"steering_gate": math.nan, "steering_angle": 1}, "steering_gate", "bad_gate"),
        ({"steering_foo": 1}, "steering_foo", "unknown_field"),
        ({"steeringangle": 1}, "steeringangle", "unknown_field"),
        ({"steering": "bare"}, "steering", "bad_list"),
        ({"steering": '"bare"'}, "steering", "bad_list"),
        ({"steering": [3]}, "steering[0]", "bad_list"),
        ({"steering": [{"plane": "bare", "degrees": 3}]}, "steering[0].degrees", "unknown_field"),
        ({"steering": [{"plane": "bare", "angle": 400}]}, "steering[0].angle", "bad_angle"),
        ({"steering": [{"plane": "no", "angle": 4}]}, "steering[0].plane", "unknown_plane"),
        ({"steering": [{"plane": "named"}] * 3}, "steering", "too_many_planes"),
        ({"steering": [], "steering_angle": 3}, "steering", "conflicting_fields"),
        (
            {"steering": [{"plane": "bare", "angle": 4, "digest": "0"}]},
            "steering[0].digest",
            "unknown_plane",
        ),
    ],
)
def test_refusals_name_field_value_and_rule(
    loaded: dict[str, Plane], fields: dict[str, Any], field: str, reason: str
) -> None:
    def count() -> float:
        return REGISTRY.get_sample_value("steering_rejections_total", {"reason": reason}) or 0.0

    before = count()
    with pytest.raises(SteeringError) as caught:
        admit(loaded, fields)
    assert caught.value.parameter == field
    assert caught.value.reason == reason
    message = str(caught.value)
    assert message.startswith(f"{field} = ")
    assert len(message.split(": ", 1)[1]) > 10
    assert count() == before + 1


def test_without_planes_the_answer_says_how_to_load_one() -> None:
    with pytest.raises(SteeringError, match="--steering-plane NAME=PATH"):
        admit({}, {"steering_angle": 1})


def test_raw_fields_past_admission_stop_the_process() -> None:
    with pytest.raises(RuntimeError, match=r"steering_angle.*without admission"):
        admitted({"steering_angle": 3})
    with pytest.raises(RuntimeError, match="without admission"):
        admitted({"steering": [{"plane": "bare", "angle": 3}]})
