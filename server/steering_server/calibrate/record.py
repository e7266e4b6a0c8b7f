"""Activations of a contrast's examples at every site, recorded by vLLM's own workers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from steering_planes import Selection, Site
from steering_planes.calibration import Activations, CalibrationError
from steering_planes.contrast import Contrast
from steering_planes.examples import Example
from steering_planes.fingerprint import Fingerprint
from steering_planes.tables import ContrastError
from steering_server.calibrate.chat import Chat, Tokens
from steering_server.engine.recording import RECORDED, WORKER_EXTENSION

CPU_KV_CACHE = 2 << 30
"""Bytes of KV cache on a CPU, unless the engine's arguments say: vLLM would take nearly all memory,
and a prompt with one token needs little."""

Progress = Callable[[int, int], None]
"""Called with the prompts done so far, and all of them."""

Token = Literal["last", "mean"] | int
"""Which token of an example counts: the last one; the mean over the answer's, or, where there is no
answer, over the prompt's; or -K, the K-th from the end."""


@dataclass(frozen=True, eq=False)
class Recorded:
    """The activations of both classes, and the model that they are of.

    ``positive`` and ``negative`` are [n, hidden] float32 a site, in the order of the examples.
    """

    positive: Activations
    negative: Activations
    model_type: str
    num_layers: int
    chat_template_sha256: str | None
    fingerprint: Fingerprint


