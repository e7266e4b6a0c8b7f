"""Prometheus counters of the API server, beside vLLM's own on ``/metrics``."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import Counter

from steering_server.request.operation import Operation, choose

# Not named ``vllm:*``: vLLM unregisters every collector of that name when it starts.
REQUESTS = Counter(
    "steering_requests", "Steered requests that ended.", ["plane", "mode", "outcome"]
)
TOKENS = Counter("steering_tokens", "Tokens within the scope of a steering.", ["plane"])
REJECTIONS = Counter("steering_rejections", "Requests refused for their steering.", ["reason"])


def count_rejection(reason: str) -> None:
    """Count a request refused with a 4xx for its steering fields."""
    REJECTIONS.labels(reason).inc()


def count_request(
    operations: Iterable[Operation], outcome: str, prompt_tokens: int, generated: Iterable[int]
) -> None:
    """Count a steered request that ended.

    Args:
        operations: what was applied.
        outcome: ``ok``, ``aborted`` (by the client) or ``error``.
        prompt_tokens: length of the prompt, cached tokens included.
        generated: tokens of each choice, in order.
    """
    choices = list(generated) or [0]
    for operation in operations:
        within = [
            operation.tokens.count(prompt_tokens, tokens)
            for index, tokens in enumerate(choices)
            if choose([operation], index)
        ]
        REQUESTS.labels(operation.plane, operation.mode, outcome).inc()
        # The prompt is the same one for every choice.
        of_prompt = max((prompt for prompt, _ in within), default=0)
        TOKENS.labels(operation.plane).inc(of_prompt + sum(tokens for _, tokens in within))
