"""Random requests, sent at random moments, and what the oracle says of their answers."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from engines import Engine
from oracle import Oracle, Turn, assert_greedy


@dataclass(frozen=True)
class Ask:
    """One request: a prompt's ids, the operations, and how it is sampled."""

    prompt: list[int]
    turns: list[Turn]
    fields: dict[str, Any] | None
    tokens: int
    n: int = 1
    sampled: bool = False
    """At temperature 1, without a seed: on the CPU, V1 cannot rewind a seeded generator after a
    prompt's first chunks ("CPU Generator does not use offset"), steered or not."""
    prompt_logprobs: bool = False
    fan: tuple[Any, ...] = ()
    """The angle of each choice, in place of the one operation's."""

    def turns_of(self, choice: int) -> list[Turn]:
        """What steers one choice."""
        if not self.fan:
            return self.turns
        return [replace(turn, angle=self.fan[choice]) for turn in self.turns]


@dataclass(frozen=True)
class Choice:
    """What came back for one choice."""

    tokens: list[int]
    logprobs: list[float]


@dataclass
class Reply:
    """All choices of a request, the prompt's log-probabilities where asked, the cached tokens."""

    choices: list[Choice] = field(default_factory=list)
    prompt_logprobs: list[float] | None = None
    cached: int = 0


def asks(
    planes: Mapping[str, Path],
    count: int,
    seed: int,
    *,
    greedy: bool = False,
    longest: int = 100,
    vocabulary: int = 256,
) -> list[Ask]:
    """``count`` requests over plane, operation, angle, strength, window, gate, several planes,
    prompt, n and angles for each choice.

    ``greedy`` leaves out the sampled ones, and with them n > 1 but for angles.
    """
    rng = random.Random(seed)
    # A few stems, cut at random: prefixes meet in the cache under different steerings.
    stems = [[rng.randrange(3, vocabulary) for _ in range(longest)] for _ in range(4)]
    made = []
    for _ in range(count):
        prompt = [*rng.choice(stems)[: rng.randint(1, longest - 2)], rng.randrange(3, vocabulary)]
        turns = [_turn(rng, planes) for _ in range(rng.choice((0, 1, 1, 1, 1, 2)))]
        sampled = not greedy and rng.random() < 0.4
        fan = ()
        if len(turns) == 1 and rng.random() < 0.15:
            fan = tuple(_turn(rng, planes).angle for _ in range(rng.choice((1, 2, 3))))
        made.append(
            Ask(
                prompt=prompt,
                turns=turns,
                fields=fields(turns, planes, fan),
                tokens=rng.choice((1, 2, 5, 9, 14, 33)),
                n=len(fan) or (rng.choice((1, 2, 3)) if sampled else 1),
                sampled=sampled,
                prompt_logprobs=not fan and rng.random() < 0.2,
                fan=fan,
            )
        )
    return made


STRENGTHS = {"add": (-2.0, 2.0), "ablate": (0.05, 1.0), "cap": (-1.0, 1.0)}
PARTS = (
    {"prompt": [-4, None]},
    {"prompt": [None, 1], "generated": [3, None]},
    {"prompt": [-1, None], "generated": [0, 5]},
    {"generated": [2, 7]},
    {"generated": [1, None]},
)


def _turn(rng: random.Random, planes: Mapping[str, Path]) -> Turn:
    mode = rng.choice(("rotate_by", "rotate_to", *STRENGTHS))
    ramp = (rng.uniform(-360, 360), rng.choice((0.0, 180.0)), rng.choice((1, 3, 20)))
    return Turn(
        plane=planes[rng.choice(sorted(planes))],
        angle=rng.choice((0.0, 90.0, 180.0, -90.0, rng.uniform(-360, 360), ramp)),
        mode=mode,
        # Never 0: a rotation to 90 degrees before it leaves c1 there, and rounding decides.
        gate=rng.choice((None, None, rng.uniform(0.01, 0.5), rng.uniform(-0.5, -0.01))),
        tokens=rng.choice(("all", "prompt", "generated", *PARTS)),
        strength=rng.uniform(*STRENGTHS[mode]) if mode in STRENGTHS else None,
        keep_norm=rng.random() < 0.5,
    )


