"""Presets among the models that a server lists."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from steering_server.engine.requests import admission_of

if TYPE_CHECKING:
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels
    from vllm.entrypoints.serve.engine.protocol import ModelList


async def show_available_models(
    original: Callable[[OpenAIServingModels], Awaitable[ModelList]], serving: OpenAIServingModels
) -> ModelList:
    """The model, its adapters, and the presets, whose parent the model is."""
    listed = await original(serving)
    base = listed.data[0]
    presets = admission_of(serving.input_processor).presets
    listed.data += [
        base.model_copy(update={"id": name, "parent": base.id, "root": f"{base.id}:{words}"})
        for name, words in presets.items()
    ]
    return listed
