"""Every route, every carrier, every way of starting the server: steered and said so, or refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from servers import Server
from steering_server.request.ticket import GENERATING

OCEAN = [{"role": "user", "content": "Tell me about the ocean."}]
GREEDY = {"max_tokens": 8, "temperature": 0}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": OCEAN, **GREEDY},
    "/v1/chat/completions/batch": {"messages": [OCEAN, OCEAN], **GREEDY},
    "/v1/completions": {"prompt": "The ocean is", **GREEDY, "max_tokens": 16},
    "/v1/messages": {"messages": OCEAN, **GREEDY},
    "/v1/responses": {
        "input": "Tell me about the ocean.",
        "max_output_tokens": 8,
        "temperature": 0,
    },
    "/invocations": {"prompt": "The ocean is", **GREEDY, "max_tokens": 16},
    "/inference/v1/generate": {"token_ids": [504, 4, 5, 6], "sampling_params": GREEDY},
    "/generative_scoring": {
        "query": "The ocean is",
        "items": [" good"],
        "label_token_ids": [260, 253],
    },
}
"""The generating routes of a text model's server, each with a request."""

ELSEWHERE = {
    "/cohere/v2/chat": "needs Cohere's SDK",
    "/v1/audio/transcriptions": "of a model that hears; tests/http/test_app.py has it",
    "/v1/audio/translations": "likewise",
    "/v1/decisions": "vLLM 0.33 has it",
    "/v1/systemone": "of models that vLLM lists by name",
}

SERVERS = ["server", "bare_server", "strict_server"]


@dataclass
class Call:
    """A request in the making."""

    body: dict[str, Any]
    headers: dict[str, str] = field(default_factory=dict)

    def add(self, **fields: Any) -> None:
        self.body.update(fields)

    def inside(self, wrapper: str, **fields: Any) -> None:
        self.body[wrapper] = {**self.body.get(wrapper, {}), **fields}


CARRIERS: dict[str, Callable[[Call], Any]] = {
    "field": lambda c: c.add(steering_angle=180),
    "list": lambda c: c.add(steering=[{"plane": "sentiment", "angle": 180, "gate": None}]),
    "vllm_xargs": lambda c: c.inside("vllm_xargs", steering_angle=180, steering_gate=None),
    "vllm_xargs list": lambda c: c.inside("vllm_xargs", steering=[{"angle": 180}]),
    "vllm_xargs text": lambda c: c.inside("vllm_xargs", steering='[{"angle": 180}]'),
    "header": lambda c: c.headers.update(steering='plane="sentiment", angle=180'),
    "forwarded header": lambda c: c.headers.update({"x-steering": "angle=180"}),
    "model id": lambda c: c.add(model="smollm2:sentiment@180"),
    "angle of a model id": lambda c: c.add(model="smollm2@180,rotate_to"),
    "preset": lambda c: c.add(model="gloomy"),
}
"""What must steer, on every route that generates."""

REFUSED: dict[str, Callable[[Call], Any]] = {
    "near miss": lambda c: c.add(steer_angle=180),
    "another case": lambda c: c.add(Steering_Angle=180),
    "near miss within": lambda c: c.inside("vllm_xargs", steer=180),
    "extra_body": lambda c: c.inside("extra_body", steering_angle=180),
    "extra_args": lambda c: c.inside("extra_args", steering_angle=180),
    "sampling_params": lambda c: c.inside("sampling_params", steering_angle=180),
    "not an object": lambda c: c.add(vllm_xargs="steering_angle=180"),
    "given twice": lambda c: (c.add(steering_angle=180), c.headers.update(steering="angle=180")),
    "header twice": lambda c: c.headers.update({"steering": "angle=1", "x-steering": "angle=1"}),
    "preset and field": lambda c: c.add(model="gloomy", steering_angle=180),
    "header of nonsense": lambda c: c.headers.update(steering="angel=180"),
    "model id of nonsense": lambda c: c.add(model="smollm2@gloomy"),
    "unknown model": lambda c: c.add(model="other:sentiment@180"),
    "unknown plane": lambda c: c.add(model="smollm2:other@180"),
    "out of range": lambda c: c.headers.update(steering="angle=361"),
    "400 digits": lambda c: c.add(steering_angle=10**400),
    "a gate of 400 digits": lambda c: c.add(steering_angle=1, steering_gate=10**400),
    "deep": lambda c: c.inside("vllm_xargs", steering="[" * 100_000),
    "a strength of a rotation": lambda c: c.add(steering_angle=1, steering_strength=1),
    "no strength": lambda c: c.add(model="smollm2:@1,add"),
    "a window the wrong way": lambda c: c.headers.update(steering='angle=1, tokens="prompt[4:2]"'),
    "a ramp over nothing": lambda c: c.inside("vllm_xargs", steering_angle="9..0/0"),
    "angles that are not choices": lambda c: c.add(steering_angles=[1, 2], n=3),
    "not a mode": lambda c: c.add(steering_angle=1, steering_mode=["rotate_to"]),
}


def said(value: Any) -> Any:
    """An answer without what differs from call to call."""
    volatile = {"id", "created", "created_at", "completed_at", "request_id", "steering", "usage",
                "system_fingerprint"}  # fmt: skip
    if isinstance(value, dict):
        return {k: said(v) for k, v in value.items() if k not in volatile}
    return [said(item) for item in value] if isinstance(value, list) else value


