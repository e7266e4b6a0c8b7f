"""However vLLM's compiler is told to take the number of tokens, the answers are the same."""

from __future__ import annotations

import pytest

import engines
import traffic
from tiny import Tiny


@pytest.mark.slow
@pytest.mark.parametrize("shapes", ["backed", "backed_size_oblivious", "unbacked"])
def test_a_graph_for_any_number_of_tokens_equals_transformers(
    tiny_llama: Tiny, shapes: str
) -> None:
    asks = traffic.asks(tiny_llama.planes, 12, seed=6, greedy=True, longest=60)
    for engine in engines.start(
        tiny_llama.model,
        tiny_llama.planes,
        enforce_eager=False,
        compilation_config={"dynamic_shapes_config": {"type": shapes}},
        skip_tokenizer_init=True,
        max_model_len=160,
        steering={"max_planes": 2},
    ):
        for ask, reply in zip(asks, traffic.send(engine, asks, seed=6), strict=True):
            traffic.check(tiny_llama.oracle, ask, reply)
