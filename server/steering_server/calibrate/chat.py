"""Conversations as a model reads them: by a chat template, or as they are."""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steering_planes.examples import Conversation, Example
from steering_planes.tables import ContrastError

PLAIN = "none"
"""For `--chat-template`: the messages' texts, a line's end between them, and no template."""


@dataclass(frozen=True)
class Tokens:
    """A conversation's ids, and at which of them its answer begins: at their end if it has none."""

    ids: list[int]
    answer: int


@dataclass(frozen=True)
class Chat:
    """How a conversation becomes text.

    template: Jinja; None for the tokenizer's own, "" for none at all.
    """

    template: str | None = None

    @classmethod
    def of(cls, option: str | None) -> Chat:
        """What `--chat-template` says: a file, "none", or nothing.

        Raises:
            ContrastError: a file that can't be read.
        """
        if option is None:
            return cls()
        if option == PLAIN:
            return cls("")
        rule = f"--chat-template {option}: must be a file with a chat template, or {PLAIN}"
        try:
            template = Path(option).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ContrastError(f"{rule}: {error}") from None
        if not template.strip():
            raise ContrastError(f"{rule}: it is empty")
        return cls(template)

    def check(self, tokenizer: Any) -> None:
        """Raise ContrastError unless there is a template to use, or none is to be."""
        if self.template is None and not getattr(tokenizer, "chat_template", None):
            name = getattr(tokenizer, "name_or_path", type(tokenizer).__name__)
            raise ContrastError(
                f"{name}: the tokenizer has no chat template (a base model?): "
                f"give --chat-template FILE, or --chat-template {PLAIN} for the text as it is"
            )

    def sha256(self, tokenizer: Any) -> str | None:
        """Of the template's text, 64 hex digits; None without one."""
        template = tokenizer.chat_template if self.template is None else self.template
        return hashlib.sha256(str(template).encode()).hexdigest() if template else None

    def text(self, tokenizer: Any, conversation: Conversation) -> str:
        """With the generation prompt after a user's turn; an answer is left open.

        Raises:
            jinja2.TemplateError, ValueError, TypeError: a template that does not take it.
        """
        if self.template == "":
            return "\n".join(message["content"] for message in conversation)
        self.check(tokenizer)
        answered = conversation[-1]["role"] == "assistant"
        text: str = tokenizer.apply_chat_template(
            conversation,
            chat_template=self.template,
            tokenize=False,
            add_generation_prompt=not answered,
            continue_final_message=answered,
        )
        return text

    def tokens(self, tokenizer: Any, example: Example) -> Tokens:
        """An example's ids. A template writes BOS itself where the model wants one.

        Raises:
            ContrastError: a template that does not take it, naming the example.
        """
        from jinja2 import TemplateError

        try:
            text = self.text(tokenizer, example.conversation)
        except (TemplateError, ValueError, TypeError) as error:
            said = " ".join(str(error).split())
            rule = f"the chat template does not take it: {said}"
            raise ContrastError(f"{example.where}: {rule}") from None
        special = self.template == ""
        ids: list[int] = tokenizer(text, add_special_tokens=special)["input_ids"]
        if not example.has_answer:
            return Tokens(ids, len(ids))
        before = tokenizer(text[: _answer(example, text)], add_special_tokens=special)["input_ids"]
        # A token that joins the question's last space and the answer's first word is the answer's.
        same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(ids, before, strict=False))
        return Tokens(ids, sum(1 for _ in same))


def _answer(example: Example, text: str) -> int:
    """Where the last message's text begins; templates may trim it."""
    for content in (example.prompt, example.prompt.rstrip(), example.prompt.strip()):
        if content and text.endswith(content):
            return len(text) - len(content)
    rule = "the chat template does not leave the answer open, as its last text"
    raise ContrastError(f"{example.where}: {rule}")
