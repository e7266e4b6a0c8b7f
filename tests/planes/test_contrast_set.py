"""steering_planes.contrast_set: our own form, and the sets in the repository."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from contrasts import user
from steering_planes.contrast_set import ContrastSet
from steering_planes.examples import load_prompts
from steering_planes.tables import ContrastError

SETS = Path(__file__).parents[2] / "steering_vectors" / "contrast_sets"
PROMPTS = ["Hello", "How are you?"]
SYSTEMS = {"positive": {"system": "Be kind."}, "negative": {"system": "Be rude."}}


def of(content: object) -> ContrastSet:
    return ContrastSet.of(Path("set.json"), content)


def test_the_same_prompts_under_two_system_prompts() -> None:
    positive, negative = of(SYSTEMS | {"prompts": PROMPTS}).conversations()
    assert positive[1] == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "How are you?"},
    ]
    assert [c[0]["content"] for c in negative] == ["Be rude."] * 2
    assert [c[1] for c in positive] == [c[1] for c in negative]


def test_two_lists_of_prompts() -> None:
    lists = {"positive": {"prompts": PROMPTS}, "negative": {"prompts": ["a", "b", "c"]}}
    positive, negative = of(lists).conversations()
    assert positive[0] == user("Hello")
    assert len(negative) == 3


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        ([], "contrast set"),
        (SYSTEMS, "prompts are given once"),
        (SYSTEMS | {"prompts": ["one"]}, "prompts: .*at least 2"),
        (SYSTEMS | {"prompts": ["one", ""]}, "prompts.1: .*at least 1 character"),
        (SYSTEMS | {"prompts": ["one", 2]}, "prompts.1: .*valid string"),
        (SYSTEMS | {"prompts": PROMPTS, "promts": []}, "promts: Extra inputs"),
        (SYSTEMS | {"prompts": PROMPTS, "negative": {}}, "either both sides have a system prompt"),
        (SYSTEMS | {"prompts": PROMPTS, "negative": SYSTEMS["positive"]}, "two different"),
        ({"positive": {"prompts": PROMPTS}, "negative": {}}, "prompts are given once"),
        (
            {
                "positive": {"prompts": PROMPTS},
                "negative": {"prompts": PROMPTS},
                "prompts": PROMPTS,
            },
            "prompts are given once",
        ),
    ],
)
def test_another_form_is_refused(content: object, rule: str) -> None:
    with pytest.raises(ContrastError, match=rule) as caught:
        of(content)
    assert "set.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_held_out_prompts_are_held_out() -> None:
    file = SETS / "sentiment.json"
    contrast = ContrastSet.of(file, json.loads(file.read_bytes()))
    held_out = load_prompts(SETS / "sentiment_heldout.jsonl")
    assert len(set(contrast.prompts or ())) == len(contrast.prompts or ()) >= 80
    assert len(set(held_out)) == len(held_out) == 30
    assert not set(held_out) & set(contrast.prompts or ())
