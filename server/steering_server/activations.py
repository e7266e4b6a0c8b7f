"""Last-prompt-token activations of a transformers model at every steering site."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from steering_planes.contrast import Conversation
from steering_planes.sites import Site, find_sites


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


@torch.inference_mode()
def collect(
    model: Any, tokenizer: Any, conversations: Sequence[Conversation], batch_size: int = 8
) -> dict[Site, Tensor]:
    """The last prompt token's activation at every site: [n, d] float32 on the CPU.

    `model` is a transformers causal language model. Padding goes on the right, where a causal model
    can't see it, and the last real token is read.
    """
    modules = find_sites(model, model.config.get_text_config().num_hidden_layers)
    found: dict[Site, list[Tensor]] = {site: [] for site in modules}
    for start in range(0, len(conversations), batch_size):
        batch = encode(tokenizer, conversations[start : start + batch_size], "right")
        batch = {key: value.to(model.device) for key, value in batch.items()}
        last = batch["attention_mask"].sum(1) - 1
        rows = torch.arange(len(last), device=last.device)

        def keep(site: Site, output: Tensor, rows: Tensor = rows, last: Tensor = last) -> None:
            found[site].append(output[rows, last].float().cpu())

        with hooked(modules, keep):
            model(**batch, use_cache=False)
    return {site: torch.cat(parts) for site, parts in found.items()}
