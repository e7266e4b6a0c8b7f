"""Steering beside vLLM's other features."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import engines
import traffic
from engines import Engine
from tiny import Tiny


@pytest.fixture(scope="module")
def parallel(tiny_llama: Tiny) -> Iterator[Engine]:
    """Two workers, a core each, with half of every layer's heads."""
    with engines.environment({"VLLM_CPU_OMP_THREADS_BIND": "0|1"}):
        yield from engines.start(
            tiny_llama.model,
            tiny_llama.planes,
            tensor_parallel_size=2,
            distributed_executor_backend="mp",
            skip_tokenizer_init=True,
            max_model_len=160,
            steering={"max_planes": 2},
        )


def test_tensor_parallel_equals_transformers(parallel: Engine, tiny_llama: Tiny) -> None:
    asks = traffic.asks(tiny_llama.planes, 40, seed=2)
    for ask, reply in zip(asks, traffic.send(parallel, asks, seed=2), strict=True):
        traffic.check(tiny_llama.oracle, ask, reply)


def test_a_seed_gives_the_same_steered_samples(v1: Engine) -> None:
    from vllm import SamplingParams

    def sample(angle: float | None) -> list[list[int]]:
        params = SamplingParams(
            n=3,
            seed=7,
            temperature=1.0,
            max_tokens=12,
            ignore_eos=True,
            extra_args=None
            if angle is None
            else {"steering_plane": "sentiment", "steering_angle": angle},
        )
        messages = [{"role": "user", "content": "Tell me about the ocean."}]
        (output,) = v1.llm.chat(messages, params, use_tqdm=False)
        return [list(choice.token_ids) for choice in output.outputs]

    assert sample(180) == sample(180)
    assert len({tuple(choice) for choice in sample(180)}) == 3
    assert all(a != b for a, b in zip(sample(180), sample(None), strict=True))


def test_a_choice_is_kept_and_steered(v1: Engine) -> None:
    """Structured outputs mask logits; the angle still moves what is left of them."""
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    def asked(angle: float) -> tuple[str, float]:
        params = SamplingParams(
            temperature=0,
            max_tokens=8,
            logprobs=0,
            structured_outputs=StructuredOutputsParams(choice=["wonderful", "terrible"]),
            extra_args={"steering_plane": "sentiment", "steering_angle": angle},
        )
        messages = [{"role": "user", "content": "In one word, how is life?"}]
        (output,) = v1.llm.chat(messages, params, use_tqdm=False)
        (choice,) = output.outputs
        return choice.text, choice.logprobs[0][choice.token_ids[0]].logprob

    answers = [asked(angle) for angle in (0, 180)]
    assert {text for text, _ in answers} <= {"wonderful", "terrible"}
    assert abs(answers[0][1] - answers[1][1]) > 0.05
