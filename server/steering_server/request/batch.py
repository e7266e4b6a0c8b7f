"""``vllm run-batch``: requests from a file, which no HTTP middleware sees."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from typing import Any

from pydantic import BaseModel
from starlette.datastructures import State

from steering_server.request.admission import Admission
from steering_server.request.models import ServedModels
from steering_server.request.receipt import NAME, receipt
from steering_server.request.ticket import CURRENT, Ticket

_HANDLERS = (
    ("openai_serving_chat", "create_chat_completion", "/v1/chat/completions"),
    ("openai_serving_transcription", "create_transcription", "/v1/audio/transcriptions"),
    ("openai_serving_translation", "create_translation", "/v1/audio/translations"),
)


def steer(state: State, admission: Admission) -> None:
    """Let the handlers that a batch calls take steering fields, and give receipts.

    Raises:
        SteeringError: a preset whose name is taken.
    """
    models = ServedModels(state.openai_serving_models, admission.presets)
    for name, method, path in _HANDLERS:
        if (handler := getattr(state, name, None)) is not None:
            new = functools.partial(Ticket, path, admission, models)
            setattr(handler, method, _with_ticket(getattr(handler, method), new))


def _with_ticket(
    handle: Callable[..., Awaitable[Any]], ticket_of: Callable[[], Ticket]
) -> Callable[..., Awaitable[Any]]:
    @functools.wraps(handle)
    async def handled(*args: Any, **kwargs: Any) -> Any:
        ticket = ticket_of()
        request = next(value for value in args if isinstance(value, BaseModel))
        _read(ticket, request)
        token = CURRENT.set(ticket)
        try:
            answer = await handle(*args, **kwargs)
        finally:
            CURRENT.reset(token)
        if ticket.error is not None:
            raise ticket.error
        if ticket.admitted and isinstance(answer, BaseModel):
            setattr(answer, NAME, receipt(ticket.admitted, ticket.admission.planes))
        elif not ticket.is_kept and "error" not in type(answer).model_fields:
            raise RuntimeError(f"{ticket.path} answered without {ticket.operations}")
        return answer

    return handled


def _read(ticket: Ticket, request: BaseModel) -> None:
    """As where a body is read, of a request that vLLM has parsed already."""
    extra = request.model_extra or {}
    own = {
        name: getattr(request, name)
        for name in ("model", "vllm_xargs", "use_beam_search", "n")
        if name in request.model_fields_set
    }
    left = ticket.read_json({**extra, **{k: v for k, v in own.items() if v is not None}})
    for key in extra.keys() - left.keys():
        del extra[key]
    for name in {"model", "vllm_xargs", "n"} & (own.keys() | left.keys()):
        setattr(request, name, left.get(name))
