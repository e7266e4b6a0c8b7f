"""What the middleware does to a stream's events, one by one, without an engine."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from planes import random_plane
from steering_planes import Plane
from steering_server.http.middleware import SteeringMiddleware
from steering_server.request.admission import Admission
from steering_server.request.generation import Generation
from steering_server.request.ticket import CURRENT

WORD = b'data: {"id":"c","choices":[]}\n\n'
USAGE = b'data: {"id":"c","usage":{"total_tokens":3}}\n\n'


def streamed(
    admission: Admission, body: dict[str, Any], parts: list[dict[str, Any]]
) -> list[bytes]:
    """What a client gets of ``parts``, the messages of an answer's body."""

    async def route(scope: Any, receive: Any, send: Any) -> None:
        ticket = CURRENT.get()
        assert ticket is not None
        ticket.read_json(dict(body))
        ticket.give(None, Generation())
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for part in parts:
            await send({"type": "http.response.body", **part})

    async def receive() -> Any:
        raise AssertionError("the route reads no body")

    sent: list[bytes] = []

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            sent.append(message.get("body", b""))

    scope: dict[str, Any] = {
        "type": "http",
        "method": "POST",
        "path": "/v1/completions",
        "query_string": b"",
        "headers": [],
        "app": SimpleNamespace(state=SimpleNamespace(steering=admission, steering_models=None)),
    }
    asyncio.run(SteeringMiddleware(route)(scope, receive, send))
    return sent


def test_the_first_event_and_those_that_count_tokens_carry_the_receipt(tmp_path: Path) -> None:
    admission = Admission({"p": Plane.load(random_plane(tmp_path / "p", ["1.attn_in"]))}, 1)
    texts = [WORD, WORD, USAGE, WORD]
    # A message need not have a body.
    parts = [*({"body": text, "more_body": True} for text in texts), {"more_body": True}, {}]
    first, second, usage, third, *rest = streamed(admission, {"steering_angle": 90}, parts)
    assert first.startswith(b'data: {"steering":{"plane":"p","angle":90.0,')
    assert usage.startswith(b'data: {"steering":{"plane":"p","angle":90.0,')
    assert (second, third, rest) == (WORD, WORD, [b"", b""])
    assert streamed(admission, {}, parts) == [*texts, b"", b""]