def _angle(angle: Any) -> Any:
    if isinstance(angle, tuple):
        return dict(zip(("from", "to", "over"), angle, strict=True))
    return angle


def fields(
    turns: Sequence[Turn], planes: Mapping[str, Path], fan: Sequence[Any] = ()
) -> dict[str, Any] | None:
    """``turns`` as a request's fields: flat for one, a list for several."""
    names = {path: name for name, path in planes.items()}
    items = [
        {
            "plane": names[turn.plane],
            **({"angles": [*map(_angle, fan)]} if fan else {"angle": _angle(turn.angle)}),
            "mode": turn.mode,
            "gate": turn.gate,
            "tokens": turn.tokens,
            "strength": turn.strength,
            "keep_norm": turn.keep_norm,
        }
        for turn in turns
    ]
    if len(items) == 1:
        return {f"steering_{key}": value for key, value in items[0].items()}
    return {"steering": items} if items else None


def send(
    engine: Engine,
    requests: Sequence[Ask],
    seed: int | None = None,
    between: Callable[[], None] = lambda: None,
    lora: Any = None,
) -> list[Reply]:
    """Every request's reply. With a seed they arrive a few at a time; `between` follows a step;
    `lora` is the adapter of all."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    rng = random.Random(seed)
    core = engine.llm.llm_engine
    waiting = list(range(len(requests)))
    replies = [Reply() for _ in requests]
    while waiting or core.has_unfinished_requests():
        arriving = len(waiting) if seed is None else rng.choice((0, 0, 1, 2, 5))
        for index in waiting[:arriving]:
            ask = requests[index]
            params = SamplingParams(
                temperature=1.0 if ask.sampled else 0.0,
                n=1 if ask.fan else ask.n,
                max_tokens=ask.tokens,
                ignore_eos=True,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
                logprobs=0,
                prompt_logprobs=0 if ask.prompt_logprobs else None,
                extra_args=None if ask.fields is None else dict(ask.fields),
            )
            prompt = {"prompt_token_ids": ask.prompt}
            core.add_request(str(index), prompt, params, lora_request=lora)
        waiting = waiting[arriving:]
        if core.has_unfinished_requests():
            for output in core.step():
                if output.finished:
                    replies[int(output.request_id)] = _reply(output)
            between()
    return replies


def _reply(output: Any) -> Reply:
    prompt = output.prompt_logprobs
    ids = output.prompt_token_ids
    return Reply(
        choices=[
            Choice(
                tokens=list(choice.token_ids),
                logprobs=[
                    step[token].logprob
                    for token, step in zip(choice.token_ids, choice.logprobs, strict=True)
                ],
            )
            for choice in sorted(output.outputs, key=lambda choice: choice.index)
        ],
        prompt_logprobs=prompt
        and [step[token].logprob for token, step in zip(ids[1:], prompt[1:], strict=True)],
        cached=output.num_cached_tokens or 0,
    )


def check(oracle: Oracle, ask: Ask, reply: Reply) -> None:
    """The reply is the oracle's: each log-probability, and greedy choices token by token."""
    assert len(reply.choices) == ask.n, ask
    for index, choice in enumerate(reply.choices):
        assert len(choice.tokens) == ask.tokens, ask
        ids = ask.prompt + choice.tokens
        logprobs = oracle.logprobs(ids, ask.turns_of(index), len(ask.prompt))
        if not ask.sampled:
            assert_greedy(logprobs, len(ask.prompt), choice.tokens, choice.logprobs)
        got = [*(reply.prompt_logprobs or ()), *choice.logprobs]
        truth = logprobs[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0][-len(got) :]
        error = float((truth - torch.tensor(got, dtype=truth.dtype)).abs().max())
        assert error <= 1e-3, f"log-probability off by {error:.2e}: {ask}"
