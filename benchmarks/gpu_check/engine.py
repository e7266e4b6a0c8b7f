"""The engine with its defaults, on tiny random models: what it answers, against transformers with
hooks on the same device."""

from __future__ import annotations

import importlib
import math
import operator
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from findings import Findings

import engines
import tiny
import traffic
from engines import Engine
from oracle import Oracle, Turn
from tiny import Tiny
from traffic import Ask, Reply

ARCHITECTURES = ("llama", "gemma2")
EXPERTS, DENSE = "qwen3_moe", "qwen3"
"""The third; the second of these where vLLM was brought without its library for experts."""
DTYPES = ("bfloat16", "float32")
KEPT = ("llama", "gemma2")
"""With vLLM's own norms besides: each has one that ours replaces."""
REQUESTS = 64
SPARE_SECONDS = 25
FP32_LIMIT = 1e-3
"""Of a log-probability's error in fp32."""
BF16_LIMIT = 0.25
"""Of an unsteered one's in bf16: these models are off by 0.05 to 0.08 on a CPU."""
NOISE = 3.0
"""How many times the error of unsteered answers, in bf16, a steered one's may be."""


@dataclass(frozen=True)
class Errors:
    """Of the log-probabilities of some replies, against the oracle's after the same tokens."""

    largest: float
    """Infinite where one is not a number."""
    far: int
    """Greedy tokens that are not the oracle's best, nor as good within the largest error."""

    def within(self, limit: float) -> bool:
        """Also false of an infinite error within an infinite limit."""
        return math.isfinite(self.largest) and self.largest <= limit


def run(findings: Findings, rehearse: bool, widths: Sequence[int] | None) -> None:
    """Each architecture in bf16, then in fp32, the first of them the most thoroughly."""
    os.environ.update(engines.IN_PROCESS)
    first, second = (
        [(name, dtype, "auto") for name in (*ARCHITECTURES, _third())] for dtype in DTYPES
    )
    kept = [(name, DTYPES[0], "kept") for name in KEPT]
    kinds = [("llama", "float32", "kept")] if rehearse else [*first, *kept, *second]
    with tempfile.TemporaryDirectory() as folder:
        engines.default_environment(Path(folder) / "cache")
        for kind in kinds:
            what = ", ".join(part for part in kind if part != "auto")
            if findings.left() < SPARE_SECONDS and not rehearse:
                findings.verdict(what, None, "no time left")
                continue
            try:
                _engine(findings, rehearse, what, *kind, Path(folder) / what)
            except ModuleNotFoundError:
                raise
            # The next engine may say more.
            except Exception as error:  # noqa: BLE001
                findings.verdict(f"{what}: runs", False, f"{type(error).__name__}: {error}")


def _third() -> str:
    importlib.import_module("vllm._custom_ops")  # which loads the libraries that there are
    return EXPERTS if hasattr(torch.ops._moe_C, "topk_softmax") else DENSE


def _engine(
    findings: Findings, rehearse: bool, what: str, name: str, dtype: str, norms: str, folder: Path
) -> None:
    """One engine, from its start to its end."""
    made = tiny.steerable(name, folder)
    device = "cpu" if rehearse else "cuda"
    model = made.oracle.model.to(device, getattr(torch, dtype))
    oracle = Oracle(model, made.oracle.norms)
    asks = [
        ask
        for ask in traffic.asks(made.planes, 4 * REQUESTS, seed=2, greedy=True)
        # In bf16 rounding decides who is within a gate.
        if dtype == "float32" or all(turn.gate is None for turn in ask.turns)
    ][: 12 if rehearse else REQUESTS]
    options: dict[str, Any] = {
        "steering": {"max_planes": 3, "norms": norms},
        "dtype": dtype,
        "max_num_seqs": 64,
    }
    options |= {"enforce_eager": rehearse, "skip_tokenizer_init": True}
    began = time.perf_counter()
    from steering_server.engine.proof import logger

    with mock.patch.object(logger, "info", wraps=logger.info) as info:
        running = engines.start(made.model, made.planes, in_process=True, **options)
        engine = next(running)
    findings.tell(engine=what, start_seconds=time.perf_counter() - began)
    said = [text % tuple(values) for text, *values in (call.args for call in info.call_args_list)]
    proved = [line for line in said if "proved at" in line]
    findings.verdict(f"{what}: each site is proved at start-up", bool(proved), " ".join(proved))
    defaults = _defaults(engine)
    findings.verdict(
        f"{what}: V2, compiled, full and piecewise CUDA graphs, asynchronous",
        None if rehearse else _are_on(defaults),
        defaults,
    )
    unsteered = [
        Ask(ask.prompt, [], None, ask.tokens, prompt_logprobs=ask.prompt_logprobs) for ask in asks
    ]
    noise = compared(oracle, unsteered, traffic.send(engine, unsteered))
    together = traffic.send(engine, asks)
    found = compared(oracle, asks, together)
    unsteered_limit = FP32_LIMIT if dtype == "float32" else BF16_LIMIT
    findings.verdict(
        f"{what}: {len(asks)} unsteered requests are transformers' answers",
        noise.within(unsteered_limit),
        f"log-probabilities within {noise.largest:.1e}",
    )
    limit = FP32_LIMIT if dtype == "float32" else NOISE * min(noise.largest, BF16_LIMIT)
    findings.verdict(
        f"{what}: {len(asks)} mixed requests in a batch are transformers' answers",
        found.within(limit) and found.far <= noise.far,
        f"log-probabilities within {found.largest:.1e} (unsteered {noise.largest:.1e}), "
        f"{found.far} tokens differ (unsteered {noise.far})",
    )
    if (name, norms) == (ARCHITECTURES[0], "auto") or rehearse:
        _alone(findings, what, engine, oracle, asks, together, limit)
        _cached(findings, what, engine, oracle, made, limit)
    for _ in running:
        raise AssertionError("an engine is started once")


