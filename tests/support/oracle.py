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
    """One operation, as METHOD.md 2 has it.

    Attributes:
        plane: the artifact's folder.
        angle: degrees; or where they start, where they stop, and over how many generated tokens.
        mode: rotate_by, rotate_to, add, ablate or cap.
        gate: act only where c1 exceeds it.
        tokens: all, prompt, generated, or slices of the latter two.
        strength: of add, ablate and cap.
        keep_norm: scale what comes out to the length of what came in.
    """

    plane: Path
    angle: float | tuple[float, float, int]
    mode: str
    gate: float | None = None
    tokens: str | dict[str, list[int | None]] = "all"
    strength: float | None = None
    keep_norm: bool = False

    def within(self, length: int, prompt: int) -> Tensor:
        """[length]: which tokens it acts on."""
        acts = torch.zeros(length, dtype=torch.bool)
        slices = self.tokens
        if isinstance(slices, str):
            words = ("prompt", "generated") if slices == "all" else (slices,)
            slices = {word: [None, None] for word in words}
        for part, tokens in (("prompt", acts[:prompt]), ("generated", acts[prompt:])):
            if part in slices:
                tokens[slice(*slices[part])] = True
        return acts

    def radians(self, length: int, prompt: int) -> Tensor:
        """[length]: its angle at each token."""
        if isinstance(self.angle, float | int):
            return torch.full((length,), math.radians(self.angle), dtype=torch.float64)
        start, stop, over = self.angle
        generated = torch.arange(length, dtype=torch.float64) - prompt
        return torch.deg2rad(start + (stop - start) * (generated / over).clamp(0, 1))


class Oracle:
    """A causal model, as a rule in fp32, whose norms' outputs are steered.

    Args:
        model: a transformers model.
        norms: role -> name of the norm in a decoder layer.
    """

    def __init__(self, model: nn.Module, norms: dict[str, str] | None = None) -> None:
        self.model = model.eval()
        self.norms = norms or LLAMA_NORMS
        self.device = next(model.parameters()).device

    def logprobs(self, ids: Sequence[int], turns: Sequence[Turn], prompt: int) -> Tensor:
        """Log-probabilities [len(ids), vocabulary] of what follows each token.

        Args:
            ids: prompt and generated tokens.
            turns: operations, applied in order.
            prompt: how many of ``ids`` are the prompt.
        """
        with torch.no_grad(), self._hooked(turns, len(ids), prompt):
            logits = self.model(torch.tensor([list(ids)], device=self.device)).logits[0]
        return torch.log_softmax(logits.double(), -1).cpu()

    @contextmanager
    def _hooked(self, turns: Sequence[Turn], length: int, prompt: int) -> Iterator[None]:
        handles = []
        for turn in turns:
            within, radians = turn.within(length, prompt), turn.radians(length, prompt)
            u = torch.stack((radians.cos(), radians.sin()), -1)  # [length, 2]
            within, u = within.to(self.device), u.to(self.device)
            for site in read_plane(turn.plane, self.device):
                norm = getattr(self._layers()[site.layer], self.norms[site.role])
                handles.append(norm.register_forward_hook(_operation(turn, site, within, u)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _layers(self) -> Any:
        inner = getattr(self.model, "model", None) or getattr(self.model, "transformer", None)
        inner = inner if inner is not None else self.model.gpt_neox
        return inner.layers if hasattr(inner, "layers") else inner.h


@dataclass(frozen=True)
class PlaneSite:
    """A site of an artifact, in float64.

    Attributes:
        basis: [2, d].
        means: [2, 2], of the positive class and of the negative; None in format version 1.
        rho: their distance.
    """

    layer: int
    role: str
    basis: Tensor
    means: Tensor | None
    rho: float


def read_plane(folder: Path, device: torch.device | str = "cpu") -> list[PlaneSite]:
    """Each site of an artifact."""
    config = json.loads((folder / "steering_config.json").read_text())
    tensors = load_file(folder / "steering_plane.safetensors", str(device))
    sites = []
    for site in config["sites"]:
        name = f"layers.{site['layer']}.{site['role']}"
        means, rho = (tensors.get(f"{name}.{part}") for part in ("means", "rho"))
        sites.append(
            PlaneSite(
                site["layer"],
                site["role"],
                tensors[f"{name}.basis"].double(),
                None if means is None else means.double(),
                0.0 if rho is None else float(rho),
            )
        )
    return sites


def _operation(turn: Turn, site: PlaneSite, within: Tensor, u: Tensor) -> Any:
    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        h = output.double()  # [1, T, d]
        c = h @ site.basis.T  # [1, T, 2]
        new = _new_coordinates(turn, site, c, u)
        steered = h + (new - c) @ site.basis
        if turn.keep_norm and not turn.mode.startswith("rotate"):
            steered *= h.norm(dim=-1, keepdim=True) / steered.norm(dim=-1, keepdim=True)
        acts = within if turn.gate is None else within & (c[..., 0] > turn.gate)
        return torch.where(acts.reshape(1, -1, 1), steered, h).to(output.dtype)

    return hook


def _new_coordinates(turn: Turn, site: PlaneSite, c: Tensor, u: Tensor) -> Tensor:
    """c' [1, T, 2] from c, with u [T, 2]."""
    along = (c * u).sum(-1, keepdim=True)
    if turn.mode == "rotate_by":
        (cos, sin), (c1, c2) = u.unbind(-1), c.unbind(-1)
        return torch.stack((cos * c1 - sin * c2, sin * c1 + cos * c2), -1)
    if turn.mode == "rotate_to":
        return c.norm(dim=-1, keepdim=True) * u
    s = 1.0 if turn.strength is None else turn.strength
    if turn.mode == "add":
        return c + s * site.rho * u
    if turn.mode == "ablate":
        return c - s * along * u
    assert turn.mode == "cap"
    assert site.means is not None
    high, low = (u @ site.means.T).unbind(-1)  # [T] each: the classes' means on u.
    limit = (low + s * (high - low))[:, None]
    return c - (along - limit).clamp(min=0) * u


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
