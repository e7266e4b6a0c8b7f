"""Engines for tests: real ones, each in a process of its own, shared within a run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

INTERPRETER = Path(__file__).parent / "interpreter"
# Unbound: vLLM would bind this process's threads, and those of all it starts, to cores.
IN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
BLOCK = 32
# Bytes, of each engine: five of them, and this process twice, share 24 GiB.
KV_CACHE = 1 << 28


@dataclass(frozen=True)
class Answer:
    """One choice: its tokens, the log-probability of each, and how much came from the cache."""

    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]
    text: str
    cached: int


class Engine:
    """vLLM's offline ``LLM``, greedy, asked with steering fields.

    Args:
        llm: a started ``vllm.LLM``.

    ``preemptions``, ``accepted_drafts`` and ``computed_prompt_tokens`` (those that no cached block
    gave) count where the engine keeps statistics (``disable_log_stats=False``).
    """

    def __init__(self, llm: Any) -> None:
        self.llm = llm
        self.preemptions = 0
        self.accepted_drafts = 0
        self.computed_prompt_tokens = 0
        # Not from Prometheus: a process has one registry, which the engine started last owns.
        if (manager := llm.llm_engine.logger_manager) is not None:
            manager.record = self._counted(manager.record)

    def _counted(self, record: Callable[..., None]) -> Callable[..., None]:
        def counted(*, scheduler_stats: Any, iteration_stats: Any, **rest: Any) -> None:
            if iteration_stats is not None:
                self.preemptions += iteration_stats.num_preempted_reqs
            prefixes = scheduler_stats.prefix_cache_stats
            self.computed_prompt_tokens += prefixes.queries - prefixes.hits
            if scheduler_stats.spec_decoding_stats is not None:
                self.accepted_drafts += scheduler_stats.spec_decoding_stats.num_accepted_tokens
            record(scheduler_stats=scheduler_stats, iteration_stats=iteration_stats, **rest)

        return counted

    def chat(
        self,
        prompts: Sequence[str],
        fields: Sequence[Mapping[str, Any] | None],
        tokens: int,
        *,
        ignore_eos: bool = True,
    ) -> list[Answer]:
        """One answer for each prompt, with the steering fields beside it, all in one batch."""
        messages = [[{"role": "user", "content": prompt}] for prompt in prompts]
        params = self._params(fields, tokens, ignore_eos)
        return self._answers(self.llm.chat(messages, params, use_tqdm=False))

    def score(
        self,
        prompts: Sequence[list[int]],
        fields: Sequence[Mapping[str, Any] | None],
        tokens: int,
    ) -> list[tuple[list[int], list[float]]]:
        """For each prompt its ids and the generated ones, and the log-probability of each but
        the first."""
        inputs = [{"prompt_token_ids": ids} for ids in prompts]
        params = self._params(fields, tokens)
        for each in params:
            each.prompt_logprobs = 0
            each.detokenize = False
        scored = []
        for output in self.llm.generate(inputs, params, use_tqdm=False):
            (choice,) = output.outputs
            ids = [*output.prompt_token_ids, *choice.token_ids]
            steps = [*output.prompt_logprobs[1:], *choice.logprobs]
            scored.append((ids, [s[t].logprob for t, s in zip(ids[1:], steps, strict=True)]))
        return scored

    def forget(self) -> None:
        """Empty the prefix cache, as on a fresh engine."""
        assert self.llm.reset_prefix_cache()

    def close(self) -> None:
        """End the engine's processes."""
        self.llm.llm_engine.engine_core.shutdown()

    @staticmethod
    def _params(
        fields: Sequence[Mapping[str, Any] | None], tokens: int, ignore_eos: bool = True
    ) -> list[Any]:
        from vllm import SamplingParams

        return [
            SamplingParams(
                temperature=0.0,
                max_tokens=tokens,
                ignore_eos=ignore_eos,
                logprobs=0,
                extra_args=None if f is None else dict(f),
            )
            for f in fields
        ]

    @staticmethod
    def _answers(outputs: Sequence[Any]) -> list[Answer]:
        answers = []
        for output in outputs:
            (choice,) = output.outputs
            ids = list(choice.token_ids)
            pairs = zip(ids, choice.logprobs, strict=True)
            answers.append(
                Answer(
                    prompt=list(output.prompt_token_ids),
                    tokens=ids,
                    logprobs=[step[token].logprob for token, step in pairs],
                    text=choice.text,
                    cached=output.num_cached_tokens or 0,
                )
            )
        return answers


def start(
    model: Path,
    planes: Mapping[str, Path],
    *,
    v2: bool = False,
    in_process: bool = False,
    **options: Any,
) -> Iterator[Engine]:
    """A generator fixture's body: an engine of ``model`` in fp32, with ``planes``, until the end.

    Args:
        model: the model's folder.
        planes: name -> artifact.
        v2: vLLM's second model runner, on Triton's interpreter.
        in_process: the engine and its worker in this very process: started in seconds, and not how
            anyone serves.
        options: more of ``vllm.LLM``; ``steering`` goes into the steering section.
    """
    from vllm import LLM

    steering = {"planes": {k: str(v) for k, v in planes.items()}, **options.pop("steering", {})}
    options = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 1024,
        "max_num_seqs": 32,
        "block_size": BLOCK,
        "kv_cache_memory_bytes": KV_CACHE,
        **options,
    }
    variables = {
        # Set for this process's kernel tests; V1 runs as it does where nobody asks for Triton.
        "TRITON_INTERPRET": "0",
        **(v2_environment() if v2 else {}),
        **(IN_PROCESS if in_process else {}),
    }
    try:
        with environment(variables), triton_here(v2), _inspecting_here():
            engine = Engine(
                LLM(
                    str(model),
                    additional_config={"steering": steering} if planes else {},
                    **options,
                )
            )
        try:
            yield engine
        finally:
            engine.close()
    finally:
        if in_process:
            forget_groups()


def forget_groups() -> None:
    """After an engine in this process: what groups there are depends on the model, and the next
    one must make its own."""
    from vllm.distributed import cleanup_dist_env_and_memory

    cleanup_dist_env_and_memory()


def v2_environment() -> dict[str, str]:
    """What makes a process run vLLM's V2 runner on Triton's interpreter."""
    return {
        "VLLM_USE_V2_MODEL_RUNNER": "1",
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": str(INTERPRETER),
    }


@contextmanager
def triton_here(present: bool) -> Iterator[None]:
    """This process makes a V2 engine's configuration, which asks for Triton, but runs no kernel."""
    with mock.patch("vllm.config.vllm.HAS_TRITON", True) if present else nullcontext():
        yield


@contextmanager
def _inspecting_here() -> Iterator[None]:
    """vLLM asks a process of its own, 18 s a time, what each architecture's class can do."""
    registry = "vllm.model_executor.models.registry"
    with mock.patch(f"{registry}._run_in_subprocess", lambda function: function()):
        yield


@contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """These variables, for the processes started within."""
    with mock.patch.dict(os.environ, variables):
        yield


def default_environment(cache: Path) -> None:
    """What every engine of a test run has."""
    # In GiB, and it would win over what an engine asks for.
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)
    os.environ.update(
        HF_HUB_OFFLINE="1",
        VLLM_NO_USAGE_STATS="1",
        VLLM_WORKER_MULTIPROC_METHOD="spawn",
        # Whichever of setuptools and distutils is imported first here, the other must not mind.
        SETUPTOOLS_USE_DISTUTILS="stdlib",
        # Compiled graphs of other runs and other trees must not be found.
        VLLM_CACHE_ROOT=str(cache),
    )
