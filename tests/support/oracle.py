"""The truth that the server is held to: transformers, eager, with forward hooks.

Written from METHOD's formulas alone, in double precision, sharing no code with the project: it
reads the artifact's files itself and finds norms by their names.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

LLAMA_NORMS = {"attn_in": "input_layernorm", "mlp_in": "post_attention_layernorm"}


@dataclass(frozen=True)
class Turn:
    """One rotation, as METHOD.md 2 has it."""

    plane: Path
    angle: float
    mode: str
    gate: float | None = None
    tokens: str = "all"


class Oracle:
    """A causal model in fp32 whose norms' outputs are rotated.

    Args:
        model: a transformers model.
        norms: role -> name of the norm in a decoder layer.
    """

    def __init__(self, model: nn.Module, norms: dict[str, str] | None = None) -> None:
        self.model = model.eval()
        self.norms = norms or LLAMA_NORMS

    def logprobs(self, ids: Sequence[int], turns: Sequence[Turn], prompt: int) -> Tensor:
        """Log-probabilities [len(ids), vocabulary] of what follows each token.

        Args:
            ids: prompt and generated tokens.
            turns: rotations, applied in order.
            prompt: how many of ``ids`` are the prompt.
        """
        with torch.no_grad(), self._hooked(turns, len(ids), prompt):
            logits = self.model(torch.tensor([list(ids)])).logits[0]
        return torch.log_softmax(logits.double(), -1)

    @contextmanager
    def _hooked(self, turns: Sequence[Turn], length: int, prompt: int) -> Iterator[None]:
        position = torch.arange(length)
        handles = []
        for turn in turns:
            within = {
                "all": position >= 0,
                "prompt": position < prompt,
                "generated": position >= prompt,
            }[turn.tokens]
            for layer, role, basis in read_plane(turn.plane):
                norm = getattr(self._layers()[layer], self.norms[role])
                handles.append(norm.register_forward_hook(_rotation(turn, basis, within)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _layers(self) -> Any:
        inner = getattr(self.model, "model", None) or getattr(self.model, "transformer", None)
        inner = inner if inner is not None else self.model.gpt_neox
        return inner.layers if hasattr(inner, "layers") else inner.h


def read_plane(folder: Path) -> list[tuple[int, str, Tensor]]:
    """(layer, role, basis [2, d] in float64) of each site in an artifact."""
    config = json.loads((folder / "steering_config.json").read_text())
    tensors = load_file(folder / "steering_plane.safetensors")
    return [
        (s["layer"], s["role"], tensors[f"layers.{s['layer']}.{s['role']}.basis"].double())
        for s in config["sites"]
    ]


def _rotation(turn: Turn, basis: Tensor, within: Tensor) -> Any:
    theta = math.radians(turn.angle)
    cos, sin = math.cos(theta), math.sin(theta)

    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        h = output.double()  # [1, T, d]
        c = h @ basis.T  # [1, T, 2]
        if turn.mode == "rotate_by":
            new = c @ torch.tensor([[cos, sin], [-sin, cos]], dtype=torch.float64)
        else:
            new = c.norm(dim=-1, keepdim=True) * torch.tensor([cos, sin], dtype=torch.float64)
        acts = within if turn.gate is None else within & (c[..., 0] > turn.gate)
        return torch.where(acts.reshape(1, -1, 1), h + (new - c) @ basis, h).to(output.dtype)

    return hook


def assert_greedy(
    logprobs: Tensor,
    prompt: int,
    tokens: Sequence[int],
    reported: Sequence[float],
    *,
    tie: float = 1e-4,
    tolerance: float = 1e-3,
) -> None:
    """``tokens`` are what greedy decoding gives, and their log-probabilities are as reported.

    Each token is compared after the very tokens before it, so nothing after a tie is left out. A
    token that is not the most probable one counts as a difference only if the best two lie further
    than ``tie`` apart.
    """
    for i, (token, value) in enumerate(zip(tokens, reported, strict=True)):
        row = logprobs[prompt - 1 + i]
        best = row.topk(2)
        if token != best.indices[0]:
            gap = float(best.values[0] - best.values[1])
            assert token == best.indices[1], f"token {i}: {token} is not among the best two"
            assert gap <= tie, f"token {i}: {token} lies {gap:.2e} behind {int(best.indices[0])}"
        error = abs(float(row[token]) - value)
        assert error <= tolerance, f"token {i}: log-probability off by {error:.2e}"
