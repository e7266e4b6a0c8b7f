"""The entry point of ``vllm.endpoint_plugins``: vLLM's routes, with steering."""

from __future__ import annotations

import functools
from argparse import Namespace
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.datastructures import State
from vllm.entrypoints.anthropic import api_router as messages
from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest
from vllm.entrypoints.openai.chat_completion import api_router as chat
from vllm.entrypoints.openai.chat_completion.protocol import (
    BatchChatCompletionRequest,
    ChatCompletionRequest,
)
from vllm.entrypoints.openai.completion import api_router as completion
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.responses import api_router as responses
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

from steering_server.engine.requests import admission_of
from steering_server.http import header, planes
from steering_server.http.fields import with_steering
from steering_server.http.guard import Guard

STEERED: dict[str, tuple[APIRouter, type[BaseModel]]] = {
    "/v1/chat/completions": (chat.router, ChatCompletionRequest),
    "/v1/chat/completions/batch": (chat.router, BatchChatCompletionRequest),
    "/v1/completions": (completion.router, CompletionRequest),
    "/v1/messages": (messages.router, AnthropicMessagesRequest),
    "/v1/responses": (responses.router, ResponsesRequest),
}
"""Path -> vLLM's router that defines it, and its request model."""


class SteeringEndpoint:
    """Replaces vLLM's routes by ones that take the steering fields and call vLLM's own handlers."""

    name = "steering"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes; vLLM lets them take the place of its own of the same path."""
        for path, (router, request_class) in STEERED.items():
            route = _route(router, path)
            app.add_api_route(
                path,
                steered(route.endpoint, request_class),
                methods=["POST"],
                dependencies=route.dependencies,
                responses=route.responses,
            )
        app.include_router(planes.router)
        app.add_middleware(Guard, steered=STEERED.keys())

    async def init_state(self, engine_client: Any, state: State, args: Namespace) -> None:
        """Share the engine's admission with the routes."""
        state.steering = admission_of(engine_client.input_processor)


def _route(router: APIRouter, path: str) -> APIRoute:
    for route in router.routes:
        if isinstance(route, APIRoute) and route.path == path and "POST" in route.methods:
            return route
    raise RuntimeError(f"this vLLM has no route POST {path}")


def steered(
    endpoint: Callable[..., Awaitable[Response]], request_class: type[BaseModel]
) -> Callable[..., Awaitable[Response]]:
    """vLLM's handler, with the steering fields admitted before and reported after.

    Admission must come first: a streamed answer's status is sent before the engine sees a request.
    """

    @functools.wraps(endpoint)
    async def handler(request: Any, raw_request: Request) -> Response:
        admission = planes.admission(raw_request)
        rotations = admission.admit(request.steering_args())
        request.carry(rotations)
        response = await endpoint(request, raw_request)
        if rotations and response.status_code < 400:
            response.headers[header.NAME] = header.header(rotations, admission.planes)
        return response

    # FastAPI reads the body's model from the signature.
    del handler.__wrapped__
    handler.__annotations__ = {"request": with_steering(request_class), "raw_request": Request}
    return handler
