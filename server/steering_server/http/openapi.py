"""The steering fields in OpenAPI: for readers and generated clients, admission being the judge."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field

from steering_planes.artifact import Mode
from steering_server.request.ask import MAX_DEGREES, MAX_OVER
from steering_server.request.ticket import FANNING, GENERATING

_FORMS = ("application/json", "multipart/form-data", "application/x-www-form-urlencoded")


Degrees = Annotated[float, Field(ge=-MAX_DEGREES, le=MAX_DEGREES)]
Slice = Annotated[list[int | None], Field(min_length=2, max_length=2)]


class SteeringRamp(BaseModel):
    """From one angle to another, linearly over the generated tokens, then held."""

    model_config = ConfigDict(extra="forbid")

    start: Degrees = Field(alias="from")
    stop: Degrees = Field(alias="to")
    over: int = Field(ge=1, le=MAX_OVER, description="Generated tokens.")


class SteeringWindow(BaseModel):
    """[start, stop] as Python's slices have them; null is an open end."""

    model_config = ConfigDict(extra="forbid")

    prompt: Slice | None = Field(
        default=None, description="Negative positions count from the prompt's end."
    )
    generated: Slice | None = None


Angle = Degrees | SteeringRamp | Annotated[str, Field(description="As in 180..0/64.")]
Tokens = (
    Literal["all", "prompt", "generated"]
    | SteeringWindow
    | Annotated[str, Field(description="As in prompt[-4:],generated[:16].")]
)


class SteeringItem(BaseModel):
    """One of several operations of a request."""

    angle: Angle | None = None
    plane: str | None = None
    mode: Mode | None = None
    strength: float | None = None
    keep_norm: bool | None = None
    tokens: Tokens | None = None
    gate: float | None = None
    angles: list[Angle] | None = Field(default=None, description="Of a list of one item.")
    layers: str | None = Field(default=None, description="Given back, the loaded plane's.")
    digest: str | None = Field(default=None, description="Likewise.")


class SteeringFields(BaseModel):
    """What every request that generates may carry."""

    steering_angle: Angle | None = Field(
        default=None,
        description="Degrees within the plane; 0 points along the positive class, 180 along the "
        "negative; or an angle that changes. Absent: the plane's default angle if the plane is "
        "named, else the server's default steering, if it has one.",
    )
    steering_plane: str | None = Field(
        default=None, description="A loaded plane; may be left out where exactly one is loaded."
    )
    steering_mode: Mode | None = Field(
        default=None,
        description="rotate_by turns by the angle, 0 being off; rotate_to turns to the angle; add "
        "moves along it, ablate takes out what lies along it, cap limits that. Absent: the "
        "plane's default.",
    )
    steering_strength: float | None = Field(
        default=None,
        description="Of add, in distances of the two classes; of ablate, the share that is taken "
        "out, 0 to 1, by default 1; of cap, the limit, 0 being where the negative class lies "
        "along the angle and 1 where the positive one does. Rotations take none.",
    )
    steering_keep_norm: bool | None = Field(
        default=None,
        description="Scale what add, ablate or cap give back to the activation's length. "
        "Rotations keep it anyway.",
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


class FanFields(SteeringFields):
    """Of a request whose answer has choices."""

    steering_angles: list[Angle] | None = Field(
        default=None,
        min_length=1,
        description="One choice for each angle, in order, of the one prompt; in place of "
        "steering_angle. n is absent or as many.",
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
    kinds = {}
    for kind in (SteeringFields, FanFields):
        fields = kind.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas.update(fields.pop("$defs", {}))
        kinds[kind] = fields["properties"]
    for path in GENERATING & description["paths"].keys():
        properties = kinds[FanFields if path in FANNING else SteeringFields]
        content = description["paths"][path].get("post", {}).get("requestBody", {}).get("content")
        for form in _FORMS:
            reference = (content or {}).get(form, {}).get("schema", {}).get("$ref", "")
            schema = schemas.get(reference.rpartition("/")[2])
            if schema is not None:
                schema.setdefault("properties", {}).update(properties)
