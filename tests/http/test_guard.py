"""Every route that answers a POST either steers or refuses to."""

from __future__ import annotations

import re
from typing import Any

import pytest

from servers import Server
from steering_server.http.endpoint import STEERED


def test_every_other_route_refuses_steering(server: Server) -> None:
    paths = server.client.get("/openapi.json").json()["paths"]
    posts = {
        re.sub(r"\{[^}]*\}", "x", path) for path, methods in paths.items() if "post" in methods
    }
    assert posts > STEERED.keys()
    before = server.metric("steering_rejections_total", reason="unsupported_route")
    others = sorted(posts - STEERED.keys())
    for path in others:
        response = server.client.post(path, json={"model": "smollm2", "steering_angle": 10})
        assert response.status_code == 400, path
        message = response.json()["error"]["message"]
        assert message.startswith(f"steering_angle = 10: {path} does not take steering"), message
    after = server.metric("steering_rejections_total", reason="unsupported_route")
    assert after - before == len(others)


@pytest.mark.parametrize(
    "body",
    [
        b'{"model": "smollm2", "prompt": "a", "st\\u0065ering_angle": 1}',
        b' \n{"steering": [], "model": "smollm2", "prompt": "a"}',
    ],
    ids=["escaped", "list"],
)
def test_no_spelling_slips_through(server: Server, body: bytes) -> None:
    headers = {"content-type": "application/json"}
    response = server.client.post("/invocations", content=body, headers=headers)
    assert response.status_code == 400
    assert "does not take steering" in response.json()["error"]["message"]


def test_vllm_xargs_are_every_routes(server: Server) -> None:
    """They reach the engine, which admits and steers, from any route that vLLM passes them on."""
    body = {"model": "smollm2", "prompt": "The ocean is", "max_tokens": 16, "temperature": 0}

    def text(path: str, **fields: Any) -> str:
        answer = server.client.post(path, json={**body, **fields})
        assert answer.status_code == 200, answer.text
        words: str = answer.json()["choices"][0]["text"]
        return words

    steered = text("/invocations", vllm_xargs={"steering_angle": 180})
    assert steered == text("/v1/completions", steering_angle=180)
    assert steered != text("/invocations")
    wrong = server.client.post("/invocations", json={**body, "vllm_xargs": {"steering_angle": 361}})
    assert wrong.status_code == 400
    assert wrong.json()["error"]["message"].startswith("steering_angle = 361")


def test_an_unsteered_body_arrives_whole(server: Server) -> None:
    body: dict[str, Any] = {"model": "smollm2", "prompt": "steering " * 200, "max_tokens": 1}
    assert server.client.post("/invocations", json=body).status_code == 200
    whole = server.client.post("/tokenize", json={"model": "smollm2", "prompt": body["prompt"]})
    assert whole.json()["count"] >= 200