def ask(server: Server, path: str, carry: Callable[[Call], Any]) -> httpx.Response:
    call = Call({"model": "smollm2", **json.loads(json.dumps(BODIES[path]))})
    carry(call)
    return server.client.post(path, json=call.body, headers=call.headers)


@pytest.fixture(scope="module")
def steered(server: Server) -> dict[str, Any]:
    """What each route says when it is steered by the plain field."""
    answers = {path: ask(server, path, CARRIERS["field"]) for path in BODIES}
    assert all(answer.status_code == 200 for answer in answers.values()), answers
    return {path: said(answer.json()) for path, answer in answers.items()}


def test_every_route_is_classified(server: Server) -> None:
    """A route that generates and is not known to would have its steering refused: so add it."""
    assert BODIES.keys() | ELSEWHERE.keys() == GENERATING
    paths = server.client.get("/openapi.json").json()["paths"]
    assert BODIES.keys() <= paths.keys()


def test_steering_shows_on_every_route(server: Server, steered: dict[str, Any]) -> None:
    for path, answer in steered.items():
        plain = ask(server, path, lambda call: None)
        assert plain.status_code == 200, plain.text
        assert "steering" not in plain.headers
        assert "steering" not in plain.json()
        assert said(plain.json()) != answer, path


@pytest.mark.parametrize("engine", SERVERS, indirect=True)
@pytest.mark.parametrize("carrier", CARRIERS)
def test_every_carrier_steers_every_route_and_says_so(
    engine: Server, steered: dict[str, Any], carrier: str
) -> None:
    for path in BODIES:
        answer = ask(engine, path, CARRIERS[carrier])
        assert answer.status_code == 200, (path, answer.text)
        assert 'plane="sentiment", angle=180, mode=rotate_to' in answer.headers["steering"], path
        receipt = answer.json()["steering"]
        assert (receipt["plane"], receipt["angle"], receipt["mode"]) == (
            "sentiment",
            180,
            "rotate_to",
        )
        assert said(answer.json()) == steered[path], path


@pytest.mark.parametrize("engine", SERVERS, indirect=True)
@pytest.mark.parametrize("carrier", REFUSED)
def test_what_cannot_steer_is_refused_with_field_value_and_rule(
    engine: Server, carrier: str
) -> None:
    for path in BODIES:
        answer = ask(engine, path, REFUSED[carrier])
        assert answer.status_code == 400, (path, answer.text)
        error = answer.json()["error"]
        assert re.match(r"\S.* = .+: .+", error["message"]), error
        if path == "/v1/messages":
            assert answer.json()["type"] == "error"
            assert error["type"] == "invalid_request_error"
        else:
            assert error["message"].startswith(f"{error['param']} = ")
        assert "steering" not in answer.headers


def test_a_default_steers_what_says_nothing(strict_server: Server, steered: dict[str, Any]) -> None:
    for path in BODIES:
        answer = ask(strict_server, path, lambda call: None)
        assert answer.status_code == 200, answer.text
        assert answer.json()["steering"]["angle"] == 180
        assert said(answer.json()) == steered[path]


@pytest.mark.parametrize(
    "nothing",
    [{"steering": []}, {"steering_angle": 0, "steering_mode": "rotate_by"}],
    ids=["none", "no turn"],
)
def test_where_steering_is_required_no_answer_is_without(
    strict_server: Server, nothing: dict[str, Any]
) -> None:
    for path in BODIES:
        answer = ask(strict_server, path, lambda call: call.add(**nothing))
        assert answer.status_code == 400, (path, answer.text)
        assert "--steering-required" in answer.json()["error"]["message"]
    # A request whose steering a proxy has dropped is steered by the default; one whose header is
    # garbage is not answered by it.
    assert ask(strict_server, "/v1/completions", REFUSED["near miss"]).status_code == 400


STREAMED = ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"]


@pytest.mark.parametrize("path", STREAMED)
def test_a_stream_says_so_first_and_where_it_counts(server: Server, path: str) -> None:
    def stream(call: Call) -> None:
        call.add(stream=True, steering_angle=180)
        if "completions" in path:
            call.add(stream_options={"include_usage": True})

    answer = ask(server, path, stream)
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = [
        json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")
    ]
    assert events[0]["steering"]["angle"] == 180
    assert "angle=180" in answer.headers["steering"]
    counting = [e for e in events if e.get("usage") or (e.get("response") or {}).get("usage")]
    assert counting
    assert all(event["steering"]["angle"] == 180 for event in counting)
    assert sum("steering" in event for event in events) < len(events)
    plain = ask(server, path, lambda call: call.add(stream=True))
    assert "steering" not in plain.text


def test_presets_are_models(server: Server) -> None:
    first, *presets = server.client.get("/v1/models").json()["data"]
    assert first["id"] == "smollm2"
    assert [(card["id"], card["parent"]) for card in presets] == [("gloomy", "smollm2")]


@pytest.mark.parametrize("steering", [{}, {"steering_angle": 180}], ids=["unsteered", "steered"])
def test_a_trailing_slash_redirects(server: Server, steering: dict[str, Any]) -> None:
    answer = server.client.post("/v1/chat/completions/", json={"model": "smollm2", **steering})
    assert answer.status_code == 307
    assert answer.headers["location"].endswith("/v1/chat/completions")


def test_another_origin_may_read_the_header(server: Server) -> None:
    headers = {"origin": "http://elsewhere"}
    body = {"model": "smollm2", **BODIES["/v1/completions"], "steering_angle": 180}
    answer = server.client.post("/v1/completions", json=body, headers=headers)
    assert answer.headers["access-control-expose-headers"] == "steering"
