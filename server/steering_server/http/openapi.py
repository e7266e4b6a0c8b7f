"""The steering fields in OpenAPI: for readers and generated clients, admission being the judge."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, Field

from steering_server.request.admission import MAX_DEGREES
from steering_server.request.rotation import Mode, Tokens
from steering_server.request.ticket import GENERATING

_FORMS = ("application/json", "multipart/form-data", "application/x-www-form-urlencoded")


class SteeringItem(BaseModel):
    """One of several rotations of a request."""

    angle: float | None = Field(default=None, ge=-MAX_DEGREES, le=MAX_DEGREES)
    plane: str | None = None
    mode: Mode | None = None
    tokens: Tokens | None = None
    gate: float | None = None


class SteeringFields(BaseModel):
    """What every request that generates may carry."""

    steering_angle: float | None = Field(
        default=None,
        ge=-MAX_DEGREES,
        le=MAX_DEGREES,
        description="Degrees within the plane; 0 points along the positive class, 180 along the "
        "negative. Absent: the plane's default angle if the plane is named, else the server's "
        "default steering, if it has one.",
    )
    steering_plane: str | None = Field(
        default=None, description="A loaded plane; may be left out where exactly one is loaded."
    )
    steering_mode: Mode | None = Field(
        default=None,
        description="rotate_by turns by the angle, 0 being off; rotate_to turns to the angle. "
        "Absent: the plane's default.",
    )
    steering_tokens: Tokens | None = Field(
        default=None, description="Which tokens are steered. Absent: all."
    )
    steering_gate: float | None = Field(
        default=None,
        description="Steer a token only where its first coordinate in the plane exceeds this.",
    )
    steering: list[SteeringItem] | None = Field(
        default=None,
        description="Several planes, applied in order; excludes the flat fields. An empty list "
        "asks for none.",
    )


def document(app: FastAPI) -> None:
    """Add the fields to the request bodies of the app's generating routes, when it is described."""
    original: Callable[[], dict[str, Any]] = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            _add(original())
        return app.openapi_schema or {}

    app.openapi = openapi  # type: ignore[method-assign]


def _add(description: dict[str, Any]) -> None:
    schemas = description.setdefault("components", {}).setdefault("schemas", {})
    fields = SteeringFields.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas.update(fields.pop("$defs", {}))
    for path in GENERATING & description["paths"].keys():
        content = description["paths"][path].get("post", {}).get("requestBody", {}).get("content")
        for form in _FORMS:
            reference = (content or {}).get(form, {}).get("schema", {}).get("$ref", "")
            schema = schemas.get(reference.rpartition("/")[2])
            if schema is not None:
                schema.setdefault("properties", {}).update(fields["properties"])
