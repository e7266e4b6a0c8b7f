"""Requests on their way through the front end: admitted on the way in, counted on the way out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from vllm.sampling_params import RequestOutputKind, SamplingParams

from steering_server.engine.settings import Settings
from steering_server.request import metrics
from steering_server.request.admission import Admission, SteeringError, steering_fields
from steering_server.request.rotation import EXTRA_ARG, Rotation
from steering_server.request.ticket import CURRENT

if TYPE_CHECKING:
    from vllm.outputs import RequestOutput
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.input_processor import InputProcessor


def admission_of(processor: InputProcessor) -> Admission:
    """The admission of the engine that ``processor`` feeds; made on first use."""
    admission: Admission | None = getattr(processor, "_steering_admission", None)
    if admission is None:
        admission = Settings.of(processor.vllm_config).admission()
        processor._steering_admission = admission
    return admission


def process_inputs(
    original: Callable[..., EngineCoreRequest],
    processor: InputProcessor,
    request_id: str,
    prompt: Any,
    params: Any,
    *args: Any,
    **kwargs: Any,
) -> EngineCoreRequest:
    """Every route and the offline ``LLM`` class pass here; steering goes on only if admitted.

    Raises:
        SteeringError: steering that cannot be given exactly as asked.
    """
    if isinstance(params, SamplingParams):
        rotations = admission_of(processor).settle(params.extra_args)
        if rotations and kwargs.get("resumable"):
            rule = "not available on streaming inputs, whose prompt grows"
            raise SteeringError(EXTRA_ARG, len(rotations), rule, reason="streaming_input")
        params = with_rotations(params, rotations)
    return original(processor, request_id, prompt, params, *args, **kwargs)


def with_rotations(
    params: SamplingParams, rotations: tuple[Rotation, ...], *, settled: bool = False
) -> SamplingParams:
    """``params`` with ``rotations`` and no other steering field; a copy, where that changes it.

    Args:
        params: a request's.
        rotations: what it is steered by.
        settled: say so even of none, for a server whose default would be taken otherwise.
    """
    extra = params.extra_args or {}
    fields = steering_fields(extra)
    if not (fields or rotations or settled):
        return params
    extra = {k: v for k, v in extra.items() if k not in fields}
    if rotations or settled:
        extra[EXTRA_ARG] = [r.to_wire() for r in rotations]
    params = params.clone()
    params.extra_args = extra or None
    return params


def generate(
    original: Callable[..., AsyncGenerator[RequestOutput, None]],
    engine: Any,
    prompt: Any,
    sampling_params: SamplingParams,
    *args: Any,
    **kwargs: Any,
) -> AsyncGenerator[RequestOutput, None]:
    """vLLM's stream of outputs, steered as the client's request asks, and counted if it is.

    Called, not iterated: an answer's first line must say what the engine was given.

    Raises:
        SteeringError: steering that cannot be given exactly as asked.
    """
    admission = admission_of(engine.input_processor)
    ticket = CURRENT.get()
    asked = sampling_params.extra_args
    rotations = admission.settle(asked) if ticket is None else ticket.give(asked)
    params = with_rotations(sampling_params, rotations, settled=bool(admission.default))
    stream = original(engine, prompt, params, *args, **kwargs)
    return _counted(stream, params, rotations) if rotations else stream


async def _counted(
    stream: AsyncGenerator[RequestOutput, None],
    params: SamplingParams,
    rotations: tuple[Rotation, ...],
) -> AsyncGenerator[RequestOutput, None]:
    outcome, prompt_tokens, generated = "error", 0, dict[int, int]()
    try:
        async with aclosing(stream):
            async for output in stream:
                prompt_tokens = len(output.prompt_token_ids or ())
                for choice in output.outputs:
                    before = generated.get(choice.index, 0)
                    if params.output_kind != RequestOutputKind.DELTA:
                        before = 0
                    generated[choice.index] = before + len(choice.token_ids)
                yield output
        outcome = "ok"
    except SteeringError:
        outcome = "rejected"
        raise
    except (asyncio.CancelledError, GeneratorExit):
        outcome = "aborted"
        raise
    finally:
        if outcome != "rejected":  # A refused request has its own counter.
            metrics.count_request(rotations, outcome, prompt_tokens, sum(generated.values()))
