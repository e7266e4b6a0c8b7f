"""Every route that vLLM's app can have, whatever the model: steered, refused, or bodiless."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

import app as apps
from planes import random_plane
from steering_planes import Plane
from steering_server.request.ticket import GENERATING

BODILESS = {
    "/abort_requests",
    "/is_scaling_elastic_ep",
    "/pause",
    "/ping",
    "/release_kv_cache_memory",
    "/reset_encoder_cache",
    "/reset_mm_cache",
    "/reset_prefix_cache",
    "/resume",
    "/shutdown_weight_transfer_engine",
    "/sleep",
    "/start_draft_weight_update",
    "/start_weight_update",
    "/v1/responses/{response_id}/cancel",
    "/wake_up",
}
"""Routes that generate nothing and read no body: what is in one is for nobody."""

REFUSING = {
    "/classify",
    "/collective_rpc",
    "/detokenize",
    "/fault_tolerance/apply",
    "/inference/v1/abort_requests",
    "/finish_weight_update",
    "/init_weight_transfer_engine",
    "/pooling",
    "/rerank",
    "/scale_elastic_ep",
    "/score",
    "/tokenize",
    "/update_weight_version",
    "/update_weights",
    "/v1/chat/completions/derender",
    "/v1/chat/completions/render",
    "/v1/completions/derender",
    "/v1/completions/render",
    "/v1/embeddings",
    "/v1/messages/count_tokens",
    "/v1/messages/render",
    "/v1/rerank",
    "/v1/responses/render",
    "/v1/score",
    "/v2/embed",
    "/v2/rerank",
    "/weight_checker",
}
"""Routes that generate nothing and read a body: one that asks for steering is refused."""


@pytest.fixture(scope="module")
def planes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Plane]:
    folder: Path = tmp_path_factory.mktemp("app") / "p"
    return {"p": Plane.load(random_plane(folder, ["10.mlp_in"], default_mode="rotate_to"))}


@pytest.fixture(scope="module")
def app(planes: dict[str, Plane]) -> Iterator[FastAPI]:
    with pytest.MonkeyPatch.context() as patch:
        yield apps.build(planes, patch)


@pytest.fixture(scope="module")
def client(app: FastAPI) -> TestClient:
    return TestClient(app, raise_server_exceptions=False, follow_redirects=False)


def posts(app: FastAPI) -> set[str]:
    return {r.path for r in app.routes if isinstance(r, APIRoute) and "POST" in r.methods}


def test_every_route_is_classified(app: FastAPI) -> None:
    """One that a new vLLM brings fails here until someone has looked at it."""
    elsewhere = {"/cohere/v2/chat", "/v1/decisions"}  # See tests/http/test_roads.py.
    classes = (GENERATING - elsewhere, BODILESS, REFUSING)
    assert posts(app) - set().union(*classes) == set()
    assert set().union(*classes) - posts(app) == set()
    assert sum(map(len, classes)) == len(set().union(*classes))


@pytest.mark.parametrize(
    "asked",
    [
        {"steering_angle": 10},
        {"steer_angle": 10},
        {"vllm_xargs": {"steering_angle": 10}},
        {"extra_body": {"steering_angle": 10}},
        {"model": "m:p@10"},
        {"model": "calm"},
    ],
    ids=json.dumps,
)
def test_a_body_that_a_route_reads_is_refused(client: TestClient, asked: dict[str, Any]) -> None:
    for path in REFUSING:
        answer = client.post(path, json={"model": "m", **asked})
        assert answer.status_code == 400, (path, answer.text)
        assert re.match(r"\S+ = .+: ", answer.json()["error"]["message"]), answer.text
        if "steering_angle" in asked:
            assert f"{path} does not take steering" in answer.json()["error"]["message"]


def test_a_header_is_refused_where_nothing_is_generated(client: TestClient) -> None:
    for path in REFUSING | BODILESS:
        answer = client.post(path, headers={"steering": "angle=10"})
        assert answer.status_code == 400, path
        assert "does not take steering" in answer.json()["error"]["message"]


def test_a_bodiless_route_reads_none(client: TestClient) -> None:
    """Else it would have been refused."""
    for path in BODILESS:
        answer = client.post(path, json={"steering_angle": 10})
        assert "does not take steering" not in answer.text, path


def test_no_spelling_slips_through(client: TestClient) -> None:
    for text in (b'{"st\\u0065ering_angle": 361}', b' \n{"steering": [3]}'):
        for path in ("/tokenize", "/invocations"):
            answer = client.post(path, content=text, headers={"content-type": "application/json"})
            assert answer.status_code == 400
            assert answer.json()["error"]["message"].startswith("steering")


def test_nothing_is_asked_where_nothing_reads(client: TestClient) -> None:
    for path, headers in (
        ("/v1/completions?steering_angle=10", {}),
        ("/v1/completions", {"steering-angle": "10"}),
        ("/v1/completions", {"x-steering-plane": "p"}),
    ):
        answer = client.post(path, json={"model": "m", "prompt": "a"}, headers=headers)
        assert answer.status_code == 400, path
        assert "nothing reads it" in answer.json()["error"]["message"]


class Transcriber:
    """As vLLM's handler of the route: it asks the engine to generate, and answers."""

    def __init__(self, engine: apps.Engine, *, forgets: bool = False) -> None:
        self.engine = engine
        self.forgets = forgets

    async def create_transcription(self, audio: bytes, request: Any, raw_request: Any) -> Any:
        from vllm.entrypoints.speech_to_text.transcription.protocol import (
            TranscriptionResponse,
            TranscriptionUsageAudio,
        )
        from vllm.sampling_params import SamplingParams

        assert audio == b"sound"
        assert request.model == "m"
        assert not request.model_extra
        if not self.forgets:
            async for _ in self.engine.generate("x", SamplingParams()):
                pass
        usage = TranscriptionUsageAudio(type="duration", seconds=1)
        return TranscriptionResponse(text="words", usage=usage)


