"""Where steering comes in: taken away whole, and never overlooked."""

from __future__ import annotations

from typing import Any

import pytest

from steering_server.request.carriers import read_header, split_model, take_body, take_form
from steering_server.request.error import SteeringError


@pytest.mark.parametrize(
    ("body", "fields", "left"),
    [
        ({"a": 1, "steering_angle": 3}, {"steering_angle": 3}, {"a": 1}),
        ({"steering_gate": None, "steering": []}, {"steering_gate": None, "steering": []}, {}),
        ({"vllm_xargs": {"steering_angle": 3}}, {"steering_angle": 3}, {}),
        (
            {"vllm_xargs": {"steering_angle": 3, "b": 2}, "steering_plane": "p"},
            {"steering_plane": "p", "steering_angle": 3},
            {"vllm_xargs": {"b": 2}},
        ),
        ({"Steering_Angle": 3, "steer": 4}, {"Steering_Angle": 3, "steer": 4}, {}),
        ({"messages": [{"steering_angle": 3}]}, {}, {"messages": [{"steering_angle": 3}]}),
        ({"vllm_xargs": {"b": 2}}, {}, {"vllm_xargs": {"b": 2}}),
    ],
)
def test_fields_are_taken(body: dict[str, Any], fields: dict[str, Any], left: Any) -> None:
    assert take_body(body) == fields
    assert body == left


def test_sampling_params_carry_them_where_they_are_read() -> None:
    body = {"sampling_params": {"n": 1, "extra_args": {"steering_angle": 3, "b": 2}}}
    assert take_body(body, sampling_params=True) == {"steering_angle": 3}
    assert body == {"sampling_params": {"n": 1, "extra_args": {"b": 2}}}


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"extra_body": {"steering_angle": 3}}, "extra_body.steering_angle"),
        ({"extra_body": {"vllm_xargs": {"steer": 3}}}, "extra_body.vllm_xargs.steer"),
        ({"extra_args": {"steering_angle": 3}}, "extra_args.steering_angle"),
        ({"sampling_params": {"steering_angle": 3}}, "sampling_params.steering_angle"),
        (
            {"sampling_params": {"extra_args": {"steering_angle": 3}}},
            "sampling_params.extra_args.steering_angle",
        ),
        ({"vllm_xargs": {"a": {"STEERING": 3}}}, "vllm_xargs.a.STEERING"),
        ({"vllm_xargs": '{"steering_angle": 3}'}, "vllm_xargs"),
        ({"steering_angle": 3, "vllm_xargs": {"steering_angle": 3}}, "steering_angle"),
    ],
)
def test_a_field_that_nothing_would_read_is_named(body: dict[str, Any], field: str) -> None:
    with pytest.raises(SteeringError) as caught:
        take_body(body)
    assert caught.value.parameter == field


def test_a_forms_numbers_are_text() -> None:
    form = {"model": "m", "steering_angle": "90", "steering_gate": "null"}
    assert take_form(form) == {"steering_angle": 90.0, "steering_gate": None}
    assert form == {"model": "m"}
    assert take_form({"steering_angle": "x"}) == {"steering_angle": "x"}
    form = {"steering_strength": "0.5", "steering_keep_norm": "true", "steering_tokens": "all"}
    assert take_form(form) == {
        "steering_strength": 0.5,
        "steering_keep_norm": True,
        "steering_tokens": "all",
    }
    form = {"vllm_xargs": '{"steering_angle": "90", "b": 2}'}
    assert take_form(form) == {"steering_angle": 90.0}
    assert form == {"vllm_xargs": '{"b": 2}'}
    assert take_form({"vllm_xargs": "{"}) == {}


def test_an_object_in_a_form_may_be_sent_in_brackets() -> None:
    """As OpenAI's SDK sends ``extra_body`` beside a file."""
    form = {"vllm_xargs[steering_angle]": "90", "vllm_xargs[b]": "2", "model": "m"}
    assert take_form(form) == {"steering_angle": 90.0}
    assert form == {"vllm_xargs[b]": "2", "model": "m"}
    for key in ("extra_body[steering_angle]", "vllm_xargs[a][steer]"):
        with pytest.raises(SteeringError) as caught:
            take_form({key: "90"})
        assert caught.value.parameter == key