def _alone(
    findings: Findings,
    what: str,
    engine: Engine,
    oracle: Oracle,
    asks: Sequence[Ask],
    together: Sequence[Reply],
    limit: float,
) -> None:
    """The same requests, one at a time."""
    alone = []
    for ask in asks:
        if findings.left() < SPARE_SECONDS / 2:
            break
        alone += traffic.send(engine, [ask])
    found = compared(oracle, asks[: len(alone)], alone)
    same = sum(map(operator.eq, map(_tokens, alone), map(_tokens, together)))
    findings.verdict(
        f"{what}: requests alone are what they are in the batch",
        found.within(limit) if alone else None,
        f"{len(alone)} alone, {same} token for token, log-probabilities within {found.largest:.1e}",
    )


def _cached(
    findings: Findings, what: str, engine: Engine, oracle: Oracle, made: Tiny, limit: float
) -> None:
    """One prompt under eight angles, twice: another angle's blocks are never taken."""
    prompt = [3 + 7 * i % 250 for i in range(96)]
    plane = made.planes["two"]
    asks = []
    for i in range(8):
        turns = [Turn(plane, 45.0 * i + 5, "rotate_to")]
        asks.append(Ask(prompt, turns, traffic.fields(turns, made.planes), tokens=4))
    engine.forget()
    first, second = [], []
    for replies in (first, second):
        for ask in asks:
            replies += traffic.send(engine, [ask])
    found = compared(oracle, [*asks, *asks], [*first, *second])
    cached = [sorted({reply.cached for reply in replies}) for replies in (first, second)]
    findings.verdict(
        f"{what}: the prefix cache gives each angle its own blocks",
        cached[0] == [0] and cached[1][0] > 0 and found.within(limit),
        f"cached tokens {cached[0]}, then {cached[1]}; within {found.largest:.1e}",
    )


def compared(oracle: Oracle, asks: Sequence[Ask], replies: Sequence[Reply]) -> Errors:
    """How far replies are from the oracle's; infinitely where one is not whole."""
    largest, gaps = 0.0, []
    for ask, reply in zip(asks, replies, strict=True):
        scored = len(reply.prompt_logprobs or ())
        whole = [ask.tokens] * ask.n == [len(choice.tokens) for choice in reply.choices]
        if not whole or scored != (len(ask.prompt) - 1) * ask.prompt_logprobs:
            largest = math.inf
            continue
        for index, choice in enumerate(reply.choices):
            ids = ask.prompt + choice.tokens
            logprobs = oracle.logprobs(ids, ask.turns_of(index), len(ask.prompt))[:-1]
            of = logprobs.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
            got = torch.tensor([*(reply.prompt_logprobs or ()), *choice.logprobs], dtype=of.dtype)
            error = (of[-len(got) :] - got).abs().nan_to_num(nan=math.inf)
            largest = max(largest, float(error.max()))
            gaps += (logprobs.max(-1).values - of)[-ask.tokens :].tolist()
    return Errors(largest, sum(gap > 2 * largest for gap in gaps))


def _tokens(reply: Reply) -> list[list[int]]:
    return [choice.tokens for choice in reply.choices]


def _defaults(engine: Engine) -> dict[str, str]:
    config = engine.llm.llm_engine.vllm_config
    worker = engine.llm.llm_engine.engine_core.engine_core.model_executor.driver_worker
    runner = getattr(worker, "worker", worker).model_runner
    return {
        "runner": type(runner).__module__,
        "compilation": config.compilation_config.mode.name,
        "graphs": config.compilation_config.cudagraph_mode.name,
        "asynchronous": str(config.scheduler_config.async_scheduling),
    }


def _are_on(defaults: dict[str, str]) -> bool:
    return (
        "worker.gpu.model_runner" in defaults["runner"]
        and defaults["compilation"] == "VLLM_COMPILE"
        and defaults["graphs"] == "FULL_AND_PIECEWISE"
        and defaults["asynchronous"] == "True"
    )
