"""Steering over HTTP, on a real server."""

from __future__ import annotations

import concurrent.futures
import json
import socket
import time
from collections.abc import Callable
from typing import Any

import pytest

from servers import Server
from steering_server.request.ask import FAN, FIELDS

OCEAN = "Tell me about the ocean."


def text(response: Any) -> str:
    """The answer's text."""
    assert response.status_code == 200, response.text
    content: str = response.json()["choices"][0]["message"]["content"]
    return content


def test_an_angle_changes_the_answer_and_the_header_says_so(server: Server) -> None:
    cheerful, gloomy, plain = (
        server.chat(steering_angle=0),
        server.chat(steering_angle=180),
        server.chat(),
    )
    assert text(cheerful) != text(gloomy)
    header = gloomy.headers["steering"]
    plane = server.client.get("/v1/steering/planes/sentiment").json()
    layers = ",".join(map(str, plane["layers"]))
    assert header == (
        f'plane="sentiment", angle=180, mode=rotate_to, tokens=all, layers="{layers}", '
        f'digest="{plane["digest"]}"'
    )
    assert "steering" not in plain.headers
    off = server.chat(steering_angle=0, steering_mode="rotate_by")
    assert "steering" not in off.headers
    assert text(off) == text(plain)


def test_a_stream_is_steered_and_says_so_before_its_first_word(server: Server) -> None:
    whole = text(server.chat(steering_angle=180))
    body = {
        "model": "smollm2",
        "messages": [{"role": "user", "content": OCEAN}],
        "max_tokens": 16,
        "temperature": 0,
        "stream": True,
        "steering_angle": 180,
    }
    with server.client.stream("POST", "/v1/chat/completions", json=body) as response:
        assert "angle=180" in response.headers["steering"]
        pieces = [
            json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: {")
        ]
    words = [piece["choices"][0]["delta"].get("content") or "" for piece in pieces]
    assert "".join(words) == whole


def test_text_completions_and_vllm_xargs_carry_steering(server: Server) -> None:
    def complete(**fields: Any) -> Any:
        body = {"model": "smollm2", "prompt": "The ocean is", "max_tokens": 16, "temperature": 0}
        return server.client.post("/v1/completions", json={**body, **fields})

    flat = complete(steering_angle=180)
    nested = complete(vllm_xargs={"steering_angle": 180})
    plain = complete()
    words = [r.json()["choices"][0]["text"] for r in (flat, nested, plain)]
    assert words[0] == words[1] != words[2]
    assert flat.headers["steering"] == nested.headers["steering"]
    items = [{"plane": "sentiment", "angle": 180}]
    for listed in (
        server.chat(steering=items),
        server.chat(vllm_xargs={"steering": json.dumps(items), "other": 3}),
    ):
        assert text(listed) == text(server.chat(steering_angle=180))


MESSAGES = [{"role": "user", "content": OCEAN}]


@pytest.mark.parametrize(
    ("path", "body", "read"),
    [
        (
            "/v1/responses",
            {"input": OCEAN, "max_output_tokens": 16},
            lambda r: r["output"][-1]["content"][0]["text"],
        ),
        (
            "/v1/messages",
            {"messages": MESSAGES, "max_tokens": 16},
            lambda r: r["content"][0]["text"],
        ),
        (
            "/v1/chat/completions/batch",
            {"messages": [MESSAGES, MESSAGES], "max_tokens": 16},
            lambda r: r["choices"][1]["message"]["content"],
        ),
    ],
)
@pytest.mark.parametrize("nested", [False, True], ids=["fields", "vllm_xargs"])
def test_every_generating_route_is_steered(
    server: Server, path: str, body: dict[str, Any], read: Callable[[Any], str], nested: bool
) -> None:
    def answer(**fields: Any) -> tuple[str, str | None]:
        given = {"vllm_xargs": fields} if nested and fields else fields
        sent = {"model": "smollm2", "temperature": 0, **body, **given}
        response = server.client.post(path, json=sent)
        assert response.status_code == 200, response.text
        return read(response.json()), response.headers.get("steering")

    expected = server.chat(steering_angle=180)
    assert answer(steering_angle=180) == (text(expected), expected.headers["steering"])
    assert answer() == (text(server.chat()), None)
    refused = server.client.post(path, json={"model": "smollm2", **body, "steering_angle": 361})
    assert refused.status_code == 400
    assert refused.json()["error"]["message"].startswith("steering_angle = 361")


RAMP = {"from": 180, "to": 0, "over": 8}
WINDOW = {"prompt": [-4, None], "generated": [0, 12]}


@pytest.mark.parametrize(
    "carried",
    [
        {"vllm_xargs": {"steering_angle": "180..0/8", "steering_mode": "add",
                        "steering_strength": 1.5, "steering_keep_norm": True,
                        "steering_tokens": "prompt[-4:],generated[0:12]"}},
        {"model": "smollm2:@180..0/8,add,strength=1.5,keep_norm,prompt[-4:],generated[:12]"},
        {"steering": [{"angle": RAMP, "mode": "add", "strength": 1.5, "keep_norm": True,
                       "tokens": WINDOW}]},
        {"header": True},
    ],
    ids=["vllm_xargs", "model id", "list", "header"],
)  # fmt: skip
def test_an_operations_fields_are_carried_as_the_angle_is(
    server: Server, carried: dict[str, Any]
) -> None:
    fields = {
        "steering_angle": RAMP,
        "steering_mode": "add",
        "steering_strength": 1.5,
        "steering_keep_norm": True,
        "steering_tokens": WINDOW,
    }
    expected = server.chat(**fields)
    receipt = expected.json()["steering"]
    assert receipt["angle"] == RAMP
    assert (receipt["mode"], receipt["strength"], receipt["keep_norm"]) == ("add", 1.5, True)
    assert receipt["tokens"] == WINDOW
    assert 'strength=1.5, keep_norm=?1, tokens="prompt[-4:],generated[:12]"' in expected.headers[
        "steering"
    ]  # fmt: skip
    if carried == {"header": True}:
        body = {"model": "smollm2", "messages": MESSAGES, "max_tokens": 16, "temperature": 0}
        headers = {"steering": expected.headers["steering"]}
        answer = server.client.post("/v1/chat/completions", json=body, headers=headers)
    else:
        answer = server.chat(**carried)
    assert text(answer) == text(expected)
    assert answer.headers["steering"] == expected.headers["steering"]
    assert text(expected) not in (text(server.chat()), text(server.chat(steering_angle=180)))


def test_three_choices_are_three_steered_choices(server: Server) -> None:
    alone = text(server.chat(steering_angle=180))
    response = server.chat(steering_angle=180, n=3, top_k=1, temperature=1)
    assert response.status_code == 200
    assert "angle=180" in response.headers["steering"]
    answers = [choice["message"]["content"] for choice in response.json()["choices"]]
    assert answers == [alone] * 3


ADDED = {"steering_angle": 1, "steering_mode": "add", "steering_strength": 1.5}

BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"steering_angle": "x"}, "steering_angle", "'x'"),
    ({"steering_angle": float("nan")}, "steering_angle", "nan"),
    ({"steering_angle": float("inf")}, "steering_angle", "inf"),
    ({"steering_angle": 361}, "steering_angle", "361"),
    ({"steering_plane": "sentiment"}, "steering_angle", "null"),
    ({"steering_plane": "no", "steering_angle": 1}, "steering_plane", "'no'"),
    ({"steering_mode": "turn", "steering_angle": 1}, "steering_mode", "'turn'"),
    ({"steering_foo": 7}, "steering_foo", "7"),
    ({"vllm_xargs": {"steering_foo": 7}}, "steering_foo", "7"),
    ({"steering_angle": 1, "vllm_xargs": {"steering_angle": 2}}, "steering_angle", "1"),
    ({"steering_angle": 1, "use_beam_search": True, "n": 2}, "use_beam_search", "True"),
    ({"steering": [{"angle": 1}, {"angle": 2}]}, "steering", "angle"),
    ({"steering_angle": 1, "steering_mode": "add"}, "steering_strength", "null"),
    ({**ADDED, "steering_strength": float("nan")}, "steering_strength", "nan"),
    ({**ADDED, "steering_strength": 1001}, "steering_strength", "1001"),
    ({**ADDED, "steering_mode": "ablate"}, "steering_strength", "1.5"),
    ({**ADDED, "steering_mode": "rotate_to"}, "steering_strength", "1.5"),
    ({**ADDED, "steering_keep_norm": "yes"}, "steering_keep_norm", "'yes'"),
    *(
        ({"steering_angle": 1, "steering_tokens": tokens}, "steering_tokens", shown)
        for tokens, shown in (
            ({"prompt": [3, 3]}, "3, 3"),
            ({"prompt": [3, 2]}, "3, 2"),
            ({"generated": [0.5, 2]}, "0.5"),
            ({"generated": [-4, None]}, "-4"),
            # Known only once the prompt's length is.
            ({"prompt": [900, None]}, "900"),
            ({"prompt": [-900, -800]}, "-900"),
        )
    ),
    ({"steering_angle": {"from": 1, "to": 2, "over": 0}}, "steering_angle.over", "0"),
    ({"steering_angles": [1, 2], "n": 3}, "n", "3"),
    ({"steering_angles": [1, 2], "n": 1}, "n", "1"),
    ({"steering_angles": []}, "steering_angles", "[]"),
    ({"steering_angles": [0] * 16385}, "steering_angles", "16384"),
    ({"steering_angles": [1, 361]}, "steering_angles[1]", "361"),
    ({"steering_angles": [1], "steering_angle": 1}, "steering_angle", "1"),
    ({"steering_angles": [1], "steering": [{"angle": 1}]}, "steering", "angle"),
    ({"steering": [{"angles": [1, 2]}, {"angle": 1}]}, "steering[0].angles", "1"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("fields", "field", "value"), BAD, ids=[str(b[0]) for b in BAD])
