"""An angle for each choice, over HTTP."""

from __future__ import annotations

import json
from typing import Any

import pytest

from servers import Server

ANGLES = [0, 45, 90, 135, 180, 225.5, -90, {"from": 180, "to": 0, "over": 8}]
PROMPT = "The ocean is"
MESSAGES = [{"role": "user", "content": "Tell me about the ocean."}]
ROUTES = {
    "/v1/chat/completions": {"messages": MESSAGES, "logprobs": True},
    "/v1/completions": {"prompt": PROMPT, "logprobs": 1},
}


def ask(server: Server, path: str, **fields: Any) -> Any:
    body = {"model": "smollm2", "max_tokens": 12, "temperature": 0, **ROUTES[path], **fields}
    answer = server.client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer


def said(choice: dict[str, Any]) -> tuple[str, list[float]]:
    """A choice's text, and its tokens' log-probabilities."""
    logprobs = choice["logprobs"]
    if "message" in choice:
        return choice["message"]["content"], [t["logprob"] for t in logprobs["content"]]
    return choice["text"], logprobs["token_logprobs"]


@pytest.mark.parametrize("tokens", ["all", "generated"])
@pytest.mark.parametrize("path", ROUTES)
def test_eight_angles_are_eight_requests(server: Server, path: str, tokens: str) -> None:
    scope = {"steering_tokens": tokens}
    fan = ask(server, path, steering_angles=ANGLES, **scope)
    singly = [ask(server, path, steering_angle=angle, **scope) for angle in ANGLES]
    choices = fan.json()["choices"]
    assert [choice["index"] for choice in choices] == list(range(8))
    for choice, single in zip(choices, singly, strict=True):
        words, logprobs = said(choice)
        expected, expected_logprobs = said(single.json()["choices"][0])
        assert words == expected
        assert logprobs == pytest.approx(expected_logprobs, abs=1e-4)
    # Few words are other words, but each angle is another distribution.
    assert len({round(sum(said(choice)[1]), 3) for choice in choices}) == 8
    # As with n: the prompt once, and what was generated.
    usages = [single.json()["usage"] for single in singly]
    usage = fan.json()["usage"]
    assert usage["prompt_tokens"] == usages[0]["prompt_tokens"]
    assert usage["completion_tokens"] == sum(each["completion_tokens"] for each in usages)
    receipt = fan.json()["steering"]
    assert receipt["angles"] == [*ANGLES[:6], 270, ANGLES[7]]
    assert "angle" not in receipt
    assert 'angles=(0 45 90 135 180 225.5 270 "180..0/8"), ' in fan.headers["steering"]
    # What an answer says can be sent back.
    body = {"model": "smollm2", "max_tokens": 12, "temperature": 0, **ROUTES[path]}
    headers = {"steering": fan.headers["steering"]}
    again = server.client.post(path, json=body, headers=headers).json()["choices"]
    assert [said(choice)[0] for choice in again] == [said(choice)[0] for choice in choices]


@pytest.mark.parametrize("path", ROUTES)
def test_a_stream_has_every_choice(server: Server, path: str) -> None:
    fan = ask(server, path, steering_angles=ANGLES)
    streamed = ask(server, path, steering_angles=ANGLES, stream=True,
                   stream_options={"include_usage": True})  # fmt: skip
    events = [json.loads(x[6:]) for x in streamed.text.splitlines() if x.startswith("data: {")]
    words = [""] * 8
    for event in events:
        for choice in event["choices"]:
            words[choice["index"]] += (
                choice.get("text") or choice.get("delta", {}).get("content") or ""
            )
    assert words == [said(choice)[0] for choice in fan.json()["choices"]]
    assert events[0]["steering"]["angles"][4] == 180
    assert events[-1]["usage"]["prompt_tokens"] == fan.json()["usage"]["prompt_tokens"]


def test_sampled_choices_have_their_seeds(server: Server) -> None:
    sampled = {"temperature": 1.0, "seed": 3}
    path = "/v1/completions"
    fan = ask(server, path, steering_angles=ANGLES[:3], n=3, **sampled).json()["choices"]
    for i, choice in enumerate(fan):
        alone = ask(server, path, steering_angle=ANGLES[i], **{**sampled, "seed": 3 + i})
        assert said(choice)[0] == said(alone.json()["choices"][0])[0]


def test_each_of_several_prompts_has_every_angle(server: Server) -> None:
    prompts = [PROMPT, "Bread is"]
    angles = [0, 180]
    fan = ask(server, "/v1/completions", prompt=prompts, steering_angles=angles).json()["choices"]
    singly = [
        ask(server, "/v1/completions", prompt=prompt, steering_angle=angle).json()["choices"][0]
        for prompt in prompts
        for angle in angles
    ]
    assert [said(choice)[0] for choice in fan] == [said(choice)[0] for choice in singly]


def test_a_choice_may_be_unsteered(server: Server) -> None:
    path = "/v1/completions"
    by = {"steering_mode": "rotate_by"}
    fan = ask(server, path, steering_angles=[0, 150], **by)
    plain, turned = (ask(server, path, **fields) for fields in ({}, {"steering_angle": 150, **by}))
    assert [said(c)[0] for c in fan.json()["choices"]] == [
        said(single.json()["choices"][0])[0] for single in (plain, turned)
    ]
    assert fan.json()["steering"]["angles"] == [0, 150]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/responses", {"input": PROMPT}),
        ("/v1/messages", {"messages": MESSAGES, "max_tokens": 4}),
        ("/v1/chat/completions/batch", {"messages": [MESSAGES, MESSAGES]}),
        ("/inference/v1/generate", {"token_ids": [504, 4], "sampling_params": {"n": 2}}),
    ],
)
def test_routes_without_choices_refuse_it(server: Server, path: str, body: dict[str, Any]) -> None:
    answer = server.client.post(path, json={"model": "smollm2", **body, "steering_angles": [1, 2]})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith(
        f"steering_angles = [1.0, 2.0]: {path} gives no choices"
    )


def test_invocations_take_it(server: Server) -> None:
    body = {"model": "smollm2", "prompt": PROMPT, "temperature": 0, "steering_angles": [0, 180]}
    answer = server.client.post("/invocations", json=body)
    assert answer.status_code == 200, answer.text
    assert len(answer.json()["choices"]) == 2


@pytest.mark.parametrize("wanted", [{"prompt_logprobs": 1}, {"echo": True, "logprobs": 1}])
def test_the_prompts_log_probabilities_are_asked_for_where_they_are_one(
    server: Server, wanted: dict[str, Any]
) -> None:
    body = {"model": "smollm2", "prompt": PROMPT, "max_tokens": 2, "steering_angles": [0, 180]}
    refused = server.client.post("/v1/completions", json={**body, **wanted})
    assert refused.status_code == 400
    assert refused.json()["error"]["message"].startswith("prompt_logprobs = True: 2 angles give")
    given = server.client.post(
        "/v1/completions", json={**body, **wanted, "steering_tokens": "generated"}
    )
    assert given.status_code == 200, given.text
