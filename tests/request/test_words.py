"""Steering in words."""

from __future__ import annotations

from typing import Any

import pytest

from steering_server.request.words import parse_words


@pytest.mark.parametrize(
    ("words", "items"),
    [
        ("sentiment@90", [{"plane": "sentiment", "angle": 90.0}]),
        ("@-90.5", [{"angle": -90.5}]),
        ("sentiment", [{"plane": "sentiment"}]),
        (
            "sentiment@180,rotate_by,generated,gate=0.5",
            [
                {
                    "plane": "sentiment",
                    "angle": 180.0,
                    "mode": "rotate_by",
                    "tokens": "generated",
                    "gate": 0.5,
                }
            ],
        ),
        (
            "a@180..-0.5/64,add,strength=-1.5,keep_norm,prompt[-4:],generated[:16]",
            [
                {
                    "plane": "a",
                    "angle": {"from": 180.0, "to": -0.5, "over": 64},
                    "mode": "add",
                    "strength": -1.5,
                    "keep_norm": True,
                    "tokens": {"prompt": [-4, None], "generated": [None, 16]},
                }
            ],
        ),
        (
            "a@1,gate=none+b@2",
            [{"plane": "a", "angle": 1.0, "gate": None}, {"plane": "b", "angle": 2.0}],
        ),
    ],
)
def test_words_are_items(words: str, items: list[dict[str, Any]]) -> None:
    assert parse_words(words) == items


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        ("", "must name a plane or an angle"),
        ("a@", "an angle in degrees"),
        ("a@x", "'x'"),
        ("a@1,turn", "unknown word 'turn'"),
        ("a@1,all,prompt", "'prompt' says the tokens a second time"),
        ("a@1,gate=x", "a number or none"),
        ("a@1,strength=x", "a number after 'strength='"),
        ("a@1..2", "FROM..TO/OVER"),
        ("a@1,prompt[:2],prompt[3:]", "says the tokens a second time"),
        ("a@1,all,prompt[3:]", "says the tokens a second time"),
        ("a@1,prompt[3]", "slices as in"),
        ("a@1+", "must name a plane or an angle"),
    ],
)
def test_what_cannot_be_read_is_named(words: str, rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        parse_words(words)
