"""Random requests at random moments in random chunks, against transformers with hooks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import engines
import traffic
from engines import Engine
from tiny import Tiny

OPTIONS = {
    "skip_tokenizer_init": True,
    "max_model_len": 160,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 64,
    "disable_log_stats": False,
    # Of 32 tokens each, for sixteen requests of up to 133 tokens: some must give way.
    "num_gpu_blocks_override": 14,
    "steering": {"max_planes": 2},
}


@pytest.fixture(scope="module")
def erratic_v1(tiny_llama: Tiny) -> Iterator[Engine]:
    yield from engines.start(
        tiny_llama.model,
        tiny_llama.planes,
        scheduler_cls="erratic.ErraticAsyncScheduler",
        async_scheduling=True,
        **OPTIONS,
    )


@pytest.fixture(scope="module")
def erratic_v1_sync(tiny_llama: Tiny) -> Iterator[Engine]:
    yield from engines.start(
        tiny_llama.model,
        tiny_llama.planes,
        scheduler_cls="erratic.ErraticScheduler",
        async_scheduling=False,
        **OPTIONS,
    )


@pytest.fixture(scope="module")
def erratic_v2(tiny_llama: Tiny) -> Iterator[Engine]:
    yield from engines.start(
        tiny_llama.model,
        tiny_llama.planes,
        v2=True,
        scheduler_cls="erratic.ErraticAsyncScheduler",
        async_scheduling=True,
        **OPTIONS,
    )


@pytest.mark.parametrize(
    ("engine", "count"),
    [("erratic_v1", 300), ("erratic_v1_sync", 100), ("erratic_v2", 60)],
    indirect=["engine"],
)
def test_random_traffic_equals_transformers(engine: Engine, count: int, tiny_llama: Tiny) -> None:
    asks = traffic.asks(tiny_llama.planes, count, seed=count)
    before = engine.metric("vllm:num_preemptions")
    replies = traffic.send(engine, asks, seed=5)
    for ask, reply in zip(asks, replies, strict=True):
        traffic.check(tiny_llama.oracle, ask, reply)
    # What the traffic must have met for this to say anything.
    assert engine.metric("vllm:num_preemptions") > before
    assert sum(reply.cached for reply in replies) > 0


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
