"""What a request asks for, admitted or refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY

from planes import random_plane
from steering_planes import Plane
from steering_server.request.admission import Admission
from steering_server.request.angle import Ramp
from steering_server.request.error import SteeringError
from steering_server.request.generation import Generation, fit
from steering_server.request.operation import Operation, admitted, choose
from steering_server.request.window import ALL, NAMED, Window


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Plane]:
    folder = tmp_path_factory.mktemp("admission")
    bare = random_plane(folder / "bare", ["1.attn_in"], seed=1, default_mode="rotate_to")
    full = random_plane(folder / "full", ["1.attn_in"], seed=2, default_angle=-45.0, gate=0.25)
    return {"bare": Plane.load(bare), "named": Plane.load(full)}


def admit(loaded: dict[str, Plane], fields: dict[str, Any], most: int = 2) -> tuple[Operation, ...]:
    return Admission(loaded, most).admit(fields)


def test_defaults_come_from_the_plane(loaded: dict[str, Plane]) -> None:
    digest = loaded["bare"].digest
    assert admit(loaded, {"steering_plane": "bare", "steering_angle": 90}) == (
        Operation("bare", digest, 90.0, "rotate_to", ALL, None),
    )
    digest = loaded["named"].digest
    assert admit(loaded, {"steering_plane": "named"}) == (
        Operation("named", digest, 315.0, "rotate_by", ALL, 0.25),
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
    assert given == Operation("named", digest, 5.0, "rotate_to", NAMED["prompt"], None)


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
    ramp = {"from": 180, "to": 0.1, "over": 3}
    for fields in (
        {},
        {"steering_mode": "add", "steering_strength": -2, "steering_keep_norm": True},
        {"steering_angle": ramp, "steering_tokens": {"prompt": [-4, None], "generated": [0, 7]}},
        {"steering_angles": [0, 45, ramp], "steering_gate": None},
    ):
        operations = admit(loaded, {"steering_plane": "named", **fields})
        wire = {"steering": [o.to_wire() for o in operations]}
        assert admit(loaded, wire) == operations
        assert admitted(json.loads(json.dumps(wire))) == operations


def one(loaded: dict[str, Plane], **fields: Any) -> Operation:
    (only,) = admit(
        loaded,
        {"steering_plane": "bare", "steering_angle": 30}
        | {f"steering_{name}": value for name, value in fields.items()},
    )
    return only


def test_strengths(loaded: dict[str, Plane]) -> None:
    assert one(loaded, mode="add", strength=2).strength == 2.0
    assert one(loaded, mode="ablate").strength == 1.0
    assert one(loaded, mode="ablate", strength=0.5).strength == 0.5
    assert one(loaded, mode="cap", strength=0).strength == 0.0
    assert one(loaded, mode="cap", strength=-1.5, keep_norm=True).keep_norm
    assert one(loaded, mode="rotate_by").strength is None
    # A rotation keeps the norm, whether it is asked to or not.
    for keep in (False, True):
        assert one(loaded, mode="rotate_to", keep_norm=keep) == one(loaded, mode="rotate_to")


def test_what_moves_nothing_is_no_steering(loaded: dict[str, Plane]) -> None:
    for fields in (
        {"steering_mode": "add", "steering_strength": 0, "steering_keep_norm": True},
        {"steering_mode": "ablate", "steering_strength": -0.0},
        {"steering_mode": "rotate_by", "steering_angle": {"from": 0, "to": 0, "over": 4}},
    ):
        assert admit(loaded, {"steering_plane": "bare", "steering_angle": 5, **fields}) == ()


@pytest.mark.parametrize(
    ("tokens", "window"),
    [
        ("all", ALL),
        ({"prompt": [-4, None]}, Window((-4, None), None)),
        ({"prompt": [None, 3], "generated": [2, None]}, Window((0, 3), (2, None))),
        ({"prompt": [0, None], "generated": [None, None]}, ALL),
        ({"prompt": [None, None], "generated": None}, NAMED["prompt"]),
        ("prompt[-4:]", Window((-4, None), None)),
        ("prompt[:3],generated[2:]", Window((0, 3), (2, None))),
        ('{"generated": [0, 16]}', Window(None, (0, 16))),
    ],
)
def test_windows(loaded: dict[str, Plane], tokens: Any, window: Window) -> None:
    assert one(loaded, tokens=tokens).tokens == window


@pytest.mark.parametrize(
    "angle", [{"from": 180, "to": 0, "over": 64}, "180..0/64", '{"from": 180, "to": 0, "over": 64}']
)
def test_ramps(loaded: dict[str, Plane], angle: Any) -> None:
    assert one(loaded, angle=angle).angle == Ramp(180.0, 0.0, 64)
    assert one(loaded, angle={"from": 90, "to": 90, "over": 2}).angle == 90.0


def test_a_fan_is_one_operation_a_choice(loaded: dict[str, Plane]) -> None:
    fan = admit(loaded, {"steering_plane": "named", "steering_angles": [0, -90, "0..9/3"]})
    assert [choose(fan, i) for i in range(3)] == [
        admit(loaded, {"steering_plane": "named", "steering_angle": angle})
        for angle in (0, 270, "0..9/3")
    ]
    assert choose(fan, 0) == ()
    required = Admission(loaded, 1, required=True)
    with pytest.raises(SteeringError, match="required"):
        required.settle({"steering_plane": "named", "steering_angles": [0, 90]})
    assert required.settle({"steering_plane": "named", "steering_angles": [5, 90]})


def test_a_plane_without_class_means_turns_and_ablates(tmp_path: Path) -> None:
    old = {"old": Plane.load(random_plane(tmp_path / "old", ["1.attn_in"], format_version=1))}
    for mode in ("rotate_by", "rotate_to", "ablate"):
        assert admit(old, {"steering_angle": 5, "steering_mode": mode})
    for mode in ("add", "cap"):
        with pytest.raises(
            SteeringError, match="without class means; calibrate it again"
        ) as caught:
            admit(old, {"steering_angle": 5, "steering_mode": mode, "steering_strength": 1})
        assert caught.value.parameter == "steering_mode"


@pytest.mark.parametrize(
    ("given", "fits"),
    [
        ("all", True),
        ("generated", True),
        ({"prompt": [-4, None]}, True),
        ({"prompt": [4, None]}, True),
        ({"prompt": [5, None], "generated": [0, 1]}, False),
        ({"prompt": [-9, -5]}, False),
        ({"prompt": [3, -2]}, False),
        ({"prompt": [2, -2]}, True),
        ({"prompt": [-2, 3]}, False),
    ],
)
def test_a_window_fits_the_prompt_or_is_refused(
    loaded: dict[str, Plane], given: Any, fits: bool
) -> None:
    operation = one(loaded, tokens=given)
    fit((operation,), Generation())
    if fits:
        fit((operation,), Generation(prompt_tokens=5))
        return
    with pytest.raises(SteeringError, match=r"selects none of the prompt's 5 token") as caught:
        fit((operation,), Generation(prompt_tokens=5))
    assert caught.value.parameter == "steering_tokens"


def test_a_fan_fits_its_choices_or_is_refused(loaded: dict[str, Plane]) -> None:
    angles = {"steering_plane": "bare", "steering_angles": [1, 2]}
    fan, later = (admit(loaded, angles | {"steering_tokens": t}) for t in ("all", "generated"))
    fit(fan, Generation(2))
    fit(later, Generation(2, prompt_logprobs=True))
    for operations, generation, field in (
        (fan, Generation(1), "n"),
        (fan, Generation(3), "n"),
        (fan, Generation(2, prompt_logprobs=True), "prompt_logprobs"),
    ):
        with pytest.raises(SteeringError) as caught:
            fit(operations, generation)
        assert caught.value.parameter == field


BARE = {"steering_plane": "bare", "steering_angle": 1}


@pytest.mark.parametrize(
    ("fields", "field", "reason"),
    [
        *(
            (BARE | fields, "steering_strength", "bad_strength")
            for fields in (
                {"steering_mode": "add"},
                {"steering_mode": "cap", "steering_strength": None},
                {"steering_mode": "add", "steering_strength": 1000.1},
                {"steering_mode": "cap", "steering_strength": -1001},
                {"steering_mode": "ablate", "steering_strength": 1.01},
                {"steering_mode": "ablate", "steering_strength": -0.01},
                {"steering_mode": "add", "steering_strength": math.nan},
                {"steering_mode": "add", "steering_strength": math.inf},
                {"steering_mode": "add", "steering_strength": "much"},
                {"steering_mode": "add", "steering_strength": True},
                {"steering_mode": "rotate_by", "steering_strength": 1},
                {"steering_mode": "rotate_to", "steering_strength": 0},
                {"steering_strength": 1},
            )
        ),
        *(
            (BARE | {"steering_tokens": window}, "steering_tokens", "bad_tokens")
            for window in (
                {},
                {"prompt": None},
                {"prompt": [4, 4]},
                {"prompt": [4, 3]},
                {"prompt": [-3, -4]},
                {"prompt": [-3, 0]},
                {"prompt": [None, 0]},
                {"generated": [5, 2]},
                {"generated": [-2, None]},
                {"generated": [0, -1]},
                {"prompt": [0.5, 2]},
                {"prompt": ["0", "2"]},
                {"prompt": [True, 2]},
                {"prompt": [1]},
                {"prompt": [1, 2, 3]},
                {"prompt": "1:2"},
                {"prompt": 3},
                {"prompt": [1, 1 << 80]},
                {"answer": [1, 2]},
                [1, 2],
                "prompt[1]",
                "prompt[-:]",
                "prompt[1:2],prompt[4:5]",
                "{",
            )
        ),
        *(
            (BARE | {"steering_angle": angle}, field, "bad_angle")
            for angle, field in (
                ({"from": 1, "to": 2}, "steering_angle"),
                ({"from": 1, "to": 2, "over": 0}, "steering_angle.over"),
                ({"from": 1, "to": 2, "over": -4}, "steering_angle.over"),
                ({"from": 1, "to": 2, "over": 2.5}, "steering_angle.over"),
                ({"from": 1, "to": 2, "over": True}, "steering_angle.over"),
                ({"from": 1, "to": 2, "over": 1 << 40}, "steering_angle.over"),
                ({"from": 1, "to": 2, "over": 2, "by": 3}, "steering_angle"),
                ({"from": 1, "to": 361, "over": 2}, "steering_angle.to"),
                ({"from": math.nan, "to": 2, "over": 2}, "steering_angle.from"),
                ({"from": "x", "to": 2, "over": 2}, "steering_angle.from"),
                ("1..2/0", "steering_angle.over"),
                ("1..2", "steering_angle"),
            )
        ),
        *(
            ({"steering_plane": "bare", "steering_angles": angles}, field, reason)
            for angles, field, reason in (
                ([], "steering_angles", "bad_fan"),
                (3, "steering_angles", "bad_fan"),
                ("0", "steering_angles", "bad_fan"),
                ([0] * 16385, "steering_angles", "bad_fan"),
                ([0, 361], "steering_angles[1]", "bad_angle"),
                ([0, None], "steering_angles[1]", "bad_angle"),
            )
        ),
        (BARE | {"steering_angles": [1]}, "steering_angle", "conflicting_fields"),
        (
            {"steering": [{"plane": "bare", "angle": 1}], "steering_angles": [1]},
            "steering",
            "conflicting_fields",
        ),
        (
            {"steering": [{"plane": "bare", "angle": 1}, {"plane": "named", "angles": [1, 2]}]},
            "steering[1].angles",
            "bad_fan",
        ),
        (BARE | {"steering_keep_norm": 1}, "steering_keep_norm", "bad_keep_norm"),
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
