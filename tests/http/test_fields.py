"""The typed fields on vLLM's request models."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import BaseModel

from steering_server.engine.admission import SteeringError
from steering_server.http.endpoint import STEERED
from steering_server.http.fields import with_steering
from steering_server.rotation import Rotation

MESSAGES = [{"role": "user", "content": "a"}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": MESSAGES},
    "/v1/chat/completions/batch": {"messages": [MESSAGES]},
    "/v1/completions": {"prompt": "a"},
    "/v1/messages": {"model": "m", "messages": MESSAGES, "max_tokens": 1},
    "/v1/responses": {"input": "a"},
}


def request(path: str, **fields: Any) -> Any:
    model: type[BaseModel] = with_steering(STEERED[path][1])
    return model.model_validate({**BODIES[path], **fields})


@pytest.mark.parametrize("path", STEERED)
def test_fields_are_kept_as_given(path: str) -> None:
    given = {"steering_angle": 3, "steering_gate": None}
    assert request(path, **given).steering_args() == given
    items = [{"angle": 3}, {"angle": 4, "gate": None}]
    assert request(path, steering=items).steering_args() == {"steering": items}
    assert request(path, vllm_xargs={"a": 1, "steering_angle": 3}).steering_args() == {
        "steering_angle": 3
    }
    assert request(path).steering_args() == {}


@pytest.mark.parametrize("path", STEERED)
def test_rotations_travel_in_vllm_xargs(path: str) -> None:
    rotation = Rotation("p", "d" * 64, 3.0, "rotate_by", "all", None)
    carrier = request(path, vllm_xargs={"a": 1, "steering_angle": 3})
    carrier.carry([rotation])
    assert carrier.vllm_xargs.keys() == {"a", "steering"}
    assert [Rotation(**wire) for wire in json.loads(carrier.vllm_xargs["steering"])] == [rotation]
    carrier.carry([])
    assert carrier.vllm_xargs == {"a": 1}


@pytest.mark.parametrize("path", STEERED)
@pytest.mark.parametrize("bad", [{"steering_foo": 1}, {"steering_angle": "x"}, {"steering": [3]}])
def test_bad_fields_are_our_own_error(path: str, bad: dict[str, Any]) -> None:
    with pytest.raises(SteeringError):
        request(path, **bad)
