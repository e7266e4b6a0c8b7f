"""What is steered says so: a ticket for every request, a receipt in every answer."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Any

from starlette.datastructures import Headers, MutableHeaders, QueryParams
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from vllm import envs
from vllm.entrypoints.anthropic.protocol import AnthropicError, AnthropicErrorResponse
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response

from steering_server.request import metrics
from steering_server.request.ask import is_reserved
from steering_server.request.error import SteeringError
from steering_server.request.receipt import NAME, header, member
from steering_server.request.ticket import CURRENT, GENERATING, RESPONSES, Ticket

_USAGE = re.compile(rb'"usage": ?\{')
_DATA = b"data: {"
FORWARDED = "x-steering"
"""The request header's other name: many proxies forward what begins with x- and nothing else."""

_HEADERS = (NAME, FORWARDED)
_ANSWER_ID = re.compile(rb'"id":"(resp_[^"]+)"')


class SteeringMiddleware:
    """ASGI middleware. It reads no body: what a request asks for is taken where its route reads it.

    The application's state holds ``steering`` (the admission) and ``steering_models``.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        # As long as vLLM keeps the answers themselves.
        self._stored: dict[str, Ticket] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            headers = Headers(scope=scope)
            if NAME in headers or FORWARDED in headers:
                reason = f"{NAME}: this route does not take steering"
                metrics.count_rejection("unsupported_route")
                await send({"type": "websocket.close", "code": 1008, "reason": reason})
                return
            await self.app(scope, _without_steering(receive, send), send)
            return
        if scope["type"] != "http" or scope["method"] not in ("GET", "POST"):
            await self.app(scope, receive, send)
            return
        state = scope["app"].state
        headers = Headers(scope=scope)
        crosses_origins = "origin" in headers
        if scope["method"] == "GET":
            path, _, answer_id = _path(scope).rpartition("/")
            stored = self._stored.get(answer_id) if path == RESPONSES else None
            if stored is not None and (given := stored.admitted):
                ticket = Ticket(path, state.steering, operations=given, admitted=given)
                send = _Answer(ticket, send, scope, receive, crosses_origins=crosses_origins).send
            await self.app(scope, receive, send)
            return
        ticket = Ticket(
            path=_path(scope),
            admission=state.steering,
            models=state.steering_models,
            header=headers.get(NAME, headers.get(FORWARDED)),
        )
        answer = _Answer(ticket, send, scope, receive, crosses_origins=crosses_origins)
        if ticket.path == RESPONSES and envs.VLLM_ENABLE_RESPONSES_API_STORE:
            answer.named = lambda answer_id: self._stored.update({answer_id: ticket})
        if (misplaced := _misplaced(ticket, scope, headers)) is not None:
            metrics.count_rejection(misplaced.reason)
            await answer.refuse(misplaced)
            return
        token = CURRENT.set(ticket)
        try:
            await self.app(scope, receive, answer.send)
        except SteeringError as error:
            # From work that nothing of vLLM's catches, once the answer has begun.
            if answer.has_begun:
                raise
            await answer.refuse(ticket.error or error)
        finally:
            CURRENT.reset(token)


def _misplaced(ticket: Ticket, scope: Scope, headers: Headers) -> SteeringError | None:
    """What can be said against a request's steering before its body is read."""
    query = QueryParams(scope["query_string"])
    for place, names in (("query", query), ("header", headers)):
        for name in names:
            if is_reserved(name.removeprefix("x-")) and (place == "query" or name not in _HEADERS):
                rule = f"nothing reads it in the {place}; give it in the body, or as header {NAME}"
                value = query.get(name) if place == "query" else headers.get(name)
                return SteeringError(name, value, rule, reason="unknown_field")
    if ticket.header is None:
        return None
    if len(headers.getlist(NAME) + headers.getlist(FORWARDED)) > 1:
        rule = f"given twice; one header {NAME} or {FORWARDED}, with lists for several planes"
        return SteeringError(NAME, ticket.header, rule, reason="conflicting_fields")
    if not ticket.generates:
        rule = f"{ticket.path} does not take steering; {', '.join(sorted(GENERATING))} do"
        return SteeringError(NAME, ticket.header, rule, reason="unsupported_route")
    return None


