"""The entry point of ``vllm.endpoint_plugins``: steering on every route of vLLM's app."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from fastapi import FastAPI
from starlette.datastructures import State

from steering_server.engine import patches
from steering_server.engine.requests import admission_of
from steering_server.engine.settings import Settings
from steering_server.http import openapi, planes
from steering_server.http.middleware import SteeringMiddleware
from steering_server.request.models import ServedModels


class SteeringEndpoint:
    """Adds the planes' routes and the middleware; vLLM's own routes stay as they are."""

    name = "steering"
    # Of every kind of server: one that does not generate must refuse steering.
    required_tasks = None

    def attach_router(self, app: FastAPI) -> None:
        """Add what needs no engine; called before vLLM's own middleware is added around it."""
        patches.apply_front_end()
        app.include_router(planes.router)
        openapi.document(app)
        app.add_middleware(SteeringMiddleware)

    async def init_state(self, engine_client: Any, state: State, args: Namespace) -> None:
        """Share the engine's admission, and the model ids, with every request.

        Raises:
            SteeringError: a preset whose name is taken.
        """
        if engine_client is None:  # A server that only renders prompts.
            state.steering = Settings.of(state.vllm_config).admission()
            state.steering_models = None
            return
        state.steering = admission_of(engine_client.input_processor)
        state.steering_models = ServedModels(state.openai_serving_models, state.steering.presets)