def transcribe(client: TestClient, headers: Any = None, **fields: str) -> Any:
    return client.post(
        "/v1/audio/transcriptions",
        data={"model": "m", **fields},
        files={"file": ("a.wav", b"sound")},
        headers=headers,
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"steering_angle": "90"},
        {"vllm_xargs": '{"steering_angle": 90}'},
        {"vllm_xargs[steering_angle]": "90"},
        {"steering": '[{"angle": 90}]'},
        {"model": "m:p@90"},
        {"model": "calm"},
    ],
    ids=json.dumps,
)
def test_a_form_steers(client: TestClient, app: FastAPI, fields: dict[str, str]) -> None:
    engine = apps.Engine(app.state.steering)
    app.state.openai_serving_transcription = Transcriber(engine)
    answer = transcribe(client, **fields)
    assert answer.status_code == 200, answer.text
    assert answer.json()["steering"]["angle"] == 90
    assert answer.json()["text"] == "words"
    (extra,) = engine.asked
    assert extra is not None
    assert [item["angle"] for item in extra["steering"]] == [90]


def test_a_file_that_is_named_as_a_field_is_refused(client: TestClient, app: FastAPI) -> None:
    app.state.openai_serving_transcription = Transcriber(apps.Engine(app.state.steering))
    files = {"file": ("a.wav", b"sound"), "steering": ("a.json", b'[{"angle": 90}]')}
    answer = client.post("/v1/audio/transcriptions", data={"model": "m"}, files=files)
    assert answer.status_code == 400, answer.text


@pytest.mark.parametrize(
    "fields",
    [
        {"steering_angle": "x"},
        {"steer": "90"},
        {"vllm_xargs": '{"steer": 90}'},
        {"vllm_xargs": "steering_angle=90"},
        {"extra_body": '{"steering_angle": 90}'},
    ],
    ids=json.dumps,
)
def test_a_form_that_cannot_steer_is_refused(
    client: TestClient, app: FastAPI, fields: dict[str, str]
) -> None:
    app.state.openai_serving_transcription = Transcriber(apps.Engine(app.state.steering))
    answer = transcribe(client, **fields)
    assert answer.status_code == 400, answer.text


def test_an_unsteered_form_arrives_whole(client: TestClient, app: FastAPI) -> None:
    engine = apps.Engine(app.state.steering)
    app.state.openai_serving_transcription = Transcriber(engine)
    answer = transcribe(client, vllm_xargs='{"a": 1}')
    assert answer.status_code == 200, answer.text
    assert "steering" not in answer.json()
    assert engine.asked == [None]


def test_an_answer_without_the_steering_asked_for_is_never_sent(
    client: TestClient, app: FastAPI
) -> None:
    """A route that answers and has not asked the engine: a broken invariant, and loud."""
    app.state.openai_serving_transcription = Transcriber(
        apps.Engine(app.state.steering), forgets=True
    )
    answer = transcribe(client, steering_angle="90")
    assert answer.status_code == 500
    assert "words" not in answer.text
    assert transcribe(client).status_code == 200


def test_a_socket_with_the_header_is_not_opened(client: TestClient) -> None:
    with (
        pytest.raises(WebSocketDisconnect) as caught,
        client.websocket_connect("/v1/realtime", headers={"steering": "angle=90"}),
    ):
        pass
    assert caught.value.code == 1008


def test_a_root_path_is_as_starlette_takes_it(client: TestClient, app: FastAPI) -> None:
    app.state.openai_serving_transcription = Transcriber(apps.Engine(app.state.steering))
    for root in ("/", "/api"):
        rooted = TestClient(app, root_path=root, raise_server_exceptions=False)
        assert transcribe(rooted, steering_angle="90").json()["steering"]["angle"] == 90


def test_a_socket_that_asks_for_steering_is_closed(client: TestClient, app: FastAPI) -> None:
    app.state.openai_serving_realtime = SimpleNamespace()
    event = json.dumps({"type": "session.update", "session": {"steering_angle": 90}})
    with client.websocket_connect("/v1/realtime") as socket:
        assert socket.receive_json()["type"] == "session.created"
        socket.send_text(event)
        with pytest.raises(WebSocketDisconnect) as caught:
            socket.receive_text()
    assert caught.value.code == 1008
    assert "steering_angle" in caught.value.reason
