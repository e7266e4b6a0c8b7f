"""Random requests at random moments in random chunks, against transformers with hooks."""

from __future__ import annotations

import pytest
import torch

import traffic
from engines import Engine
from tiny import Tiny


@pytest.mark.parametrize(
    ("engine", "count"),
    [("erratic_v1", 300), ("erratic_v2", 50)],
    indirect=["engine"],
)
def test_random_traffic_equals_transformers(engine: Engine, count: int, tiny_llama: Tiny) -> None:
    asks = traffic.asks(tiny_llama.planes, count, seed=count)
    before = engine.preemptions
    replies = traffic.send(engine, asks, seed=5)
    for ask, reply in zip(asks, replies, strict=True):
        traffic.check(tiny_llama.oracle, ask, reply)
    # What the traffic must have met for this to say anything.
    assert engine.preemptions > before
    assert sum(reply.cached for reply in replies) > 0


@pytest.mark.parametrize(
    ("engine", "count"), [("speculative_v1", 100), ("speculative_v2", 15)], indirect=["engine"]
)
def test_random_traffic_verified_several_tokens_at_a_time(
    engine: Engine, count: int, tiny_llama: Tiny
) -> None:
    # Beside sampled requests V1's rejection sampler gives greedy ones tokens that no model's logits
    # explain, on the CPU, with or without steering: 30 of 100 in this very traffic.
    asks = traffic.asks(tiny_llama.planes, count, seed=count, greedy=True)
    before = engine.accepted_drafts
    for ask, reply in zip(asks, traffic.send(engine, asks, seed=6), strict=True):
        traffic.check(tiny_llama.oracle, ask, reply)
    assert engine.accepted_drafts > before


def test_the_oracle_tells_steerings_apart(tiny_llama: Tiny) -> None:
    """A steering that were ignored would be seen: most move a log-probability by far over 1e-3."""
    moved = []
    for ask in traffic.asks(tiny_llama.planes, 100, seed=1):
        if ask.turns and len(ask.prompt) > 4:
            ids = ask.prompt + ask.prompt[:4]
            steered, plain = (
                tiny_llama.oracle.logprobs(ids, turns, len(ask.prompt)) for turns in (ask.turns, [])
            )
            moved.append(float((steered - plain).abs().max()))
    assert float((torch.tensor(moved) > 0.01).double().mean()) > 0.8
