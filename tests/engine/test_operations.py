"""Every operation, alone and in three planes, against transformers with hooks."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import engines
import tiny
import traffic
from engines import Engine
from oracle import Oracle, Turn
from planes import random_plane
from tiny import Tiny

OPERATIONS: tuple[dict[str, Any], ...] = (
    {"mode": "rotate_by", "angle": 100.0},
    {"mode": "rotate_to", "angle": 200.0},
    {"mode": "add", "angle": 310.0, "strength": 0.75},
    {"mode": "ablate", "angle": 20.0, "strength": 0.8},
    {"mode": "cap", "angle": 340.0, "strength": -0.5},
)
MANY: dict[str, Any] = {"steering": {"max_planes": 3}, "max_num_seqs": 64}
TINY = {**MANY, "skip_tokenizer_init": True, "max_model_len": 128}


def steerings(planes: dict[str, Path]) -> list[list[Turn]]:
    """Operation x norm kept or not x gate or none x one plane or all three."""
    return [
        [
            Turn(
                plane,
                **operation,
                keep_norm=keep_norm,
                # A gate that lets about half of the tokens through; never a value that c1 is at.
                gate=0.013 * (k + 1) if gated else None,
            )
            for k, plane in enumerate([*planes.values()][:count])
        ]
        for operation, keep_norm, gated, count in itertools.product(
            OPERATIONS, (False, True), (False, True), (1, 3)
        )
    ]


def check(engine: Engine, oracle: Oracle, planes: dict[str, Path], prompt: list[int]) -> None:
    """All in one batch, each log-probability of prompt and answer."""
    asked = steerings(planes)
    fields = [traffic.fields(turns, planes) for turns in asked]
    outputs = engine.score([prompt] * (len(asked) + 1), [*fields, None], 6)
    *_, (_, plain) = outputs
    for turns, (ids, logprobs) in zip([*asked, []], outputs, strict=True):
        truth = oracle.logprobs(ids, turns, len(prompt))
        expected = truth[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        assert logprobs == pytest.approx(expected.tolist(), abs=1e-3), turns
    moved = [
        max(abs(a - b) for a, b in zip(logprobs[: len(prompt) - 1], plain, strict=False))
        for _, logprobs in outputs[:-1]
    ]
    assert min(moved) > 0.005, "an operation that does nothing"


@pytest.fixture(scope="module")
def three_planes(
    planes: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Of SmolLM2: the bundled one, and two at sites of their own and at its sites."""
    sites = ["3.attn_in", "12.mlp_in", "20.attn_in", "20.mlp_in"]
    third = random_plane(tmp_path_factory.mktemp("planes") / "third", sites, seed=11)
    return {**planes, "third": third}


@pytest.fixture(scope="module")
def smollm2_v1(smollm2: Path, three_planes: dict[str, Path]) -> Iterator[Engine]:
    yield from engines.start(smollm2, three_planes, in_process=True, **MANY)


@pytest.fixture(scope="module")
def smollm2_v2(smollm2: Path, three_planes: dict[str, Path]) -> Iterator[Engine]:
    yield from engines.start(smollm2, three_planes, v2=True, **MANY)


@pytest.fixture(scope="module")
def gemma2(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A norm whose gain is 1 + weight, and four roles."""
    return tiny.steerable("gemma2", tmp_path_factory.mktemp("gemma2"))


@pytest.fixture(scope="module")
def gemma2_v1(gemma2: Tiny) -> Iterator[Engine]:
    yield from engines.start(gemma2.model, gemma2.planes, in_process=True, **TINY)


@pytest.fixture(scope="module")
def gemma2_v2(gemma2: Tiny) -> Iterator[Engine]:
    """On Triton's kernels, as a GPU has it."""
    options = {**TINY, "steering": {**TINY["steering"], "kernels": "triton"}}
    yield from engines.start(gemma2.model, gemma2.planes, v2=True, **options)


@pytest.mark.parametrize(
    "engine", ["smollm2_v1", pytest.param("smollm2_v2", marks=pytest.mark.slow)], indirect=True
)
def test_smollm2_equals_transformers(
    engine: Engine, oracle: Oracle, three_planes: dict[str, Path], smollm2: Path
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    prompt = tokenizer("The ocean covers most of the planet, and most of it is dark.").input_ids
    check(engine, oracle, three_planes, prompt)


@pytest.mark.parametrize(
    "engine", ["gemma2_v1", pytest.param("gemma2_v2", marks=pytest.mark.slow)], indirect=True
)
def test_gemma2_equals_transformers(engine: Engine, gemma2: Tiny) -> None:
    check(engine, gemma2.oracle, gemma2.planes, [1, *range(10, 50, 3)])
