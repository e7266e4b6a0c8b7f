"""What steering adds to the hash of a KV block, so that no block is shared across steerings."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from steering_server.request.angle import Ramp
from steering_server.request.operation import Operation, admitted

if TYPE_CHECKING:
    from vllm.v1.request import Request


def block_key(operations: Sequence[Operation], prompt: int, start: int, end: int) -> str:
    """The steering of the tokens [start, end) of a request whose prompt has ``prompt`` tokens.

    It says of each token what is done to it, equal neighbours together, and is empty where no token
    is steered: two blocks have one key where, and only where, their tokens' steering is equal,
    whatever windows and ramps led to it. The hash of a block contains its predecessor's, so what
    was steered earlier is in the chain and need not be said again.
    """
    acts = [(o, o.tokens.spans(prompt), *_constant(o)) for o in operations]
    runs: list[tuple[int, int, str]] = []
    for first, last in _edges(operations, prompt, start, end):
        said = "+".join(
            f"{before}{degrees!r}{after}"
            for o, spans, before, after in acts
            if any(a <= first < b for a, b in spans)
            and (degrees := o.degrees_within(first - prompt)) is not None
        )
        if runs and runs[-1][2] == said:
            first = runs.pop()[0]
        runs.append((first, last, said))
    return ";".join(
        said if (first, last) == (start, end) else f"[{first - start}:{last - start}]{said}"
        for first, last, said in runs
        if said
    )


def _constant(operation: Operation) -> tuple[str, str]:
    """What is said of an operation before and after its angle."""
    o = operation
    amount = "" if o.strength is None else f":{o.strength!r}:{o.keep_norm}"
    return f"{o.digest}:{o.mode}:", f":{o.gate!r}{amount}"


def _edges(
    operations: Sequence[Operation], prompt: int, start: int, end: int
) -> list[tuple[int, int]]:
    """[start, end) in parts within each of which nothing changes from token to token."""
    cuts = {start, end}
    for operation in operations:
        for span in operation.tokens.spans(prompt):
            cuts.update(span)
        if isinstance(operation.angle, Ramp):
            # It changes with each token up to the one after the last step.
            cuts.update(range(max(start, prompt), min(end, prompt + operation.angle.over) + 1))
    return list(itertools.pairwise(sorted(cut for cut in cuts if start <= cut <= end)))


def with_steering(
    original: Callable[[Request, int, int], list[tuple[Any, ...]]],
    request: Request,
    start_token_idx: int,
    end_token_idx: int,
) -> list[tuple[Any, ...]]:
    """vLLM's position-dependent extra keys of a block, and the steering's."""
    keys = original(request, start_token_idx, end_token_idx)
    operations = getattr(request, "_steering_operations", None)
    if operations is None:  # Read once, for all of its blocks.
        params = request.sampling_params
        operations = admitted(params.extra_args) if params is not None else ()
        request._steering_operations = operations
    if operations:
        key = block_key(operations, request.num_prompt_tokens, start_token_idx, end_token_idx)
        if key:
            return [*keys, ("steering", key)]
    return keys