def record(
    model: str,
    contrast: Contrast,
    *,
    chat: Chat | None = None,
    token: Token = "last",
    sites: Selection | None = None,
    engine: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Recorded:
    """One activation of every example at every site of a model; `sites` must be among them.

    Conversations go through the chat template with the generation prompt, or with their answer left
    open. The engine runs eagerly: a compiled graph calls no norm.

    Raises:
        CalibrationError: activations that were not recorded whole.
        ContrastError: an example that the model does not take, naming file and line; or no chat
            template, before the model is loaded.
    """
    chat = chat or Chat()
    # Not "auto", which takes Mistral's own where it can: that has no chat template to show.
    arguments: dict[str, Any] = {"tokenizer_mode": "hf"}
    arguments |= {key: value for key, value in (engine or {}).items() if value is not None}
    _check_before(model, chat, arguments)
    if token != "last":
        # Tokens that the cache has are not computed, and only a prompt's last one always is.
        arguments["enable_prefix_caching"] = False
    with _engine(model, arguments) as llm:
        described: list[dict[str, Any]] = llm.collective_rpc("steering_record")
        if sites is not None:
            _check_sites(sites, described)
        tokenizer = llm.get_tokenizer()
        chat.check(tokenizer)
        prompts = [
            [_prompt(llm, tokenizer, chat, example, token) for example in side]
            for side in (contrast.positive, contrast.negative)
        ]
        total = sum(map(len, prompts))
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            if progress is not None:
                progress(done, total)

        hidden = described[0]["hidden_size"]
        positive, negative = (_run(llm, side, hidden, advance) for side in prompts)
        gains: dict[str, tuple[float, ...]] = {}
        for worker in described:
            gains |= {site: tuple(numbers) for site, numbers in worker["fingerprint"].items()}
        return Recorded(
            positive,
            negative,
            model_type=described[0]["model_type"],
            num_layers=described[0]["num_layers"],
            chat_template_sha256=chat.sha256(tokenizer),
            fingerprint=gains,
        )


def _check_sites(sites: Selection, described: Sequence[Mapping[str, Any]]) -> None:
    """Whether the model has the sites that were chosen, before minutes of prompts."""
    try:
        sites.among({Site.parse(site) for worker in described for site in worker["sites"]})
    except ValueError as error:
        raise CalibrationError(str(error)) from None


def _check_before(model: str, chat: Chat, engine: Mapping[str, Any]) -> None:
    """Whether there is a chat template, asked of a tokenizer alone, which takes no minutes."""
    if engine["tokenizer_mode"] != "hf":
        return
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            engine.get("tokenizer") or model,
            revision=engine.get("tokenizer_revision") or engine.get("revision"),
            trust_remote_code=engine.get("trust_remote_code", False),
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        if isinstance(error, OSError) and not Path(model).exists():
            raise ContrastError(f"{model}: can't be had: {error}") from None
        return  # vLLM may know more, and says what is wrong
    chat.check(tokenizer)


@contextlib.contextmanager
def _engine(model: str, arguments: Mapping[str, Any]) -> Iterator[Any]:
    from vllm import LLM
    from vllm.platforms import current_platform

    llm = LLM(
        model,
        **{
            **({"kv_cache_memory_bytes": CPU_KV_CACHE} if current_platform.is_cpu() else {}),
            **arguments,
            "enforce_eager": True,
            "worker_extension_cls": WORKER_EXTENSION,
        },
    )
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()


@dataclass(frozen=True)
class _Prompt:
    """What the engine is given: ids, and from where to where their activations are averaged."""

    ids: list[int]
    span: tuple[int, int]


def _prompt(llm: Any, tokenizer: Any, chat: Chat, example: Example, token: Token) -> _Prompt:
    tokens = chat.tokens(tokenizer, example)
    longest = llm.llm_engine.model_config.max_model_len - 1
    if not 0 < len(tokens.ids) <= longest:
        raise ContrastError(
            f"{example.where}: the prompt has {len(tokens.ids)} tokens: must be 1 to {longest}, "
            "the model's context less one to generate"
        )
    return _Prompt(tokens.ids, _span(tokens, example, token))


def _span(tokens: Tokens, example: Example, token: Token) -> tuple[int, int]:
    n, answer = len(tokens.ids), tokens.answer
    if token == "mean":
        return (answer, n) if answer < n else (0, n)
    back = 1 if token == "last" else -token
    # Of an answer, its own tokens.
    first = answer if answer < n else 0
    if not 1 <= back <= n - first:
        what = "the answer" if answer < n else "the prompt"
        raise ContrastError(f"{example.where}: token={token}: {what} has {n - first} tokens")
    return n - back, n - back + 1


def _run(
    llm: Any, prompts: Sequence[_Prompt], hidden: int, advance: Callable[[int], None]
) -> dict[Site, Tensor]:
    """[n, hidden] a site, in the order of the prompts."""
    from vllm import SamplingParams

    parts: dict[Site, list[Tensor]] = {}
    size = llm.llm_engine.vllm_config.scheduler_config.max_num_seqs
    for start in range(0, len(prompts), size):
        batch = prompts[start : start + size]
        params = [
            SamplingParams(
                max_tokens=1,
                temperature=0,
                detokenize=False,
                extra_args={RECORDED: list(prompt.span)},
            )
            for prompt in batch
        ]
        inputs = [{"prompt_token_ids": prompt.ids} for prompt in batch]
        outputs = llm.generate(inputs, params, use_tqdm=False)
        for counts, sites in llm.collective_rpc("steering_take"):
            # The engine's ids are the caller's, a hyphen and a random part.
            place = {request.partition("-")[0]: row for row, request in enumerate(counts)}
            taken = {request.partition("-")[0]: count for request, count in counts.items()}
            for site, content in sites.items():
                for output, prompt in zip(outputs, batch, strict=True):
                    wanted = prompt.span[1] - prompt.span[0]
                    if (count := taken.get(output.request_id, 0)) != wanted:
                        raise CalibrationError(
                            f"{count} of {wanted} activations of request {output.request_id} at "
                            f"{site}: it was preempted; give the engine more KV cache"
                        )
                rows = torch.frombuffer(bytearray(content), dtype=torch.float32).view(-1, hidden)
                order = [place[output.request_id] for output in outputs]
                parts.setdefault(Site.parse(site), []).append(rows[order])
        advance(len(batch))
    return {site: torch.cat(parts[site]) for site in sorted(parts)}
