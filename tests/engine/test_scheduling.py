"""Which tokens are steered does not depend on how the scheduler deals them out."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

import engines
import traffic
from engines import BLOCK, Engine
from oracle import Turn
from tiny import Tiny
from traffic import Ask

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
    "num_gpu_blocks_override": 900,
    "speculative_config": {
        "method": "ngram",
        "num_speculative_tokens": 4,
        "prompt_lookup_min": 1,
        "prompt_lookup_max": 3,
    },
}


@pytest.fixture(scope="module")
def erratic_v1(tiny_llama: Tiny) -> Iterator[Engine]:
    """V1, asynchronous, in random chunks, with too few KV blocks for all requests at once."""
    yield from engines.start(tiny_llama.model, tiny_llama.planes, in_process=True, **ERRATIC)


@pytest.fixture(scope="module")
def erratic_v2(tiny_llama: Tiny) -> Iterator[Engine]:
    """V2 likewise, and on Triton's kernels."""
    options = {**ERRATIC, "steering": {**ERRATIC["steering"], "kernels": "triton"}}
    yield from engines.start(tiny_llama.model, tiny_llama.planes, v2=True, **options)


@pytest.fixture(scope="module")
def speculative_v1(tiny_llama: Tiny) -> Iterator[Engine]:
    """V1, synchronous, in chunks of 32, verifying up to five tokens a step."""
    # Not in process: numba, which proposes n-grams, has modules that vLLM cannot look through.
    yield from engines.start(tiny_llama.model, tiny_llama.planes, **SPECULATIVE)


@pytest.fixture(scope="module")
def speculative_v2(tiny_llama: Tiny) -> Iterator[Engine]:
    """V2 likewise."""
    yield from engines.start(tiny_llama.model, tiny_llama.planes, v2=True, **SPECULATIVE)


SCOPES = ("all", "prompt", "generated")


def ask(tiny: Tiny, length: int, turns: list[Turn], tokens: int = 6, seed: int = 0) -> Ask:
    """A greedy request with a random prompt."""
    rng = random.Random(seed)
    prompt = [rng.randrange(3, 256) for _ in range(length)]
    return Ask(prompt, turns, traffic.fields(turns, tiny.planes), tokens)


@pytest.mark.parametrize(
    "engine",
    ["speculative_v1", pytest.param("speculative_v2", marks=pytest.mark.slow)],
    indirect=True,
)
def test_a_prompt_whose_last_chunk_is_one_token(engine: Engine, tiny_llama: Tiny) -> None:
    """Two chunks of 32 and a single token: of the prompt, though a step schedules it like a
    generated one. Its own log-probability is what the first generated token shows."""
    plane = tiny_llama.planes["two"]
    for scope in SCOPES:
        sent = ask(tiny_llama, 65, [Turn(plane, 200, "rotate_to", tokens=scope)])
        sent = replace(sent, prompt_logprobs=True)
        engine.forget()
        (reply,) = traffic.send(engine, [sent])
        assert reply.cached == 0
        traffic.check(tiny_llama.oracle, sent, reply)
        shifted = tiny_llama.oracle.logprobs(sent.prompt, sent.turns, len(sent.prompt) - 1)
        right = tiny_llama.oracle.logprobs(sent.prompt, sent.turns, len(sent.prompt))
        if scope != "all":
            assert float((shifted - right)[-1].abs().max()) > 0.05, "the boundary cannot be seen"


# Alone, on the interpreter, is slow: every eighth of them there, and the oracle for all.
@pytest.mark.parametrize(
    ("engine", "stride"),
    [
        ("erratic_v1", 1),
        ("speculative_v1", 1),
        pytest.param("erratic_v2", 8, marks=pytest.mark.slow),
        pytest.param("speculative_v2", 8, marks=pytest.mark.slow),
    ],
    indirect=["engine"],
)
def test_mixed_requests_are_each_what_they_are_alone(
    engine: Engine, stride: int, tiny_llama: Tiny, request: pytest.FixtureRequest
) -> None:
    """64 in one batch, of every operation, at other angles, strengths, windows and ramps."""
    sent = traffic.asks(tiny_llama.planes, 64, seed=2, greedy=True)
    turns = [turn for each in sent for turn in each.turns]
    assert {turn.mode for turn in turns} == {"rotate_by", "rotate_to", "add", "ablate", "cap"}
    assert sum(isinstance(turn.angle, tuple) for turn in turns) > 5
    assert sum(isinstance(turn.tokens, dict) for turn in turns) > 20
    engine.forget()
    before = engine.preemptions, engine.accepted_drafts
    together = traffic.send(engine, sent)
    preempted, accepted = engine.preemptions - before[0], engine.accepted_drafts - before[1]
    if "erratic" in request.node.callspec.id:
        assert preempted > 0
    else:
        assert accepted > 0
    for i in range(0, len(sent), stride):
        (alone,) = traffic.send(engine, [sent[i]])
        assert [c.tokens for c in together[i].choices] == [c.tokens for c in alone.choices]
    assert engine.preemptions == before[0] + preempted
    for each, reply in zip(sent, together, strict=True):
        traffic.check(tiny_llama.oracle, each, reply)


