"""Steering and the prefix cache: what is cached is only ever used for the same steering."""

from __future__ import annotations

from typing import Any

import pytest

from engines import BLOCK, Answer, Engine

LONG = (
    "Here is some background. The town lies on a river, between two hills, and most of its "
    "people work in the mill, the market or the school. In spring the fields flood; in summer "
    "they are dry. Every Thursday there is a fair with bread, cloth and horses. "
) * 3 + "What would a visitor notice first?"

PLAIN = None
A: dict[str, Any] = {"steering_plane": "sentiment", "steering_angle": 30}
B: dict[str, Any] = {"steering_plane": "sentiment", "steering_angle": 200}


def ask(engine: Engine, fields: dict[str, Any] | None) -> Answer:
    """The answer to the long prompt."""
    (answer,) = engine.chat([LONG], [fields], 16)
    return answer


# The scheduler, which hashes, is the same for both runners; V2 is asked once.
@pytest.mark.parametrize(
    ("engine", "first", "second"),
    [
        ("v1", A, PLAIN),
        ("v1", PLAIN, A),
        ("v1", A, B),
        pytest.param("v2", A, B, marks=pytest.mark.slow),
    ],
    ids=["v1-A-plain", "v1-plain-A", "v1-A-B", "v2-A-B"],
    indirect=["engine"],
)
def test_the_second_steering_is_not_served_from_the_first(
    engine: Engine, first: dict[str, Any] | None, second: dict[str, Any] | None
) -> None:
    fresh = []
    for fields in (first, second):
        engine.forget()
        fresh.append(ask(engine, fields))
    assert fresh[0].logprobs != pytest.approx(fresh[1].logprobs, abs=1e-2)
    engine.forget()
    answers = [ask(engine, fields) for fields in (first, second, first, second)]
    assert [a.cached > 0 for a in answers] == [False, False, True, True]
    for answer, expected in zip(answers, fresh * 2, strict=True):
        assert answer.tokens == expected.tokens
        assert answer.logprobs == pytest.approx(expected.logprobs, abs=1e-4)


def test_equal_steerings_share(v1: Engine) -> None:
    """360 is 0 and -90 is 270; rotate_by 0 is no steering; `prompt` steers the prompt as `all`."""
    by = {"steering_plane": "sentiment", "steering_mode": "rotate_by"}
    for first, second in (
        ({**A, "steering_angle": 0}, {**A, "steering_angle": 360}),
        ({**A, "steering_angle": -90}, {**A, "steering_angle": 270}),
        (PLAIN, {**by, "steering_angle": 0}),
        (A, {**A, "steering_tokens": "prompt"}),
        (PLAIN, {**A, "steering_tokens": "generated"}),
    ):
        v1.forget()
        before = ask(v1, first)
        after = ask(v1, second)
        assert before.cached == 0
        assert after.cached == len(before.prompt) // BLOCK * BLOCK
