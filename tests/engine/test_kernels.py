"""The V2 runner on Triton's kernels, as a GPU has it; without one, on the interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import engines
import traffic
from engines import Engine
from tiny import Tiny

OPTIONS: dict[str, Any] = {
    "skip_tokenizer_init": True,
    "max_model_len": 160,
    "max_num_seqs": 16,
}


WAYS = {
    f"{kernels}, {norms}": {"kernels": kernels, "norms": norms}
    for kernels in ("triton", "torch")
    for norms in ("fused", "kept")
}


def start(tiny: Tiny, way: str) -> Iterator[Engine]:
    """A V2 engine of the tiny model that steers this way."""
    steering = {"max_planes": 2, **WAYS[way]}
    yield from engines.start(tiny.model, tiny.planes, v2=True, steering=steering, **OPTIONS)


@pytest.mark.slow
def test_the_kernels_agree_with_plain_torch_and_with_transformers(
    tiny_llama: Tiny, capfd: pytest.CaptureFixture[str]
) -> None:
    asks = traffic.asks(tiny_llama.planes, 16, seed=4, greedy=True, longest=40)
    replies = {}
    for way, options in WAYS.items():
        for engine in start(tiny_llama, way):
            replies[way] = traffic.send(engine, asks)
        says = f"on {options['kernels']} kernels (asked for), norms {options['norms']}:"
        assert says in "".join(capfd.readouterr())
    plain = replies.pop("torch, kept")
    for others in replies.values():
        for ask, reply, other in zip(asks, plain, others, strict=True):
            traffic.check(tiny_llama.oracle, ask, other)
            assert other.choices[0].tokens == reply.choices[0].tokens
            expected = pytest.approx(reply.choices[0].logprobs, abs=1e-4)
            assert other.choices[0].logprobs == expected