def test_thirty_six_angles_compute_a_prompt_once(speculative_v1: Engine, tiny_llama: Tiny) -> None:
    """Under `generated` a prompt's blocks are everyone's; under `all` each angle has its own."""
    plane = tiny_llama.planes["two"]

    def sweep(scope: str) -> list[Ask]:
        return [
            ask(tiny_llama, 512, [Turn(plane, 10.0 * i, "rotate_to", tokens=scope)], tokens=4)
            for i in range(36)
        ]

    for scope in ("generated", "all"):
        speculative_v1.forget()
        first, *rest = sweep(scope)
        replies = [*traffic.send(speculative_v1, [first]), *traffic.send(speculative_v1, rest)]
        # Of 512 tokens, 16 blocks, the last is computed again for its logits.
        shared = 512 - BLOCK if scope == "generated" else 0
        assert [reply.cached for reply in replies] == [0] + [shared] * 35
        for i, (each, reply) in enumerate(zip(sweep(scope), replies, strict=True)):
            traffic.check(tiny_llama.oracle, each, reply)
            # What was not shared was computed afresh anyway.
            if i % (3 if scope == "generated" else 12) == 0:
                speculative_v1.forget()
                (fresh,) = traffic.send(speculative_v1, [each])
                assert fresh.cached == 0
                assert fresh.choices[0].tokens == reply.choices[0].tokens


def test_a_salt_isolates_equal_steerings(speculative_v1: Engine, tiny_llama: Tiny) -> None:
    from vllm import SamplingParams

    def cached(salt: str | None) -> int:
        params = SamplingParams(
            temperature=0, max_tokens=1, detokenize=False, extra_args={"steering_angle": 30,
            "steering_plane": "one"},
        )  # fmt: skip
        prompt = {"prompt_token_ids": list(range(3, 100))}
        if salt:
            prompt["cache_salt"] = salt  # type: ignore[assignment]
        (output,) = speculative_v1.llm.generate([prompt], params, use_tqdm=False)
        return int(output.num_cached_tokens or 0)

    speculative_v1.forget()
    assert [cached(salt) for salt in (None, "a", "b", "a", None)] == [0, 0, 0, 96, 96]


def test_a_refused_request_changes_none_beside_it(speculative_v1: Engine, tiny_llama: Tiny) -> None:
    """The engine is in the middle of others' tokens when admission refuses one."""
    from vllm import SamplingParams

    from steering_server.request.error import SteeringError

    plane = tiny_llama.planes["one"]
    good = [ask(tiny_llama, 30, [Turn(plane, 50.0 * i, "rotate_to")], 12, i) for i in range(4)]
    bad = SamplingParams(extra_args={"steering_angle": 30, "steering_plane": "none such"})
    core = speculative_v1.llm.llm_engine
    before = traffic.send(speculative_v1, good)

    def refuse() -> None:
        with pytest.raises(SteeringError, match="none such"):
            core.add_request("bad", {"prompt_token_ids": [5, 6, 7]}, bad)

    during = traffic.send(speculative_v1, good, between=refuse)
    assert [r.choices[0].tokens for r in during] == [r.choices[0].tokens for r in before]
    for each, reply in zip(good, during, strict=True):
        traffic.check(tiny_llama.oracle, each, reply)


@pytest.mark.parametrize(
    ("engine", "count"),
    [("erratic_v1", 300), ("erratic_v2", 30)],
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
    ("engine", "count"),
    [("speculative_v1", 100), pytest.param("speculative_v2", 15, marks=pytest.mark.slow)],
    indirect=["engine"],
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


@pytest.mark.slow
def test_positions_that_only_the_device_knows(tiny_llama: Tiny) -> None:
    """Drafts from the device's own n-grams; what the host knows of positions is wrong."""
    speculative = {**SPECULATIVE["speculative_config"], "method": "ngram_gpu"}
    options = {**SPECULATIVE, "speculative_config": speculative}
    worker = "broken.LeftInTheDark"
    for engine in engines.start(
        tiny_llama.model, tiny_llama.planes, v2=True, worker_cls=worker, **options
    ):
        asks = traffic.asks(tiny_llama.planes, 25, seed=100, greedy=True)
        for ask, reply in zip(asks, traffic.send(engine, asks, seed=6), strict=True):
            traffic.check(tiny_llama.oracle, ask, reply)
        assert engine.accepted_drafts > 0


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
