"""vLLM's own features over HTTP, steered: they work as they do unsteered."""

from __future__ import annotations

import json
from typing import Any

import pytest

from servers import Server

WEATHER = {
    "type": "object",
    "properties": {"mood": {"enum": ["wonderful", "terrible"]}, "degrees": {"type": "integer"}},
    "required": ["mood", "degrees"],
    "additionalProperties": False,
}


def parsed(text: str) -> dict[str, Any]:
    """An answer that the schema admits."""
    value: dict[str, Any] = json.loads(text)
    assert value.keys() == {"mood", "degrees"}
    assert value["mood"] in ("wonderful", "terrible")
    assert isinstance(value["degrees"], int)
    return value


def test_a_forced_tool_call_is_steered_and_still_a_call(server: Server) -> None:
    """Of its arguments this vLLM says with this parser only that they are JSON."""
    tool = {"type": "function", "function": {"name": "report", "parameters": WEATHER}}
    forced = {"type": "function", "function": {"name": "report"}}
    response = server.chat(
        "Report today's weather.", tools=[tool], tool_choice=forced, max_tokens=64, steering_angle=0
    )
    assert response.status_code == 200, response.text
    assert "angle=0" in response.headers["steering"]
    (call,) = response.json()["choices"][0]["message"]["tool_calls"]
    assert call["function"]["name"] == "report"
    json.loads(call["function"]["arguments"])


def test_a_json_schema_is_kept_and_the_angle_shows(server: Server) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "weather", "schema": WEATHER}}

    def ask(**steering: Any) -> tuple[dict[str, Any], float]:
        response = server.chat(
            "Report today's weather.",
            response_format=wanted,
            max_tokens=64,
            logprobs=True,
            **steering,
        )
        assert response.status_code == 200, response.text
        choice = response.json()["choices"][0]
        tokens = choice["logprobs"]["content"]
        return parsed(choice["message"]["content"]), sum(t["logprob"] for t in tokens)

    (_, cheerful), (_, gloomy) = ask(steering_angle=0), ask(steering_angle=180)
    assert cheerful != pytest.approx(gloomy, abs=0.05)


def test_logprobs_and_the_top_of_them_are_steered(server: Server) -> None:
    def first(**steering: Any) -> list[tuple[str, float]]:
        response = server.chat(logprobs=True, top_logprobs=5, max_tokens=1, **steering)
        (token,) = response.json()["choices"][0]["logprobs"]["content"]
        assert token["logprob"] == max(top["logprob"] for top in token["top_logprobs"])
        return [(top["token"], top["logprob"]) for top in token["top_logprobs"]]

    assert first(steering_angle=180) == first(steering_angle=180)
    assert first(steering_angle=180) != first(steering_angle=0) != first()


@pytest.mark.parametrize("steering", [{}, {"steering_angle": 180}], ids=["unsteered", "steered"])
def test_a_streams_usage_is_the_whole_answers(server: Server, steering: dict[str, Any]) -> None:
    whole = server.chat(**steering).json()["usage"]
    body = {
        "model": "smollm2",
        "messages": [{"role": "user", "content": "Tell me about the ocean."}],
        "max_tokens": 16,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        **steering,
    }
    with server.client.stream("POST", "/v1/chat/completions", json=body) as response:
        lines = [line[6:] for line in response.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    last = json.loads(lines[-2])
    assert last["choices"] == []
    counted = ("prompt_tokens", "completion_tokens", "total_tokens")
    assert {k: last["usage"][k] for k in counted} == {k: whole[k] for k in counted}


def test_a_seed_gives_the_same_samples(server: Server) -> None:
    def sample(**fields: Any) -> list[str]:
        response = server.chat(n=2, seed=11, temperature=1.2, **fields)
        return [choice["message"]["content"] for choice in response.json()["choices"]]

    assert sample(steering_angle=180) == sample(steering_angle=180)
    assert sample(steering_angle=180) != sample(steering_angle=0)
