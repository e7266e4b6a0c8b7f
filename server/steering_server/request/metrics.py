"""Prometheus counters of the API server, beside vLLM's own on ``/metrics``."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import Counter

from steering_server.request.rotation import Rotation

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
    rotations: Iterable[Rotation], outcome: str, prompt_tokens: int, generated_tokens: int
) -> None:
    """Count a steered request that ended.

    Args:
        rotations: what was applied.
        outcome: ``ok``, ``aborted`` (by the client) or ``error``.
        prompt_tokens: length of the prompt, cached tokens included.
        generated_tokens: over all choices.
    """
    within = {
        "all": prompt_tokens + generated_tokens,
        "prompt": prompt_tokens,
        "generated": generated_tokens,
    }
    for rotation in rotations:
        REQUESTS.labels(rotation.plane, rotation.mode, outcome).inc()
        TOKENS.labels(rotation.plane).inc(within[rotation.tokens])
