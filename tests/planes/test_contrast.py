"""steering_planes.contrast: every form of contrast data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import contrasts
from contrasts import ANSWERS, FORMS, answer, user
from steering_planes.contrast import Contrast, read_classes, read_contrast
from steering_planes.tables import ContrastError

# Quotes, commas, a line's end, letters outside ASCII: what a form may have to escape.
POSITIVE = ['Say "yes", please', "Wie geht’s, Ümit?", "one;two\u2028three", "a\\b\x85c"]
NEGATIVE = ["Say 'no'", "never\tmind", "{not: json}", "four"]


def said(contrast: Contrast) -> tuple[list[Any], list[Any]]:
    return [e.conversation for e in contrast.positive], [e.conversation for e in contrast.negative]


@pytest.fixture(autouse=True)
def _hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("form", FORMS)
def test_a_form_holds_the_same_examples(form: str, tmp_path: Path) -> None:
    found = contrasts.read(FORMS[form](tmp_path, POSITIVE, NEGATIVE))
    assert said(found) == ([user(p) for p in POSITIVE], [user(n) for n in NEGATIVE])
    assert all(file.exists() for file in found.files)
    assert len({e.where for e in (*found.positive, *found.negative)}) >= len(POSITIVE)


@pytest.mark.parametrize("form", ANSWERS)
def test_two_answers_to_a_question(form: str, tmp_path: Path) -> None:
    row = ANSWERS[form]
    (tmp_path / "a.json").write_text(json.dumps([row("q1", "(A)", "(B)"), row("q2", "(B)", "(A)")]))
    found = read_contrast(tmp_path / "a.json")
    assert said(found) == (
        [answer("q1", "(A)"), answer("q2", "(B)")],
        [answer("q1", "(B)"), answer("q2", "(A)")],
    )
    assert found.paired
    assert all(e.has_answer for e in (*found.positive, *found.negative))


def test_what_is_asked_is_the_same_column_in_every_row(tmp_path: Path) -> None:
    rows = [{"system": "Be kind", "input": "Why?", "chosen": "a", "rejected": "b"}] * 2
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (first, _) = read_contrast(tmp_path / "a.json").positive
    assert first.conversation == [{"role": "system", "content": "Be kind"}, *answer("Why?", "a")]
    for gap in ("", None):
        rows[1] = {**rows[1], "input": gap}
        (tmp_path / "a.json").write_text(json.dumps(rows))
        with pytest.raises(ContrastError, match=r"a\.json: item 2: input: (is empty|must be text)"):
            read_contrast(tmp_path / "a.json")


def test_an_array_of_each_class(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"positive": POSITIVE, "negative": NEGATIVE[:3]}))
    found = read_contrast(tmp_path / "a.json")
    assert said(found) == ([user(p) for p in POSITIVE], [user(n) for n in NEGATIVE[:3]])
    assert not found.paired
    with pytest.raises(ContrastError, match="has an array of each class, and no labels"):
        read_contrast(tmp_path / "a.json", positive_label="x")


def test_answers_on_one_side_alone_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text((json.dumps({"messages": answer("a", "b")}) + "\n") * 2)
    (tmp_path / "b.txt").write_text("one\ntwo\n")
    with pytest.raises(ContrastError, match="one class ends with answers, the other with prompts"):
        read_classes(tmp_path / "a.jsonl", tmp_path / "b.txt")


def test_labels_as_pandas_writes_them(tmp_path: Path) -> None:
    contrasts.parquet(
        tmp_path / "a.parquet", [{"text": f"t{i}", "label": i % 2 / 1} for i in range(4)]
    )
    assert said(read_contrast(tmp_path / "a.parquet"))[0] == [user("t1"), user("t3")]


def test_an_option_is_never_passed_over(tmp_path: Path) -> None:
    rows = [{"positive": "a", "negative": "b", "text": f"t{i}", "label": i % 2} for i in range(4)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    assert said(read_contrast(tmp_path / "a.json"))[0] == [user("a")] * 4
    assert said(read_contrast(tmp_path / "a.json", column="text"))[0] == [user("t1"), user("t3")]
    with pytest.raises(ContrastError, match="no: is missing"):
        read_contrast(tmp_path / "a.json", column="no")
    with pytest.raises(ContrastError, match="which is the positive class, 0 or 1"):
        read_contrast(tmp_path / "a.json", positive_label="zzz")


def test_a_system_column_goes_before_a_pair(tmp_path: Path) -> None:
    row = {"system": "Be brief.", "question": "Why?", "chosen": "So.", "rejected": "Well, …"}
    (tmp_path / "a.json").write_text(json.dumps([row, row]))
    (first, _) = read_contrast(tmp_path / "a.json").positive
    assert first.conversation == [
        {"role": "system", "content": "Be brief."},
        *answer("Why?", "So."),
    ]


def test_two_columns_may_be_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("kind,rude,text\na,b,c\nd,e,f\n")
    found = read_contrast(tmp_path / "a.csv", column="kind,rude")
    assert said(found) == ([user("a"), user("d")], [user("b"), user("e")])


def test_samples_are_drawn_and_pairs_stay_together(tmp_path: Path) -> None:
    rows = [{"positive": f"p{i}", "negative": f"n{i}"} for i in range(50)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    whole = read_contrast(tmp_path / "a.json")
    few = whole.sampled(8, seed=3)
    assert len(few.positive) == len(few.negative) == 8
    assert [e.prompt[1:] for e in few.positive] == [e.prompt[1:] for e in few.negative]
    assert few == whole.sampled(8, seed=3) != whole.sampled(8, seed=4)
    assert few.changes == ("8 of 50 and 50",)
    for samples in (1, 51):
        with pytest.raises(ContrastError, match=f"samples={samples}: must be 2 to 50"):
            whole.sampled(samples, seed=0)


def test_a_system_prompt_for_both_classes(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    both = read_classes(tmp_path / "a.txt", tmp_path / "a.txt").under("Be brief.")
    for example in (*both.positive, *both.negative):
        assert example.conversation[0] == {"role": "system", "content": "Be brief."}
    with pytest.raises(ContrastError, match=r"a\.txt:1: has a system prompt already"):
        both.under("Be long.")


# What is refused.

LINES = {
    '{"prompt": "one"}\n{"prompt": 2}\n': ":2: prompt: must be text, is int",
    '{"prompt": "one"}\n\n{"prompt": " "}\n': ":3: prompt: is empty",
    '{"prompt": "one"}\n{"promt": "b"}\n': ":2: has none of prompt, instruction, .*--column",
    '{"prompt": "one"}\n{"prompt"': ":2: must be JSON: ",
    '{"messages": []}\n': ":1: messages.holds no messages",
    '{"messages": [{"role": "tool", "content": "x"}]}': r":1: messages\.0\.role: must",
    '{"messages": [{"role": "system", "content": "x"}]}': ":1: the last message must be",
    '{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}': r"content\.0: must be",
    '{"messages": ["x"]}': r":1: messages\.0\.: must be a message",
    "[1]": ":1: 0.: must be a message",
    "null\n": ":1: text: must be text, is NoneType",
    "": "holds no prompts",
    '{"prompt": "\\ud83d hi"}\n': ":1: prompt: holds half of a character",
    '{"prompt": "only one"}': "holds 1 prompt: a class needs at least 2",
}


@pytest.mark.parametrize("lines", LINES)
def test_a_bad_line_is_named(lines: str, tmp_path: Path) -> None:
    good, bad = tmp_path / "good.txt", tmp_path / "bad.jsonl"
    good.write_text("a\nb\n")
    bad.write_text(lines)
    with pytest.raises(ContrastError, match=LINES[lines]) as caught:
        read_classes(good, bad)
    assert str(caught.value).startswith(f"{bad}")
    assert "\n" not in str(caught.value)


FILES = {
    "a.json": (b'{"a": [1], "b": [2]}', "an array of rows, or an object with one: it has a, b"),
    "m.json": (b'{"prompt": "p", "tags": ["x", "y"]}', "an array of rows, or an object with one"),
    "b.json": (b'{"a": 1', "must be JSON"),
    "c.json": (b"[" * 100_000, "must be JSON"),
    "d.csv": (b"prompt,n\na,1\nb,2,3\n", r"d\.csv:3: has more cells than the 2 of the header"),
    "e.csv": (b"prompt\n\xff\n", "must be UTF-8: byte 7 is not"),
    "f.parquet": (b"PAR1", "must be Parquet"),
    "g.xlsx": (b"PK", "is of no known kind: must end in one of .json, .jsonl"),
    "h.txt": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
    "i.json": (json.dumps([{"text": "a", "label": i} for i in range(3)]).encode(),
               r"has 3 classes \(0, 1, 2\): must be two"),
    "j.json": (b'[{"text": "a", "label": "x"}, {"text": "b", "label": "y"}]',
               r"which is the positive class, x or y\? \(--positive-label\)"),
    "k.json": (b'[{"text": "a"}, {"text": "b"}]', r"item 1: has no two sides \(positive and"),
    "l.json": (b'[{"positive": "a", "negative": "b"}, {"positive": "a"}]', "item 2: negative: is"),
    "none.json": (None, "No such file"),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_no_contrast_is_named(name: str, tmp_path: Path) -> None:
    content, rule = FILES[name]
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ContrastError, match=rule) as caught:
        read_contrast(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_label_may_be_said_to_be_the_positive_one(tmp_path: Path) -> None:
    rows = [{"text": f"{label}{i}", "label": label} for i in range(2) for label in ("y", "x")]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    found = read_contrast(tmp_path / "a.json", positive_label="Y")
    assert said(found) == ([user("y0"), user("y1")], [user("x0"), user("x1")])
