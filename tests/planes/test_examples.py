"""steering_planes.examples: a row as a conversation, in everyone's words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from contrasts import answer, user
from steering_planes.contrast import read_classes, read_contrast
from steering_planes.examples import load_prompts
from steering_planes.tables import ContrastError


def test_a_transcript_is_a_conversation(tmp_path: Path) -> None:
    """HH-RLHF."""
    head = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Why?\n\nAssistant:"
    rows = [{"chosen": f"{head} So.", "rejected": f"{head} No\n\nidea."}] * 2
    (tmp_path / "a.json").write_text(json.dumps(rows))
    found = read_contrast(tmp_path / "a.json")
    assert found.negative[0].conversation == [
        *answer("Hi", "Hello."),
        *answer("Why?", "No\n\nidea."),
    ]


def test_a_conversation_in_a_table_of_texts(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text((json.dumps({"messages": json.dumps(user("Hi"))}) + "\n") * 2)
    assert load_prompts(file) == ["Hi", "Hi"]
    file.write_text((json.dumps({"messages": "[{'role': 'user'}]"}) + "\n") * 2)
    with pytest.raises(ContrastError, match=":1: messages: must be a list of messages"):
        load_prompts(file)


def test_roles_of_others_are_ours(tmp_path: Path) -> None:
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"from": "human", "value": "Hi"},
        {"role": "assistant", "content": [{"type": "text", "text": "Hello."}, {"text": "You?"}]},
    ]
    file = tmp_path / "a.jsonl"
    file.write_text((json.dumps({"messages": messages}) + "\n") * 2)
    contrast = read_classes(file, file)
    assert contrast.positive[0].conversation == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello.\nYou?"},
    ]