@pytest.mark.parametrize(
    ("text", "items"),
    [
        ("angle=90", [{"angle": 90.0}]),
        (
            'plane="p", angle=90.5, mode=rotate_to, gate=?0',
            [{"plane": "p", "angle": 90.5, "mode": "rotate_to", "gate": None}],
        ),
        ('angle="12.34567"', [{"angle": 12.34567}]),
        (
            'angle="180..0/64", mode=add, strength=1.5, keep_norm=?1, tokens="prompt[-4:]"',
            [
                {
                    "angle": "180..0/64",
                    "mode": "add",
                    "strength": 1.5,
                    "keep_norm": True,
                    "tokens": "prompt[-4:]",
                }
            ],
        ),
        (
            'angles=(0 45.5 "0..9/3"), plane="p"',
            [{"plane": "p", "angles": [0.0, 45.5, "0..9/3"]}],
        ),
        ("angles=(0)", [{"angles": [0.0]}]),
        (
            'plane=("p" "q"), angle=(1 2), strength=(?0 0.5)',
            [
                {"plane": "p", "angle": 1.0, "strength": None},
                {"plane": "q", "angle": 2.0, "strength": 0.5},
            ],
        ),
        (
            'plane=("p" "q"), angle=(1 2)',
            [{"plane": "p", "angle": 1.0}, {"plane": "q", "angle": 2.0}],
        ),
    ],
)
def test_a_header_is_a_structured_dictionary(text: str, items: list[dict[str, Any]]) -> None:
    assert read_header(text) == {"steering": items}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "angle=",
        "angel=3",
        "angle=(1 2), plane=p",
        'angles=(1 2), plane=("p" "q")',
        'plane="p";angle=9',
        "angle 3",
        "\x00",
        "angle=é",
    ],
)
def test_any_other_header_is_refused(text: str) -> None:
    with pytest.raises(SteeringError) as caught:
        read_header(text)
    assert caught.value.parameter == "steering (header)"


SERVED = {"m", "lora", "org/m:v1", "odd:p@90"}
P90 = [{"plane": "p", "angle": 90.0}]


def split(model: str, **options: Any) -> Any:
    presets = {"calm": "p@90"}
    return split_model(model, served=SERVED.__contains__, base="m", presets=presets, **options)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("m", ("m", None)),
        ("odd:p@90", ("odd:p@90", None)),
        ("m:p@90", ("m", P90)),
        ("m@90", ("m", [{"angle": 90.0}])),
        ("m:@90,rotate_by", ("m", [{"angle": 90.0, "mode": "rotate_by"}])),
        (
            "m:p@1..2/3,prompt[-4:]",
            (
                "m",
                [
                    {
                        "plane": "p",
                        "angle": {"from": 1.0, "to": 2.0, "over": 3},
                        "tokens": {"prompt": [-4, None]},
                    }
                ],
            ),
        ),
        ("lora:p@90", ("lora", P90)),
        ("org/m:v1:p@90", ("org/m:v1", P90)),
        ("org/m:v1@90", ("org/m:v1", [{"angle": 90.0}])),
        ("calm", ("m", P90)),
        ("m:calm", ("m", P90)),
        ("lora:calm", ("lora", P90)),
        ("none", ("none", None)),
        ("none:v2", ("none:v2", None)),
    ],
)
def test_model_ids(model: str, expected: Any) -> None:
    assert split(model) == expected


def test_an_adapter_that_vllm_may_yet_find_keeps_its_name() -> None:
    assert split("late", may_be_served=True) == ("late", None)
    assert split("m:late", may_be_served=True) == ("m:late", None)
    assert split("late:p@90", may_be_served=True) == ("late", P90)


@pytest.mark.parametrize(
    "model", ["m:p@x", "m@", "m:p@90,turn", "none:p@90", "none@90", "none:calm"]
)
def test_a_model_id_that_asks_in_vain_is_refused(model: str) -> None:
    with pytest.raises(SteeringError) as caught:
        split(model)
    assert caught.value.parameter == "model"
    assert repr(model) in str(caught.value)
