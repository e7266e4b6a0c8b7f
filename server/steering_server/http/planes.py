"""What is loaded, for clients to look at."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel
from vllm.exceptions import VLLMNotFoundError

from steering_planes import Plane
from steering_server.request.admission import Admission

router = APIRouter(prefix="/v1/steering", tags=["steering"])


class PlaneCard(BaseModel):
    """A loaded plane, as requests may name it."""

    id: str
    object: str = "steering.plane"
    digest: str
    base_model: str
    hidden_size: int
    layers: list[int]
    sites: list[str]
    modes: list[str]
    default_mode: str
    default_angle: float | None
    gate: float | None
    angle_convention: str


class PlaneDetail(PlaneCard):
    """A plane with how it was found and how well its sites separate the classes."""

    extraction: dict[str, Any]
    statistics: dict[str, dict[str, float]]


class PlaneList(BaseModel):
    """Every loaded plane."""

    object: str = "list"
    data: list[PlaneCard]


def _card(name: str, plane: Plane) -> dict[str, Any]:
    config = plane.config
    return {
        "id": name,
        "digest": plane.digest,
        "base_model": config.base_model_name_or_path,
        "hidden_size": config.hidden_size,
        "layers": sorted({site.layer for site in plane.sites}),
        "sites": [str(site) for site in plane.sites],
        "modes": list(plane.modes),
        "default_mode": config.default_mode,
        "default_angle": config.default_angle,
        "gate": config.gate,
        "angle_convention": config.angle_convention,
    }


def admission(request: Request) -> Admission:
    """The server's admission, which knows the planes."""
    found: Admission = request.app.state.steering
    return found


@router.get("/planes")
async def list_planes(request: Request) -> PlaneList:
    """The loaded planes."""
    planes = admission(request).planes
    return PlaneList(data=[PlaneCard(**_card(name, planes[name])) for name in sorted(planes)])


@router.get("/planes/{name}")
async def get_plane(name: str, request: Request) -> PlaneDetail:
    """One plane, in detail."""
    planes = admission(request).planes
    if name not in planes:
        raise VLLMNotFoundError(f"no plane {name!r}; loaded: {', '.join(sorted(planes)) or 'none'}")
    plane = planes[name]
    return PlaneDetail(
        **_card(name, plane),
        extraction=plane.config.extraction.model_dump(),
        statistics=plane.config.statistics,
    )
