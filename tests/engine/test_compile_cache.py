"""A graph traced for some sites is never found again for others."""

from __future__ import annotations

from pathlib import Path

import pytest

import engines
from engines import Engine
from oracle import Oracle, Turn, assert_greedy
from planes import random_plane


def test_other_sites_are_another_graph(
    v1_compiled: Engine, smollm2: Path, oracle: Oracle, tmp_path: Path
) -> None:
    """The engine before left its graph in the same cache; the new one has sites it never had."""
    del v1_compiled
    plane = random_plane(tmp_path / "other", ["2.attn_in", "25.attn_in"], seed=3)
    starting = engines.start(smollm2, {"wide": plane}, enforce_eager=False)
    fields = {"steering_angle": 150, "steering_mode": "rotate_to"}
    for engine in starting:
        answers = engine.chat(["Tell me about the ocean."] * 2, [fields, None], 16)
    steered, unsteered = answers
    assert steered.logprobs != pytest.approx(unsteered.logprobs, abs=1e-2)
    for answer, turns in ((steered, [Turn(plane, 150, "rotate_to")]), (unsteered, [])):
        ids = answer.prompt + answer.tokens
        logprobs = oracle.logprobs(ids, turns, len(answer.prompt))
        assert_greedy(logprobs, len(answer.prompt), answer.tokens, answer.logprobs)
