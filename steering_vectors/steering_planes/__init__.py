"""Steering planes: what they are, how they are found, and the files that hold them."""

from typing import TYPE_CHECKING, Any

from steering_planes.geometry import (
    ablate,
    add,
    canonical_degrees,
    cap,
    cos_sin,
    keep_norm,
    orthonormalise,
    orthonormality_error,
    rotate_by,
    rotate_to,
)
from steering_planes.sites import ROLES, Selection, Site, SitesNotFoundError, find_sites

if TYPE_CHECKING:
    from steering_planes.artifact import ClassMeans, Extraction, Plane, PlaneConfig, PlaneError
    from steering_planes.hub import open_plane

__all__ = [
    "ROLES",
    "ClassMeans",
    "Extraction",
    "Plane",
    "PlaneConfig",
    "PlaneError",
    "Selection",
    "Site",
    "SitesNotFoundError",
    "ablate",
    "add",
    "canonical_degrees",
    "cap",
    "cos_sin",
    "find_sites",
    "keep_norm",
    "open_plane",
    "orthonormalise",
    "orthonormality_error",
    "rotate_by",
    "rotate_to",
]


def __getattr__(name: str) -> Any:
    # What reads and checks files needs pydantic and safetensors; geometry, and with it the kernels,
    # need torch alone.
    if name == "open_plane":
        from steering_planes.hub import open_plane

        return open_plane
    if name in __all__:
        from steering_planes import artifact

        return getattr(artifact, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
