"""The model ids of a server, and those that stand for a steering of one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from steering_server.request.carriers import split_model
from steering_server.request.error import SteeringError

if TYPE_CHECKING:
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels


class ServedModels:
    """Reads model ids by what vLLM serves at the time.

    Args:
        serving: vLLM's own register of the model's names and its adapters.
        presets: name -> words.

    Raises:
        SteeringError: a preset of a name that is taken.
    """

    def __init__(self, serving: OpenAIServingModels, presets: Mapping[str, str]) -> None:
        self._serving = serving
        self._presets = presets
        for name, words in presets.items():
            if self._is_served(name):
                rule = "the name is served as a model already"
                raise SteeringError("--steering-preset", f"{name}={words}", rule, reason="preset")

    def split(self, model: str) -> tuple[str, list[dict[str, Any]] | None]:
        """See :func:`steering_server.request.carriers.split_model`."""
        return split_model(
            model,
            served=self._is_served,
            base=self._serving.model_name(),
            presets=self._presets,
            may_be_served=bool(self._serving.lora_resolvers),
        )

    def _is_served(self, name: str) -> bool:
        return self._serving.is_base_model(name) or name in self._serving.lora_requests
