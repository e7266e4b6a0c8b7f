"""The selected norms of a loaded model, made to steer what they return."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from vllm import envs
from vllm.model_executor.layers.layernorm import GemmaRMSNorm, RMSNorm

from steering_kernels import Kernels, add_rms_norm_steer, steer
from steering_server.engine.retype import retype


def steered_norm(norm_class: Any) -> type:
    """A norm whose output is steered row by row.

    It keeps its place, its type and its parameters' names in the module tree, so that weight
    reloading, LoRA and sleep mode see what they know.
    """

    class SteeredNorm(norm_class):  # type: ignore[misc]
        steering_bank: Tensor
        steering_classes: Tensor
        steering_rows: Tensor
        steering_kernels: Kernels

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = super().forward(*args, **kwargs)
            # Of a pair (normed, residual) only the first is steered.
            normed = out[0] if isinstance(out, tuple) else out
            tokens = normed.flatten(0, -2)  # [T, d]
            rows = _rows_of(tokens, self.steering_rows)
            steered = steer(
                tokens, self.steering_bank, self.steering_classes, rows, self.steering_kernels
            ).view(normed.shape)
            return (steered, *out[1:]) if isinstance(out, tuple) else steered

    return SteeredNorm


def fused_norm(norm_class: Any) -> type:
    """An RMS norm of vLLM that our kernel computes, steering included."""

    class FusedNorm(norm_class):  # type: ignore[misc]
        steering_bank: Tensor
        steering_classes: Tensor
        steering_rows: Tensor
        steering_kernels: Kernels

        def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
            tokens = x.flatten(0, -2)  # [T, d]
            out, total = add_rms_norm_steer(
                tokens,
                None if residual is None else residual.flatten(0, -2),
                self.weight.data,
                self.variance_epsilon,
                self.steering_bank,
                self.steering_classes,
                _rows_of(tokens, self.steering_rows),
                unit_offset=issubclass(norm_class, GemmaRMSNorm),
                kernels=self.steering_kernels,
            )
            return out.view(x.shape) if total is None else (out.view(x.shape), total.view(x.shape))

    return FusedNorm


def _rows_of(tokens: Tensor, rows: Tensor) -> Tensor:
    """A row for each of the tokens. Not a slice, which would ask whether there are fewer rows:
    under vLLM's unbacked shapes nothing may be asked of the number of tokens."""
    return rows.narrow(0, 0, tokens.shape[0])


def is_fusable(norm: nn.Module) -> bool:
    """Whether our kernel computes what this very norm does.

    Subclasses, norms over a part of the vector or without a gain, and vLLM's batch-invariant one
    are not: their own code runs, and its output is steered.
    """
    if envs.VLLM_BATCH_INVARIANT:
        return False
    if type(norm) is RMSNorm:
        return bool(norm.has_weight) and norm.variance_size_override is None
    return type(norm) is GemmaRMSNorm


def wire(
    norm: nn.Module, bank: Tensor, classes: Tensor, rows: Tensor, kernels: Kernels, fuse: bool
) -> None:
    """Turn ``norm`` into a steered one, in place.

    Args:
        norm: a module returning [T, d] (transformers' own, where vLLM runs them, [1, T, d]), or a
            tuple that begins with it.
        bank: [slots, 2, d] float32.
        classes: [slots, 5] float32.
        rows: [max tokens, planes, 7] float32, shared by all sites.
        kernels: what steers.
        fuse: whether our kernel computes the norm as well, where it can. Else vLLM's own runs, and
            whatever its compiler passes make of it.
    """
    # Buffers, so that the compiler lifts them to inputs of the graph rather than constants in it.
    norm.register_buffer("steering_bank", bank, persistent=False)
    norm.register_buffer("steering_classes", classes, persistent=False)
    norm.register_buffer("steering_rows", rows, persistent=False)
    norm.steering_kernels = kernels  # type: ignore[assignment]
    kind: Callable[[Any], type] = fused_norm if fuse and is_fusable(norm) else steered_norm
    retype(norm, kind)
