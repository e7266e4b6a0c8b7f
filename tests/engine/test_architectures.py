"""Every architecture, by role: tiny random models against transformers with hooks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import engines
import tiny
from oracle import Oracle, Turn
from planes import random_plane

PROMPT = [1, *range(10, 50, 3)]
TURNS: list[dict[str, Any]] = [
    {"mode": "rotate_by", "angle": 100.0},
    {"mode": "rotate_to", "angle": 200.0},
    {"mode": "add", "angle": 40.0, "strength": 1.5, "keep_norm": True},
    {"mode": "ablate", "angle": 10.0, "strength": 1.0},
    {"mode": "cap", "angle": 300.0, "strength": -1.0},
]


def check(name: str, folder: Path, *, v2: bool) -> None:
    """Prompt and generated log-probabilities, steered at every role of two layers."""
    kind = tiny.ARCHITECTURES[name]
    model = tiny.make(name, folder / "model")
    plane = random_plane(
        folder / "plane",
        [f"{layer}.{role}" for layer in (1, 2) for role in kind.norms],
        base_model_name_or_path="tiny/model",
        model_type=model.config.model_type,
        hidden_size=tiny.HIDDEN,
        num_layers=tiny.LAYERS,
    )
    oracle = Oracle(model, kind.norms)
    starting = engines.start(
        folder / "model",
        {"tiny": plane},
        v2=v2,
        in_process=not v2 and not kind.borrowed,
        skip_tokenizer_init=True,
        max_model_len=128,
        max_num_seqs=8,
    )
    for engine in starting:
        fields: list[dict[str, Any] | None] = [
            {f"steering_{name}": value for name, value in turn.items()} for turn in TURNS
        ]
        outputs = engine.score([PROMPT] * (len(TURNS) + 1), [*fields, None], 8)
    turns = [[Turn(plane, **turn)] for turn in TURNS]
    for (ids, logprobs), steering in zip(outputs, [*turns, []], strict=True):
        truth = oracle.logprobs(ids, steering, len(PROMPT))
        expected = truth[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        assert logprobs == pytest.approx(expected.tolist(), abs=1e-3)
    plain = torch.tensor(outputs[-1][1][: len(PROMPT) - 1])
    for _, logprobs in outputs[:-1]:
        assert float((torch.tensor(logprobs[: len(plain)]) - plain).abs().max()) > 0.01


@pytest.mark.parametrize(
    "name",
    [
        # In processes of their own, a minute each: one of them in CI.
        pytest.param(name, marks=pytest.mark.slow) if name == "gpt_neox" else name
        for name in tiny.ARCHITECTURES
    ],
)
def test_v1_equals_transformers(name: str, tmp_path: Path) -> None:
    check(name, tmp_path, v2=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2"])
def test_v2_equals_transformers(name: str, tmp_path: Path) -> None:
    check(name, tmp_path, v2=True)
