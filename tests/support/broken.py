"""Workers that are not as vLLM's are; vLLM takes them by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu_worker import Worker


class Unwired(CPUWorker):  # type: ignore[misc]
    """Rank 1 loads its model as if the plugin were not there."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        if self.rank == 1:
            Worker.load_model.__wrapped__(self, *args, **kwargs)
        else:
            super().load_model(*args, **kwargs)


class Bypassed(CPUWorker):  # type: ignore[misc]
    """Rank 1 computes the norm of 2.mlp_in without calling it."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        if self.rank == 1:
            bypass(2)
        super().load_model(*args, **kwargs)


class LeftInTheDark(CPUWorker):  # type: ignore[misc]
    """As with drafts in flight under asynchronous scheduling, which a CPU does not have: the host
    knows an upper bound of the tokens computed, and the device each token's position."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        self.model_runner.model_state.steering_by_device = True
        rows = self.model_runner.model_state.steering
        write = rows.write

        def bounded(places: Any, scheduled: Any, computed: Any, positions: Any = None) -> None:
            write(places, scheduled, computed + 3, positions)

        rows.write = bounded


def bypass(layer: int) -> Any:
    """Let Llama's layer compute its second norm in a function that reads weight and epsilon, as
    vLLM's fused_allreduce_rms_norm does. Returns the forward that it had."""
    from vllm.model_executor.models.llama import LlamaDecoderLayer

    forward = LlamaDecoderLayer.forward

    def bypassing(self: Any, positions: Tensor, hidden: Tensor, residual: Tensor | None) -> Any:
        if self.self_attn.attn.layer_name.split(".")[2] != str(layer):
            return forward(self, positions, hidden, residual)
        hidden, residual = self.input_layernorm(hidden, residual)
        hidden = self.self_attn(positions=positions, hidden_states=hidden)
        residual = hidden + residual
        return self.mlp(fused(residual, self.post_attention_layernorm)), residual

    LlamaDecoderLayer.forward = bypassing
    return forward


def fused(x: Tensor, norm: nn.Module) -> Tensor:
    """An RMS norm's own result, without the module."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.variance_epsilon) * norm.weight
