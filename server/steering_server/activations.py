"""Conversations as a model reads them, and hooks on its norms."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from steering_planes.contrast import Conversation
from steering_planes.sites import Site


def prompt_text(tokenizer: Any, conversation: Conversation) -> str:
    """The conversation in the model's chat template, with the generation prompt.

    Raises ValueError if the tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise ValueError(f"{tokenizer.name_or_path}: the tokenizer has no chat template")
    text: str = tokenizer.apply_chat_template(
        conversation, add_generation_prompt=True, tokenize=False
    )
    return text


def chat_template_sha256(tokenizer: Any) -> str:
    """SHA-256 of the chat template's text, 64 hex digits."""
    return hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()


def encode(tokenizer: Any, conversations: Sequence[Conversation], side: str) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask` [b, t], padded on `side` ("left" or "right").

    The template writes BOS itself where the model wants one, so none is added a second time.
    """
    texts = [prompt_text(tokenizer, conversation) for conversation in conversations]
    encoded = tokenizer(
        texts, add_special_tokens=False, padding=True, padding_side=side, return_tensors="pt"
    )
    return {key: encoded[key] for key in ("input_ids", "attention_mask")}


@contextmanager
def hooked(
    modules: dict[Site, nn.Module], act: Callable[[Site, Tensor], Tensor | None]
) -> Iterator[None]:
    """Call `act(site, output)` on each norm's output; it is replaced by what that returns."""

    def hook_of(site: Site) -> Callable[..., Tensor | None]:
        return lambda module, inputs, output: act(site, output)

    with ExitStack() as stack:
        for site, module in modules.items():
            stack.callback(module.register_forward_hook(hook_of(site)).remove)
        yield
