"""Routes that would drop steering refuse it."""

from __future__ import annotations

import json
from collections.abc import Collection
from http import HTTPStatus

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response

from steering_server import metrics
from steering_server.engine.admission import SteeringError, steering_fields


class Guard:
    """ASGI middleware: a JSON body with steering fields, on a route that knows none, is a 400.

    vLLM's request models let unknown fields pass, so such a route would answer unsteered.

    Args:
        app: the next application.
        steered: paths whose routes take the fields.
    """

    def __init__(self, app: ASGIApp, steered: Collection[str]) -> None:
        self.app = app
        self.steered = frozenset(steered)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if (
            scope["type"] != "http"
            or scope["method"] != "POST"
            or self._path(scope) in self.steered
        ):
            await self.app(scope, receive, send)
            return
        messages = [await receive()]
        while messages[-1]["type"] == "http.request" and messages[-1].get("more_body"):
            messages.append(await receive())
        field = _steering_field(b"".join(m.get("body", b"") for m in messages))
        if field is not None:
            rule = (
                f"{self._path(scope)} does not take steering; {', '.join(sorted(self.steered))} do"
            )
            error = SteeringError(*field, rule, reason="unsupported_route")
            metrics.count_rejection(error.reason)
            body = create_error_response(error).model_dump()
            response = JSONResponse(body, status_code=HTTPStatus.BAD_REQUEST)
            await response(scope, receive, send)
            return

        async def replay() -> Message:
            return messages.pop(0) if messages else await receive()

        await self.app(scope, replay, send)

    @staticmethod
    def _path(scope: Scope) -> str:
        path: str = scope["path"]
        return path.removeprefix(scope.get("root_path", ""))


def _steering_field(body: bytes) -> tuple[str, object] | None:
    # Most bodies are spared the parsing; an escape could spell the word in other ways.
    if b"steering" not in body and b"\\u" not in body:
        return None
    try:
        parsed = json.loads(body)
    except ValueError:
        return None  # Not JSON: the route's own parser says so.
    if not isinstance(parsed, dict):
        return None
    return next(iter(steering_fields(parsed).items()), None)