def test_bad_input_is_a_400_with_field_value_and_rule(
    server: Server, fields: dict[str, Any], field: str, value: str, stream: bool
) -> None:
    body = {
        "model": "smollm2",
        "messages": [{"role": "user", "content": OCEAN}],
        "stream": stream,
        **fields,
    }
    # httpx's own encoder refuses NaN, which a client may well send.
    response = server.client.post(
        "/v1/chat/completions",
        content=json.dumps(body),
        headers={"content-type": "application/json"},
    )
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == field
    assert error["message"].startswith(f"{field} = ")
    assert value in error["message"]
    assert "steering" not in response.headers


def test_bad_requests_leave_their_batchmates_alone(server: Server) -> None:
    angles = [0, 60, 120, 180]
    alone = [text(server.chat(steering_angle=angle)) for angle in angles]
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        good = [pool.submit(server.chat, steering_angle=angle) for angle in angles]
        bad = [pool.submit(server.chat, steering_angle=361) for _ in range(8)]
        assert [f.result().status_code for f in bad] == [400] * 8
        assert [text(f.result()) for f in good] == alone
    assert server.client.get("/health").status_code == 200


@pytest.mark.parametrize("steering", [{}, {"steering_angle": 180}], ids=["unsteered", "steered"])
def test_a_client_that_leaves_is_no_error(server: Server, steering: dict[str, Any]) -> None:
    def traces() -> int:
        return server.log.read_text().count("Traceback")

    before = traces()
    body = json.dumps(
        {
            "model": "smollm2",
            "messages": [{"role": "user", "content": OCEAN}],
            "max_tokens": 900,
            "ignore_eos": True,
            **steering,
        }
    ).encode()
    with socket.create_connection((server.host, server.port)) as connection:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
        connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
        time.sleep(1)
    deadline = time.monotonic() + 20
    while server.metric("vllm:num_requests_running") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert server.metric("vllm:num_requests_running") == 0
    assert traces() == before


