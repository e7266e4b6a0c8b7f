"""Conversations as ids, and where their answers begin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from contrasts import answer, user
from steering_planes.examples import Conversation, Example
from steering_planes.tables import ContrastError
from steering_server.calibrate.chat import Chat


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2)


def example(conversation: Conversation) -> Example:
    return Example(conversation, "a.jsonl:3")


def test_a_prompt_ends_with_the_generation_prompt(tokenizer: Any) -> None:
    tokens = Chat().tokens(tokenizer, example(user("Why?")))
    assert tokenizer.decode(tokens.ids).endswith("Why?<|im_end|>\n<|im_start|>assistant\n")
    assert tokens.answer == len(tokens.ids)


@pytest.mark.parametrize("said", ["Because.", " (A)", "two\nlines  ", "Ümlaut’s 😀 end"])
def test_an_answer_is_left_open_and_begins_after_the_prompt(tokenizer: Any, said: str) -> None:
    tokens = Chat().tokens(tokenizer, example(answer("Why?", said)))
    prompt = Chat().tokens(tokenizer, example(user("Why?")))
    whole = tokenizer.decode(tokens.ids)
    assert "<|im_end|>" not in whole.rpartition("assistant")[2]
    assert tokens.ids[: tokens.answer] == prompt.ids
    assert tokenizer.decode(tokens.ids[tokens.answer :]).strip() == said.strip()


def test_none_is_the_text_as_it_is(tokenizer: Any) -> None:
    plain = Chat.of("none")
    tokens = plain.tokens(tokenizer, example(answer("Why?", " So.")))
    assert tokenizer.decode(tokens.ids) == "Why?\n So."
    assert tokenizer.decode(tokens.ids[tokens.answer :]) == " So."
    assert plain.sha256(tokenizer) is None


def test_a_template_may_be_brought(tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "template.jinja"
    file.write_text("{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}")
    chat = Chat.of(str(file))
    text = chat.text(tokenizer, [{"role": "system", "content": "a"}, *user("b")])
    assert text == "[system] a [user] b "
    assert chat.sha256(tokenizer) != Chat().sha256(tokenizer)
    with pytest.raises(ContrastError, match="--chat-template none-such: must be a file"):
        Chat.of("none-such")


@pytest.mark.parametrize(
    ("template", "rule"),
    [
        ("{{ raise_exception('System role not supported') }}", "System role not supported"),
        ("{% if %}", "does not take it"),
        ("{{ messages[0].content.nothing.at_all }}", "does not take it"),
    ],
)
def test_a_template_that_refuses_names_the_example(
    tokenizer: Any, template: str, rule: str
) -> None:
    with pytest.raises(ContrastError, match=rule) as caught:
        Chat(template).tokens(tokenizer, example(user("b")))
    assert str(caught.value).startswith("a.jsonl:3: the chat template does not take it")
    assert "\n" not in str(caught.value)


def test_a_template_that_hides_the_answer_is_refused(tokenizer: Any) -> None:
    template = "{% for m in messages %}{{ m.content }}!{% endfor %}"
    hidden = Chat(template.replace("m.content }}", "m.content | upper }}"))
    with pytest.raises(ContrastError, match=r"a\.jsonl:3: "):
        hidden.tokens(tokenizer, example(answer("why", "so")))
    shown = Chat(template).tokens(tokenizer, example(answer("why", "so")))
    assert tokenizer.decode(shown.ids) == "why!so"
