"""Where a request's body becomes values: the one place that every route of the app passes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any

from starlette.datastructures import FormData
from starlette.exceptions import HTTPException
from starlette.requests import Request

from steering_server.request.ask import is_reserved
from steering_server.request.error import SteeringError
from steering_server.request.ticket import CURRENT


async def read_json(original: Callable[..., Awaitable[Any]], request: Request) -> Any:
    """A request's JSON, without its steering fields, which its ticket has taken.

    Raises:
        HTTPException: steering that cannot be given; the ticket holds the error, and the
            middleware answers with it.
    """
    body = await original(request)
    if (ticket := CURRENT.get()) is None:
        return body
    try:
        return ticket.read_json(body)
    except SteeringError as error:
        # FastAPI lets no other exception out of a body's reading.
        raise HTTPException(HTTPStatus.BAD_REQUEST, str(error)) from error


async def read_form(
    original: Callable[..., Awaitable[FormData]], request: Request, **limits: Any
) -> FormData:
    """As :func:`read_json`, of a form."""
    form = await original(request, **limits)
    if (ticket := CURRENT.get()) is None:
        return form
    # A file that is named as a field of ours is one, and refused as such.
    texts = {
        key: value
        for key, value in form.multi_items()
        if isinstance(value, str) or is_reserved(key)
    }
    try:
        left = ticket.read_form(dict(texts))
    except SteeringError as error:
        raise HTTPException(HTTPStatus.BAD_REQUEST, str(error)) from error
    if left == texts:
        return form
    return FormData(
        [
            (key, left[key] if left[key] != texts[key] else value)
            if isinstance(value, str)
            else (key, value)
            for key, value in form.multi_items()
            if not isinstance(value, str) or key in left
        ]
    )
