"""The request fields that carry steering, typed for OpenAPI, checked by admission's own rules."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, create_model, model_validator

from steering_server import metrics
from steering_server.engine.admission import (
    MAX_DEGREES,
    SteeringError,
    parse,
    steering_fields,
)
from steering_server.rotation import EXTRA_ARG, Mode, Rotation, Tokens

Degrees = Annotated[float, Field(ge=-MAX_DEGREES, le=MAX_DEGREES, allow_inf_nan=False)]
Threshold = Annotated[float, Field(allow_inf_nan=False)]


class SteeringItem(BaseModel):
    """One of several rotations of a request."""

    model_config = ConfigDict(extra="forbid")

    angle: Degrees | None = None
    plane: str | None = None
    mode: Mode | None = None
    tokens: Tokens | None = None
    gate: Threshold | None = None


class SteeringFields(BaseModel):
    """Mixed into a request model of vLLM."""

    steering_angle: Degrees | None = Field(
        default=None,
        description="Degrees within the plane; 0 points along the positive class, 180 along the "
        "negative. Absent: the plane's default angle if the plane is named, else no steering.",
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
    steering_gate: Threshold | None = Field(
        default=None,
        description="Steer a token only where its first coordinate in the plane exceeds this.",
    )
    steering: list[SteeringItem] | None = Field(
        default=None,
        description="Several planes, applied in order; excludes the flat fields.",
    )

    @model_validator(mode="before")
    @classmethod
    def check_steering(cls, data: Any) -> Any:
        """Refuse what no plane could make right, before vLLM looks at the request.

        Raises:
            SteeringError: naming field, value and rule.
        """
        if isinstance(data, dict) and (fields := requested(data)):
            try:
                asked = parse(fields)
                if asked and data.get("use_beam_search"):
                    rule = "beam search does not carry steering; leave out one of the two"
                    raise SteeringError("use_beam_search", True, rule, reason="beam_search")
            except SteeringError as error:
                metrics.count_rejection(error.reason)
                raise
        return data

    def steering_args(self) -> dict[str, Any]:
        """The steering fields as given, wherever they were."""
        # Unset stays unset: a null gate means "no gate", an absent one the plane's.
        return requested(self.model_dump(include={*_NAMES, "vllm_xargs"}, exclude_unset=True))

    def carry(self, rotations: Sequence[Rotation]) -> None:
        """Put admitted rotations where every handler of vLLM passes them on to the engine.

        ``vllm_xargs`` is the one field that all of them turn into ``SamplingParams.extra_args``,
        also where they build another kind of request first.
        """
        xargs: dict[str, Any] | None = getattr(self, "vllm_xargs", None)
        kept = {k: v for k, v in (xargs or {}).items() if k not in steering_fields({k: v})}
        if rotations:
            kept[EXTRA_ARG] = json.dumps([r.to_wire() for r in rotations])
        self.vllm_xargs = kept or None


_NAMES = frozenset(SteeringFields.model_fields)


def requested(body: dict[str, Any]) -> dict[str, Any]:
    """The steering fields of a request's body, its ``vllm_xargs`` included.

    Raises:
        SteeringError: a field that is given in both places.
    """
    own = steering_fields({k: v for k, v in body.items() if k != "vllm_xargs"})
    xargs = body.get("vllm_xargs")
    nested = steering_fields(xargs) if isinstance(xargs, dict) else {}
    for key in own.keys() & nested.keys():
        rule = f"given twice, also as vllm_xargs.{key}"
        raise SteeringError(key, own[key], rule, reason="conflicting_fields")
    return {**own, **nested}


def with_steering(request_class: type[BaseModel]) -> type[BaseModel]:
    """``request_class`` with the steering fields; its name, in OpenAPI, stays."""
    bases: tuple[type[BaseModel], ...] = (SteeringFields, request_class)
    return create_model(
        request_class.__name__,
        __base__=bases,
        __doc__=request_class.__doc__,
        __module__=__name__,
    )