class _Answer:
    """An answer on its way out: refused, or given a receipt, or let through as it is."""

    def __init__(
        self, ticket: Ticket, send: Send, scope: Scope, receive: Receive, *, crosses_origins: bool
    ) -> None:
        self._ticket = ticket
        self._send = send
        self._scope = scope
        self._receive = receive
        self._crosses_origins = crosses_origins
        self._start: Message | None = None
        self._put: Any = None  # What puts the receipt into the body's next part.
        self._told = False  # Whether the receipt is in the body.
        self._is_steered = False
        self._is_refused = False
        self.has_begun = False
        self.named: Callable[[str], None] | None = None  # Told the id of the answer.

    async def send(self, message: Message) -> None:
        if self._is_through(message):
            await self._send(message)
            return
        if self._is_refused:
            return
        if message["type"] == "http.response.start":
            if self._ticket.error is not None:
                await self.refuse(self._ticket.error)
                return
            await self._begin(message)
        elif message["type"] == "http.response.body":
            await self._continue(message)
        else:
            await self._send(message)

    async def refuse(self, error: SteeringError) -> None:
        """Answer with a 400, once, in the shape of the API that was asked, and nothing else."""
        if self._is_refused:
            return
        self._is_refused = True
        response = create_error_response(error)
        if self._ticket.path.startswith("/v1/messages"):
            content = AnthropicErrorResponse(
                error=AnthropicError(type="invalid_request_error", message=response.error.message)
            )
        else:
            content = response
        answer = JSONResponse(content.model_dump(), status_code=HTTPStatus.BAD_REQUEST)
        await answer(self._scope, self._receive, self._send)

    def _is_through(self, message: Message) -> bool:
        """Whether the message is one of the many that nothing is to be done about."""
        if not self.has_begun or not self._is_steered:
            return self.has_begun
        if not self._told or self.named is not None or not message.get("more_body"):
            return False
        return _USAGE.search(message.get("body", b"")) is None

    async def _begin(self, start: Message) -> None:
        ticket = self._ticket
        self._is_steered = bool(ticket.operations or ticket.header)
        if start["status"] >= HTTPStatus.MULTIPLE_CHOICES or not self._is_steered:
            self._is_steered = False
            self.has_begun = True
            await self._send(start)
            return
        kind = Headers(raw=start["headers"]).get("content-type", "")
        # A JSON answer is held until its body is there, whose length changes.
        self._start = start
        if kind.startswith("application/json"):
            self._put = self._into_object
            return
        if kind.startswith("text/event-stream"):
            self._put = self._into_events
        await self._release()

    async def _release(self, more: int = 0) -> None:
        start, self._start = self._start, None
        if start is None:
            return
        headers = MutableHeaders(raw=list(start["headers"]))
        if self._ticket.operations:
            headers[NAME] = header(self._ticket.operations, self._ticket.admission.planes)
            if self._crosses_origins:
                headers.append("access-control-expose-headers", NAME)
        if more and "content-length" in headers:
            headers["content-length"] = str(int(headers["content-length"]) + more)
        self.has_begun = True
        await self._send({**start, "headers": headers.raw})

    async def _continue(self, message: Message) -> None:
        body: bytes = message.get("body", b"")
        # Before the last word: of a JSON answer, before the first.
        is_decisive = self._start is not None or not message.get("more_body")
        if self._is_steered and is_decisive and not self._ticket.is_kept:
            what = self._ticket.operations or self._ticket.header
            raise RuntimeError(
                f"{self._ticket.path} answered without the steering asked for: {what}"
            )
        if self._put is not None:
            if self.named is not None and (found := _ANSWER_ID.search(body)):
                self.named(found.group(1).decode())
                self.named = None
            added = self._put(body)
            await self._release(len(added) - len(body))
            message = {**message, "body": added}
        await self._send(message)

    def _member(self, *, brief: bool = False) -> bytes:
        assert self._ticket.operations is not None
        return member(self._ticket.operations, self._ticket.admission.planes, brief=brief)

    def _into_object(self, body: bytes) -> bytes:
        if self._told or not self._ticket.operations or not body.startswith(b"{"):
            return body
        self._told = True
        return _spliced(body, 0, self._member())

    def _into_events(self, body: bytes) -> bytes:
        """The receipt in the first event, and in those that count the tokens."""
        if not self._ticket.operations or (self._told and not _USAGE.search(body)):
            return body
        lines = body.split(b"\n")
        for i, line in enumerate(lines):
            if line.startswith(_DATA) and (not self._told or _USAGE.search(line)):
                lines[i] = _spliced(line, len(_DATA) - 1, self._member(brief=self._told))
                self._told = True
        return b"\n".join(lines)


def _spliced(text: bytes, at: int, member: bytes) -> bytes:
    """A JSON object with one more member; ``text[at]`` is its opening brace."""
    rest = text[at + 1 :]
    comma = b"" if rest.lstrip().startswith(b"}") else b","
    return text[: at + 1] + member + comma + rest


def _path(scope: Scope) -> str:
    path: str = scope["path"]
    root = scope.get("root_path", "").rstrip("/")
    return path.removeprefix(root) if path.startswith(f"{root}/") else path


def _without_steering(receive: Receive, send: Send) -> Receive:
    """Messages of a socket, which carries no steering: one that asks for some closes it."""

    async def checked() -> Message:
        message = await receive()
        text: str = message.get("text") or ""
        # An escape could spell the word in other ways.
        may_ask = "steer" in text.casefold() or "\\u" in text
        if may_ask and (key := _asked_of_socket(text)) is not None:
            reason = f"{key}: this route does not take steering"
            metrics.count_rejection("unsupported_route")
            await send({"type": "websocket.close", "code": 1008, "reason": reason})
            return {"type": "websocket.disconnect", "code": 1008}
        return message

    return checked


def _asked_of_socket(text: str) -> str | None:
    try:
        event = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(event, Mapping):
        return None
    places = [event, *(value for value in event.values() if isinstance(value, Mapping))]
    return next((key for place in places for key in place if is_reserved(key)), None)
