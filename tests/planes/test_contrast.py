"""steering_planes.contrast: both forms of a contrast set, and the ones in the repository."""

import json
from pathlib import Path

import pytest

from steering_planes.contrast import ContrastError, ContrastSet, load_prompts

SETS = Path(__file__).parents[2] / "steering_vectors" / "contrast_sets"
PROMPTS = ["Hello", "How are you?"]
SYSTEMS = {"positive": {"system": "Be kind."}, "negative": {"system": "Be rude."}}


def load(tmp_path: Path, content: object) -> ContrastSet:
    file = tmp_path / "set.json"
    file.write_text(json.dumps(content))
    return ContrastSet.load(file)


def test_the_same_prompts_under_two_system_prompts(tmp_path: Path) -> None:
    positive, negative = load(tmp_path, SYSTEMS | {"prompts": PROMPTS}).conversations()
    assert positive[1] == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "How are you?"},
    ]
    assert [c[0]["content"] for c in negative] == ["Be rude."] * 2
    assert [c[1] for c in positive] == [c[1] for c in negative]


def test_two_lists_of_prompts(tmp_path: Path) -> None:
    lists = {"positive": {"prompts": PROMPTS}, "negative": {"prompts": ["a", "b", "c"]}}
    positive, negative = load(tmp_path, lists).conversations()
    assert positive[0] == [{"role": "user", "content": "Hello"}]
    assert len(negative) == 3


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        ([], "contrast set"),
        (SYSTEMS, "prompts are given once"),
        (SYSTEMS | {"prompts": ["one"]}, "prompts: .*at least 2"),
        (SYSTEMS | {"prompts": ["one", ""]}, "prompts.1: .*at least 1 character"),
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
def test_another_form_is_refused(tmp_path: Path, content: object, rule: str) -> None:
    with pytest.raises(ContrastError, match=rule) as caught:
        load(tmp_path, content)
    assert "set.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_prompts_are_lines(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "one"}\n{"prompt": "two"}\n')
    assert load_prompts(file) == ["one", "two"]
    file.write_text('{"prompt": "one"}\n{"prompt": 2}\n')
    with pytest.raises(ContrastError, match=r"prompts\.jsonl:2: "):
        load_prompts(file)
    file.write_text("")
    with pytest.raises(ContrastError, match="holds no prompts"):
        load_prompts(file)


def test_the_held_out_prompts_are_held_out() -> None:
    contrast = ContrastSet.load(SETS / "sentiment.json")
    held_out = load_prompts(SETS / "sentiment_heldout.jsonl")
    assert len(set(contrast.prompts or ())) == len(contrast.prompts or ()) >= 80
    assert len(set(held_out)) == len(held_out) == 30
    assert not set(held_out) & set(contrast.prompts or ())
