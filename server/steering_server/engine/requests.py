"""Requests on their way through the front end: admitted on the way in, counted on the way out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from copy import copy
from typing import TYPE_CHECKING, Any

from vllm.sampling_params import RequestOutputKind, SamplingParams

from steering_server.engine.settings import Settings
from steering_server.request import metrics
from steering_server.request.admission import Admission
from steering_server.request.ask import FAN, parse, steering_fields
from steering_server.request.error import SteeringError
from steering_server.request.generation import Generation, fit
from steering_server.request.operation import (
    EXTRA_ARG,
    Operation,
    admitted,
    choose,
    fan_of,
)
from steering_server.request.ticket import CURRENT

if TYPE_CHECKING:
    from vllm.outputs import RequestOutput
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.engine.parallel_sampling import ParentRequest


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
    if not isinstance(params, SamplingParams):
        return original(processor, request_id, prompt, params, *args, **kwargs)
    admission = admission_of(processor)
    operations = admission.settle(params.extra_args)
    if operations and kwargs.get("resumable"):
        rule = "not available on streaming inputs, whose prompt grows"
        raise SteeringError(EXTRA_ARG, len(operations), rule, reason="streaming_input")
    choices = fan_of(operations)
    given = with_operations(params, choose(operations, 0) if choices == 1 else operations)
    request = original(processor, request_id, prompt, given, *args, **kwargs)
    length = _length(request.prompt_token_ids, request.prompt_embeds)
    # Nobody can tell an n of 1 from none.
    wanted = _generation(params, length, params.n if params.n > 1 else max(choices, 1))
    fit(operations, wanted, by_default=operations is admission.default)
    if choices > 1:
        request.sampling_params.n = choices
    return request


def _generation(params: SamplingParams, prompt_tokens: int | None, choices: int) -> Generation:
    scored = (params.prompt_logprobs, params.prompt_logprob_token_ids)
    return Generation(choices, prompt_tokens, any(each is not None for each in scored))


def _length(token_ids: Any, embeds: Any) -> int | None:
    """Of a prompt in tokens; None where neither is there."""
    given = token_ids if token_ids is not None else embeds
    return None if given is None else len(given)


def child_sampling_params(
    original: Callable[..., SamplingParams], parent: ParentRequest, index: int
) -> SamplingParams:
    """The parameters of one choice, with the angle that it has of the request's."""
    params = original(parent, index)
    operations = getattr(parent, "_steering_operations", None)
    if operations is None:  # Read once, for all of its choices.
        operations = admitted(params.extra_args)
        parent._steering_operations = operations
    if not fan_of(operations):
        return params
    params = copy(params)  # vLLM gives all choices the same.
    wire = [operation.to_wire() for operation in choose(operations, index)]
    params.extra_args = {**(params.extra_args or {}), EXTRA_ARG: wire}
    return params


def verify_greedy_sampling(original: Callable[..., None], params: SamplingParams) -> None:
    """Greedy choices are one answer over and over, unless each has an angle of its own."""
    if params.n > 1 and params.n == _angles(params.extra_args):
        return
    original(params)


def _angles(extra_args: dict[str, Any] | None) -> int:
    """How many choices a request asks for by their angles, admitted or not yet."""
    if (ticket := CURRENT.get()) is not None and ticket.operations:
        return fan_of(ticket.operations)
    try:
        asks = parse(steering_fields(extra_args))
    except SteeringError:
        return 0  # Admission says so.
    return max((len(ask.fields.get(FAN, ())) for ask in asks), default=0)


def with_operations(
    params: SamplingParams, operations: tuple[Operation, ...], *, settled: bool = False
) -> SamplingParams:
    """``params`` with ``operations`` and no other steering field; a copy, where that changes it.

    Args:
        params: a request's; not changed, though the copy shares what they refer to. (vLLM's own
            ``clone`` copies all of it, which takes longer than admission; it does so further on.)
        operations: what it is steered by.
        settled: say so even of none, for a server whose default would be taken otherwise.
    """
    extra = params.extra_args or {}
    fields = steering_fields(extra)
    if not (fields or operations or settled):
        return params
    extra = {k: v for k, v in extra.items() if k not in fields}
    if operations or settled:
        extra[EXTRA_ARG] = [operation.to_wire() for operation in operations]
    params = copy(params)
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
    if ticket is None:
        operations = admission.settle(asked)
    else:
        wanted = _generation(sampling_params, _prompt_length(prompt), sampling_params.n)
        operations = ticket.give(asked, wanted)
    params = with_operations(sampling_params, operations, settled=bool(admission.default))
    stream = original(engine, prompt, params, *args, **kwargs)
    return _counted(stream, params, operations) if operations else stream


def _prompt_length(prompt: Any) -> int | None:
    """Of a rendered prompt; None of one that is rendered later."""
    if isinstance(prompt, dict):
        prompt = prompt.get("decoder_prompt", prompt)
    if not isinstance(prompt, dict):
        return None
    return _length(prompt.get("prompt_token_ids"), prompt.get("prompt_embeds"))


async def _counted(
    stream: AsyncGenerator[RequestOutput, None],
    params: SamplingParams,
    operations: tuple[Operation, ...],
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
            counts = [generated[index] for index in sorted(generated)]
            metrics.count_request(operations, outcome, prompt_tokens, counts)
