"""What steering adds to the hash of a KV block, so that no block is shared across steerings."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from steering_server.request.rotation import Rotation, admitted

if TYPE_CHECKING:
    from vllm.v1.request import Request


def block_key(rotations: tuple[Rotation, ...], prompt: int, start: int, end: int) -> str:
    """The steering of the tokens [start, end) of a request whose prompt has ``prompt`` tokens.

    Empty where no rotation touches the block. The hash of a block contains its predecessor's, so
    what was steered earlier is in the chain and need not be said again. A block that is steered as
    a whole has one key whatever scope led to it: ``all`` and ``prompt`` share the prompt's blocks.
    """
    parts = []
    for r in rotations:
        first = max(start, prompt) if r.tokens == "generated" else start
        last = min(end, prompt) if r.tokens == "prompt" else end
        if first >= last:
            continue
        span = "" if (first, last) == (start, end) else f"[{first - start}:{last - start}]"
        parts.append(f"{r.digest}:{r.mode}:{r.angle!r}:{r.gate!r}{span}")
    return "+".join(parts)


def with_steering(
    original: Callable[[Request, int, int], list[tuple[Any, ...]]],
    request: Request,
    start_token_idx: int,
    end_token_idx: int,
) -> list[tuple[Any, ...]]:
    """vLLM's position-dependent extra keys of a block, and the steering's."""
    keys = original(request, start_token_idx, end_token_idx)
    params = request.sampling_params
    rotations = admitted(params.extra_args) if params is not None else ()
    if rotations:
        key = block_key(rotations, request.num_prompt_tokens, start_token_idx, end_token_idx)
        if key:
            return [*keys, ("steering", key)]
    return keys
