"""vLLM's whole app in this process, with every route that it can have, and no engine behind it."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI

from steering_planes import Plane
from steering_server.engine import requests
from steering_server.request.admission import Admission
from steering_server.request.models import ServedModels

TASKS = ("generate", "transcription", "realtime", "render", "embed", "classify", "score")


def build(planes: dict[str, Plane], patch: pytest.MonkeyPatch) -> FastAPI:
    """The app that `vllm serve` builds, developers' routes included, with the endpoint plugin."""
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    patch.setenv("VLLM_SERVER_DEV_MODE", "1")
    patch.setenv("VLLM_PLUGINS", "steering")
    parser = make_arg_parser(FlexibleArgumentParser())
    flags = ["--model", "m", "--enable-scale-out", "--enable-fault-tolerance"]
    pooling = SimpleNamespace(get_pooling_task=lambda tasks: "embed", is_cross_encoder=True)
    app = build_app(parser.parse_args(flags), TASKS, pooling)
    serving = SimpleNamespace(
        is_base_model=lambda name: name == "m",
        lora_requests={},
        lora_resolvers=[],
        model_name=lambda: "m",
    )
    app.state.steering = Admission(planes, 2, presets={"calm": f"{min(planes)}@90"})
    app.state.steering_models = ServedModels(serving, app.state.steering.presets)
    app.state.enable_server_load_tracking = False
    return app


class Engine:
    """What our patch of ``AsyncLLM.generate`` is given; it keeps what it is asked to generate."""

    def __init__(self, admission: Admission) -> None:
        self.input_processor = SimpleNamespace(_steering_admission=admission)
        self.asked: list[dict[str, Any] | None] = []

    async def _generate(self, prompt: Any, params: Any) -> AsyncGenerator[Any, None]:
        self.asked.append(params.extra_args)
        yield SimpleNamespace(prompt_token_ids=[1], outputs=[])

    def generate(self, prompt: Any, params: Any) -> AsyncGenerator[Any, None]:
        """As vLLM's engine, patched."""
        return requests.generate(lambda e, *args: e._generate(*args), self, prompt, params)