def test_planes_are_listed(server: Server) -> None:
    (card,) = server.client.get("/v1/steering/planes").json()["data"]
    detail = server.client.get(f"/v1/steering/planes/{card['id']}").json()
    assert card["id"] == "sentiment"
    assert card["default_mode"] == "rotate_to"
    assert card["modes"] == ["rotate_by", "rotate_to", "add", "ablate", "cap"]
    assert card.items() <= detail.items()
    assert detail["extraction"]["n"] >= 80
    missing = server.client.get("/v1/steering/planes/none")
    assert missing.status_code == 404
    assert "loaded: sentiment" in missing.json()["error"]["message"]


def test_openapi_has_the_fields(server: Server) -> None:
    schemas = server.client.get("/openapi.json").json()["components"]["schemas"]
    for name in ("ChatCompletionRequest", "CompletionRequest"):
        fields = schemas[name]["properties"]
        assert {f"steering_{name}" for name in (*FIELDS, FAN)} | {"steering"} <= fields.keys()
        assert "degrees" in fields["steering_angle"]["description"].lower()
    # Its answer has no choices.
    fields = schemas["ResponsesRequest"]["properties"]
    assert "steering_strength" in fields
    assert "steering_angles" not in fields


def test_metrics_count_what_was_steered_and_what_was_refused(server: Server) -> None:
    labels = {"plane": "sentiment", "mode": "rotate_to", "outcome": "ok"}

    def counts() -> tuple[float, float, float]:
        return (
            server.metric("steering_requests_total", **labels),
            server.metric("steering_tokens_total", plane="sentiment"),
            server.metric("steering_rejections_total", reason="bad_angle"),
        )

    before = counts()
    usage = server.chat(steering_angle=10).json()["usage"]
    server.chat()
    server.chat(steering_angle=361)
    after = counts()
    assert [b - a for a, b in zip(before, after, strict=True)] == [1, usage["total_tokens"], 1]
    generated = server.chat(steering_angle=10, steering_tokens="generated").json()["usage"]
    assert counts()[1] - after[1] == generated["completion_tokens"]
    before = counts()
    server.chat(steering_angle=10, steering_tokens={"prompt": [-3, None], "generated": [2, 5]})
    assert counts()[1] - before[1] == 3 + 3
