"""The selected norms of a loaded model, made to rotate what they return."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from steering_kernels import rotate
from steering_server.engine.retype import retype


def steered_norm(norm_class: Any) -> type:
    """A norm whose output is rotated row by row.

    It keeps its place, its type and its parameters' names in the module tree, so that weight
    reloading, LoRA and sleep mode see what they know.
    """

    class SteeredNorm(norm_class):  # type: ignore[misc]
        steering_bank: Tensor
        steering_rows: Tensor

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = super().forward(*args, **kwargs)
            # Of a pair (normed, residual) only the first is steered.
            normed = out[0] if isinstance(out, tuple) else out
            tokens = normed.reshape(-1, normed.shape[-1])  # [T, d]
            rows = self.steering_rows[: tokens.shape[0]]
            rotated = rotate(tokens, self.steering_bank, rows).view(normed.shape)
            return (rotated, *out[1:]) if isinstance(out, tuple) else rotated

    return SteeredNorm


def steer(norm: nn.Module, bank: Tensor, rows: Tensor) -> None:
    """Turn ``norm`` into a steered one, in place.

    Args:
        norm: a module returning [T, d] (transformers' own, where vLLM runs them, [1, T, d]), or a
            tuple that begins with it.
        bank: [slots, 2, d] float32.
        rows: [max tokens, planes, 5] float32, shared by all sites.
    """
    # Buffers, so that the compiler lifts them to inputs of the graph rather than constants in it.
    norm.register_buffer("steering_bank", bank, persistent=False)
    norm.register_buffer("steering_rows", rows, persistent=False)
    retype(norm, steered_norm)
