"""What vLLM serves requests through is checked when it is ready: on no road may a field be lost."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.datastructures import State

from steering_server.engine.requests import admission_of
from steering_server.engine.settings import SettingsError
from steering_server.request import batch

ENDPOINT = "steering"


async def init_endpoint_plugins_state(
    original: Callable[..., Awaitable[None]], engine_client: Any, state: State, args: Namespace
) -> None:
    """vLLM's last word before it serves.

    Raises:
        SettingsError: planes are loaded, and the app lacks what steers its requests: vLLM goes on
            without an endpoint plugin that fails to load.
    """
    await original(engine_client, state, args)
    if engine_client is None:
        return
    admission = admission_of(engine_client.input_processor)
    if not admission.planes:
        return
    plugins = getattr(state, "endpoint_plugins", None)
    if plugins is None:  # No app: `vllm run-batch`.
        batch.steer(state, admission)
    elif not any(getattr(plugin, "name", None) == ENDPOINT for plugin in plugins):
        raise SettingsError(
            "planes are loaded, but vLLM did not load the endpoint plugin 'steering', without "
            "which steering fields would be ignored; VLLM_PLUGINS must name it, and its import "
            "must not fail (see the log above)"
        )
