"""Steering planes: what they are, how they are found, and the files that hold them."""

from steering_planes.artifact import ClassMeans, Extraction, Plane, PlaneConfig, PlaneError
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
from steering_planes.hub import open_plane
from steering_planes.sites import ROLES, Site, SitesNotFoundError, find_sites

__all__ = [
    "ROLES",
    "ClassMeans",
    "Extraction",
    "Plane",
    "PlaneConfig",
    "PlaneError",
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
