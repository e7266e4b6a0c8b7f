"""Batches of conversations, and hooks on a model's norms."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from steering_planes.examples import Conversation
from steering_planes.sites import Site
from steering_server.calibrate.chat import Chat


def encode(tokenizer: Any, conversations: Sequence[Conversation], side: str) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask` [b, t], padded on `side` ("left" or "right").

    The template writes BOS itself where the model wants one, so none is added a second time.
    """
    texts = [Chat().text(tokenizer, conversation) for conversation in conversations]
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
