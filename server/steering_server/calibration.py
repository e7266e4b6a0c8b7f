"""From a contrast to a plane, on the engine that will serve it.

plane = calibrate("org/model", read_contrast(Path("mood.json")), name="mood").plane
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steering_planes import Extraction, Plane, Site
from steering_planes.artifact import Mode
from steering_planes.calibration import (
    Activations,
    Calibration,
    CalibrationError,
    Options,
    separation,
)
from steering_planes.calibration import calibrate as find_plane
from steering_planes.contrast import Contrast, ContrastError, Example
from steering_server.engine.recording import WORKER_EXTENSION

HELD_OUT = 5
"""Every fifth example of each class is held out where separation is measured."""

CPU_KV_CACHE = 2 << 30
"""Bytes of KV cache on a CPU, unless the engine's arguments say: vLLM would take nearly all memory,
and a prompt with one token needs little."""

Progress = Callable[[int, int], None]
"""Called with the prompts done so far, and all of them."""


@dataclass(frozen=True, eq=False)
class Calibrated:
    """A plane, how it was found, and what it was found from."""

    plane: Plane
    calibration: Calibration
    positive: Activations
    negative: Activations


@dataclass(frozen=True, eq=False)
class Recorded:
    """The activations of both classes, and the model that they are of.

    ``positive`` and ``negative`` are [n, hidden] float32 a site, in the order of the examples.
    """

    positive: Activations
    negative: Activations
    model_type: str
    num_layers: int
    chat_template_sha256: str


def calibrate(
    model: str,
    contrast: Contrast,
    *,
    name: str,
    options: Options | None = None,
    base_model: str | None = None,
    revision: str | None = None,
    default_mode: Mode = "rotate_by",
    default_angle: float | None = None,
    gate: float | None = None,
    engine: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Calibrated:
    """Find the plane that separates a contrast's two classes (METHOD: Selective Steering, 3).

    The plane comes from all examples. How well each site separates the classes is measured on
    every fifth example, with directions from the others, and kept as the site's ``auroc``.

    Args:
        model: a folder or a repository that vLLM can load.
        contrast: the two classes.
        name: the plane's.
        options: how to calibrate; the published method unless given.
        base_model: the model's public name; the folder's or the repository's unless given.
        revision: the model's.
        default_mode: of requests that name none.
        default_angle: degrees, of requests that name the plane alone.
        gate: only tokens with c1 above it are steered, unless a request says otherwise.
        engine: more arguments of ``vllm.LLM`` (dtype, tensor_parallel_size, quantization, …).
        progress: told how far it is.

    Raises:
        CalibrationError: activations that give no plane.
        ContrastError: an example longer than the model's context, naming file and line.
    """
    options = options or Options()
    recorded = record(model, contrast, engine={"revision": revision, **(engine or {})},
                      progress=progress)  # fmt: skip
    calibration = find_plane(recorded.positive, recorded.negative, options)
    calibration = calibration.with_separation(
        separation(recorded.positive, recorded.negative, options, HELD_OUT)
    )
    folder = Path(model)
    plane = calibration.to_plane(
        name=name,
        base_model_name_or_path=base_model or (folder.resolve().name if folder.is_dir() else model),
        revision=revision,
        model_type=recorded.model_type,
        num_layers=recorded.num_layers,
        default_mode=default_mode,
        default_angle=default_angle,
        gate=gate,
        extraction=Extraction(
            method=str(options),
            data=", ".join(f"{file.name} sha256:{_sha256(file)}" for file in contrast.files),
            n=min(len(contrast.positive), len(contrast.negative)),
            chat_template_sha256=recorded.chat_template_sha256,
        ),
    )
    return Calibrated(plane, calibration, recorded.positive, recorded.negative)


def record(
    model: str,
    contrast: Contrast,
    *,
    engine: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Recorded:
    """The last prompt token's activation of every example at every site of a model.

    Conversations go through the model's chat template with the generation prompt. The engine runs
    eagerly: a compiled graph calls no norm.

    Raises:
        CalibrationError: activations that are not finite.
        ContrastError: an example longer than the model's context.
    """
    from steering_server.activations import chat_template_sha256

    with _engine(model, engine or {}) as llm:
        described: list[dict[str, Any]] = llm.collective_rpc("steering_record")
        tokenizer = llm.get_tokenizer()
        prompts = [
            [_ids(llm, tokenizer, example) for example in side]
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
        return Recorded(
            positive,
            negative,
            model_type=described[0]["model_type"],
            num_layers=described[0]["num_layers"],
            chat_template_sha256=chat_template_sha256(tokenizer),
        )


@contextlib.contextmanager
def _engine(model: str, arguments: Mapping[str, Any]) -> Iterator[Any]:
    from vllm import LLM
    from vllm.platforms import current_platform

    llm = LLM(
        model,
        **{
            **({"kv_cache_memory_bytes": CPU_KV_CACHE} if current_platform.is_cpu() else {}),
            **{key: value for key, value in arguments.items() if value is not None},
            "enforce_eager": True,
            "worker_extension_cls": WORKER_EXTENSION,
        },
    )
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()


def _ids(llm: Any, tokenizer: Any, example: Example) -> list[int]:
    from steering_server.activations import prompt_text

    # The template writes BOS itself where the model wants one.
    text = prompt_text(tokenizer, example.conversation)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    longest = llm.llm_engine.model_config.max_model_len - 1
    if len(ids) > longest:
        raise ContrastError(
            f"{example.where}: the prompt has {len(ids)} tokens: must be at most {longest}, the "
            "model's context less one to generate"
        )
    return ids


def _run(
    llm: Any, prompts: Sequence[list[int]], hidden: int, advance: Callable[[int], None]
) -> dict[Site, Tensor]:
    """[n, hidden] a site, in the order of the prompts."""
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=1, temperature=0, detokenize=False)
    parts: dict[Site, list[Tensor]] = {}
    size = llm.llm_engine.vllm_config.scheduler_config.max_num_seqs
    for start in range(0, len(prompts), size):
        batch = [{"prompt_token_ids": ids} for ids in prompts[start : start + size]]
        outputs = llm.generate(batch, params, use_tqdm=False)
        for requests, sites in llm.collective_rpc("steering_take"):
            # The engine's ids are the caller's, a hyphen and a random part.
            place = {request.partition("-")[0]: row for row, request in enumerate(requests)}
            for site, content in sites.items():
                rows = torch.frombuffer(bytearray(content), dtype=torch.float32).view(-1, hidden)
                if missing := [o.request_id for o in outputs if o.request_id not in place]:
                    raise CalibrationError(f"no activation of request(s) {missing} at {site}")
                order = [place[output.request_id] for output in outputs]
                parts.setdefault(Site.parse(site), []).append(rows[order])
        advance(len(batch))
    return {site: torch.cat(parts[site]) for site in sorted(parts)}


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
