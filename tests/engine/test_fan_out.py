"""One request with an angle for each of its choices."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import engines
import traffic
from engines import BLOCK, Engine
from oracle import Turn
from tiny import Tiny
from traffic import Ask

ANGLES = [0, 45, 90, 135, 180, 225.5, -90, {"from": 180, "to": 0, "over": 6}]
PROMPT = [5 + 7 * i % 200 for i in range(6 * BLOCK)]
TOKENS = 12
OPTIONS: dict[str, Any] = {
    "skip_tokenizer_init": True,
    "disable_log_stats": False,  # Computed tokens are counted in them.
    "max_model_len": 256,
}


@pytest.fixture(scope="module")
def tiny_v1(tiny_llama: Tiny) -> Iterator[Engine]:
    yield from engines.start(tiny_llama.model, tiny_llama.planes, in_process=True, **OPTIONS)


@pytest.fixture(scope="module")
def tiny_v2(tiny_llama: Tiny) -> Iterator[Engine]:
    yield from engines.start(tiny_llama.model, tiny_llama.planes, v2=True, **OPTIONS)


def fields(tokens: str, **angle: Any) -> dict[str, Any]:
    return {
        "steering_plane": "two",
        "steering_mode": "rotate_by",
        "steering_tokens": tokens,
        **{f"steering_{name}": value for name, value in angle.items()},
    }


@pytest.mark.parametrize(
    "engine", ["tiny_v1", pytest.param("tiny_v2", marks=pytest.mark.slow)], indirect=True
)
@pytest.mark.parametrize("tokens", ["generated", "all"])
def test_eight_angles_are_eight_requests(engine: Engine, tokens: str, tiny_llama: Tiny) -> None:
    def turn(angle: Any) -> Turn:
        ramp = (angle["from"], angle["to"], angle["over"]) if isinstance(angle, dict) else angle
        return Turn(tiny_llama.planes["two"], ramp, "rotate_by", tokens=tokens)

    engine.forget()
    before = engine.computed_prompt_tokens
    fan = Ask(PROMPT, [turn(0)], fields(tokens, angles=ANGLES), TOKENS, n=8,
              fan=tuple(turn(angle).angle for angle in ANGLES))  # fmt: skip
    (together,) = traffic.send(engine, [fan])
    computed = engine.computed_prompt_tokens - before
    traffic.check(tiny_llama.oracle, fan, together)

    alone = [Ask(PROMPT, [turn(a)], fields(tokens, angle=a), TOKENS) for a in ANGLES]
    engine.forget()
    singly = traffic.send(engine, alone)
    assert [c.tokens for c in together.choices] == [r.choices[0].tokens for r in singly]
    assert len({tuple(c.tokens) for c in together.choices}) >= 6
    # Once for each steering of the prompt, and beyond that what no full block holds. Under `all`
    # the ramp begins with the prompt at 180, where another choice is, and rotate_by 0 is none.
    steerings = 1 if tokens == "generated" else 7
    # vLLM computes the last token of a prompt, and with it its block, in any case.
    rest = len(PROMPT) - (len(PROMPT) - 1) // BLOCK * BLOCK
    assert computed == steerings * len(PROMPT) + (8 - steerings) * rest


def test_choices_have_their_seeds(tiny_v1: Engine) -> None:
    """As with n: the request's, and one more for each."""
    from vllm import SamplingParams

    def params(seed: int, **angle: Any) -> SamplingParams:
        return SamplingParams(
            temperature=1.0,
            seed=seed,
            max_tokens=TOKENS,
            ignore_eos=True,
            detokenize=False,
            extra_args=fields("all", **angle),
        )

    prompt = {"prompt_token_ids": PROMPT[:20]}
    (fan,) = tiny_v1.llm.generate([prompt], params(7, angles=ANGLES), use_tqdm=False)
    singly = tiny_v1.llm.generate(
        [prompt] * 8, [params(7 + i, angle=a) for i, a in enumerate(ANGLES)], use_tqdm=False
    )
    assert [c.token_ids for c in fan.outputs] == [o.outputs[0].token_ids for o in singly]
    assert [choice.index for choice in fan.outputs] == list(range(8))


def test_offline_n_is_absent_or_as_many(tiny_v1: Engine) -> None:
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    from steering_server.request.error import SteeringError

    prompt = {"prompt_token_ids": PROMPT[:20]}
    extra = fields("all", angles=[0, 90])
    for n in (1, 2):
        params = SamplingParams(
            n=n, temperature=0, max_tokens=1, detokenize=False, extra_args=extra
        )
        (output,) = tiny_v1.llm.generate([prompt], params, use_tqdm=False)
        assert len(output.outputs) == 2
    params = SamplingParams(n=3, max_tokens=1, detokenize=False, extra_args=extra)
    with pytest.raises(SteeringError, match=r"n = 3: must be 2, one an angle"):
        tiny_v1.llm.generate([prompt], params, use_tqdm=False)
    with pytest.raises(VLLMValidationError, match="n must be 1 when using greedy"):
        SamplingParams(n=3, temperature=0, extra_args=extra)


def test_a_fan_is_read_once_for_all_its_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of them are made between two steps of the server's event loop."""
    from types import SimpleNamespace

    from vllm import SamplingParams

    from steering_server.engine import requests
    from steering_server.request.operation import Operation

    fan = Operation("p", "d", None, "rotate_by", fan=tuple(i / 10 for i in range(2000)))
    params = SamplingParams(extra_args={"steering": [fan.to_wire()], "other": 1})
    reads, admitted = [], requests.admitted
    monkeypatch.setattr(requests, "admitted", lambda extra: reads.append(1) or admitted(extra))
    parent: Any = SimpleNamespace(sampling_params=params)
    children = [
        requests.child_sampling_params(lambda *_: params, parent, index) for index in range(2000)
    ]
    assert len(reads) == 1
    assert children[0].extra_args == {"steering": [], "other": 1}
    assert children[1999].extra_args["steering"][0]["angle"] == 199.9
