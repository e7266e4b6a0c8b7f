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


def start(tiny: Tiny, kernels: str) -> Iterator[Engine]:
    """A V2 engine of the tiny model with these kernels."""
    steering = {"max_planes": 2, "kernels": kernels}
    yield from engines.start(tiny.model, tiny.planes, v2=True, steering=steering, **OPTIONS)


@pytest.mark.slow
def test_the_kernels_agree_with_plain_torch_and_with_transformers(
    tiny_llama: Tiny, capfd: pytest.CaptureFixture[str]
) -> None:
    asks = traffic.asks(tiny_llama.planes, 16, seed=4, greedy=True, longest=40)
    replies = {}
    for kernels in ("triton", "torch"):
        for engine in start(tiny_llama, kernels):
            replies[kernels] = traffic.send(engine, asks)
        assert f"on {kernels} kernels (asked for)" in "".join(capfd.readouterr())
    for ask, fast, plain in zip(asks, replies["triton"], replies["torch"], strict=True):
        traffic.check(tiny_llama.oracle, ask, fast)
        assert fast.choices[0].tokens == plain.choices[0].tokens
        expected = pytest.approx(plain.choices[0].logprobs, abs=1e-4)
        assert fast.choices[0].logprobs == expected
