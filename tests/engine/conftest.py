"""Engines of a tiny model under schedulers that vLLM's users have, but their tests rarely."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

import engines

if TYPE_CHECKING:
    from engines import Engine
    from tiny import Tiny

TINY: dict[str, Any] = {
    "skip_tokenizer_init": True,
    "disable_log_stats": False,
    "steering": {"max_planes": 2},
}

ERRATIC: dict[str, Any] = {
    **TINY,
    "scheduler_cls": "erratic.ErraticAsyncScheduler",
    "async_scheduling": True,
    "max_model_len": 160,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 64,
    # Of 32 tokens each, for sixteen requests of up to 133 tokens: some must give way.
    "num_gpu_blocks_override": 14,
}

SPECULATIVE: dict[str, Any] = {
    **TINY,
    "async_scheduling": False,
    "max_model_len": 640,
    "max_num_seqs": 32,
    "max_num_batched_tokens": 32,
    "speculative_config": {
        "method": "ngram",
        "num_speculative_tokens": 4,
        "prompt_lookup_min": 1,
        "prompt_lookup_max": 3,
    },
}


@pytest.fixture(scope="session")
def erratic_v1(tiny_llama: Tiny) -> Iterator[Engine]:
    """V1, asynchronous, in random chunks, with too few KV blocks for all requests at once."""
    yield from engines.start(tiny_llama.model, tiny_llama.planes, **ERRATIC)


@pytest.fixture(scope="session")
def erratic_v2(tiny_llama: Tiny) -> Iterator[Engine]:
    """V2 likewise."""
    yield from engines.start(tiny_llama.model, tiny_llama.planes, v2=True, **ERRATIC)


@pytest.fixture(scope="session")
def speculative_v1(tiny_llama: Tiny) -> Iterator[Engine]:
    """V1, synchronous, in chunks of 32, verifying up to five tokens a step."""
    yield from engines.start(tiny_llama.model, tiny_llama.planes, **SPECULATIVE)


@pytest.fixture(scope="session")
def speculative_v2(tiny_llama: Tiny) -> Iterator[Engine]:
    """V2 likewise."""
    yield from engines.start(tiny_llama.model, tiny_llama.planes, v2=True, **SPECULATIVE)
