"""The engine against transformers with hooks, token for token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engines import Answer, Engine
from oracle import Oracle, Turn, assert_greedy

PROMPTS = [
    "Tell me about the ocean.",
    "What is a good way to spend a Sunday?",
    "Describe a small town in autumn.",
    "How does a bicycle stay upright?",
    "Write two sentences about bread.",
    "What happens when it rains 17 days in a row?",
    "Explain what a library is for.",
    "Name three things one finds in a kitchen.",
]

STEERINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "by-60": (
        {"steering_angle": 60, "steering_mode": "rotate_by"},
        {"angle": 60, "mode": "rotate_by"},
    ),
    "to-180": (
        {"steering_angle": 180, "steering_mode": "rotate_to"},
        {"angle": 180, "mode": "rotate_to"},
    ),
    "to-30-gated": (
        {"steering_angle": 30, "steering_mode": "rotate_to", "steering_gate": 0.0},
        {"angle": 30, "mode": "rotate_to", "gate": 0.0},
    ),
    "generated": (
        {"steering_angle": 180, "steering_mode": "rotate_to", "steering_tokens": "generated"},
        {"angle": 180, "mode": "rotate_to", "tokens": "generated"},
    ),
    "added": (
        {"steering_angle": 180, "steering_mode": "add", "steering_strength": 0.5},
        {"angle": 180, "mode": "add", "strength": 0.5},
    ),
    "capped-below": (
        {
            "steering_angle": 180,
            "steering_mode": "cap",
            "steering_strength": 0.5,
            "steering_keep_norm": True,
        },
        {"angle": 180, "mode": "cap", "strength": 0.5, "keep_norm": True},
    ),
    "fading": (
        {
            "steering_angle": {"from": 200, "to": 20, "over": 24},
            "steering_mode": "rotate_to",
            "steering_tokens": {"prompt": [-6, None], "generated": [1, None]},
        },
        {
            "angle": (200, 20, 24),
            "mode": "rotate_to",
            "tokens": {"prompt": [-6, None], "generated": [1, None]},
        },
    ),
    "prompt": (
        {"steering_angle": -120, "steering_mode": "rotate_by", "steering_tokens": "prompt"},
        {"angle": 240, "mode": "rotate_by", "tokens": "prompt"},
    ),
}
SCOPED = ("generated", "prompt", "added", "capped-below", "fading")
TOKENS = 32


def check(oracle: Oracle, answer: Answer, turns: list[Turn]) -> None:
    """The answer is the oracle's, under ``turns``."""
    ids = answer.prompt + answer.tokens
    logprobs = oracle.logprobs(ids, turns, len(answer.prompt))
    assert_greedy(logprobs, len(answer.prompt), answer.tokens, answer.logprobs)


# The interpreter is slow: fewer prompts there; the runner's own part is the same for every plane.
@pytest.mark.parametrize(
    ("engine", "plane", "prompts", "tokens"),
    [
        ("v1", "sentiment", 8, TOKENS),
        ("v1", "wide", 8, TOKENS),
        # In CI, compiled answers are compared with eager ones.
        pytest.param("v1_compiled", "sentiment", 8, TOKENS, marks=pytest.mark.slow),
        pytest.param("v1_compiled", "wide", 8, TOKENS, marks=pytest.mark.slow),
        ("v2", "sentiment", 2, 12),
        pytest.param("v2", "sentiment", 8, TOKENS, marks=pytest.mark.slow),
    ],
    indirect=["engine"],
)
def test_every_steering_equals_transformers(
    engine: Engine,
    oracle: Oracle,
    planes: dict[str, Path],
    plane: str,
    prompts: int,
    tokens: int,
) -> None:
    asked = [(p, name) for name in STEERINGS for p in PROMPTS[: 2 if name in SCOPED else prompts]]
    fields = [{"steering_plane": plane, **STEERINGS[name][0]} for _, name in asked]
    answers = engine.chat([prompt for prompt, _ in asked], fields, tokens)
    for (_, name), answer in zip(asked, answers, strict=True):
        check(oracle, answer, [Turn(planes[plane], **STEERINGS[name][1])])


@pytest.mark.parametrize(
    ("engine", "tokens"),
    [("v1", 16), pytest.param("v2", 4, marks=pytest.mark.slow)],
    indirect=["engine"],
)
def test_sixteen_angles_in_a_batch_are_sixteen_requests_alone(engine: Engine, tokens: int) -> None:
    fields: list[dict[str, Any] | None] = [
        {"steering_plane": "sentiment", "steering_angle": 22.5 * i} for i in range(16)
    ]
    fields[5] = {"steering_plane": "sentiment", "steering_angle": 0, "steering_mode": "rotate_by"}
    fields[11] = None
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(16)]
    together = engine.chat(prompts, fields, tokens)
    alone = [engine.chat([p], [f], tokens)[0] for p, f in zip(prompts, fields, strict=True)]
    assert [a.tokens for a in together] == [a.tokens for a in alone]
    assert len({tuple(a.tokens) for a in together}) > 8, "the angles make no difference"


# Against the plain V1 runner: to the last digits on V1, to another kernel's rounding on V2.
@pytest.mark.parametrize(
    ("engine", "tolerance"),
    [("v1", 1e-6), pytest.param("v2", 1e-4, marks=pytest.mark.slow)],
    indirect=["engine"],
)
def test_unsteered_requests_among_steered_ones_are_plain_vllm(
    engine: Engine, tolerance: float, plain: Engine, oracle: Oracle
) -> None:
    # The same batch on both engines, so that not even the shape of a matrix differs.
    off = {"steering_plane": "wide", "steering_angle": 0, "steering_mode": "rotate_by"}
    steered = {"steering_plane": "wide", "steering_angle": 90}
    mixed = engine.chat(PROMPTS, [None, steered, off, steered] * 2, 16)
    expected = plain.chat(PROMPTS, [None] * len(PROMPTS), 16)
    check(oracle, expected[0], [])
    for i, (answer, unsteered) in enumerate(zip(mixed, expected, strict=True)):
        if i % 2:
            assert answer.logprobs != pytest.approx(unsteered.logprobs, abs=1e-2)
        else:
            assert answer.tokens == unsteered.tokens
            assert answer.logprobs == pytest.approx(unsteered.logprobs, abs=tolerance)


def test_compiled_and_eager_agree(v1: Engine, v1_compiled: Engine) -> None:
    fields = [{"steering_plane": "sentiment", "steering_angle": 45 * i} for i in range(8)]
    eager, compiled = (e.chat(PROMPTS, fields, TOKENS) for e in (v1, v1_compiled))
    for one, other in zip(eager, compiled, strict=True):
        assert one.tokens == other.tokens
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-3)
