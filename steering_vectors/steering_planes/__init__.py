"""Steering planes: what they are, how they are found, and the files that hold them."""

from steering_planes.artifact import Extraction, Plane, PlaneConfig, PlaneError
from steering_planes.geometry import (
    canonical_degrees,
    cos_sin,
    orthonormalise,
    orthonormality_error,
    rotate_by,
    rotate_to,
)
from steering_planes.hub import open_plane
from steering_planes.sites import ROLES, Site, SitesNotFoundError, find_sites

__all__ = [
    "ROLES",
    "Extraction",
    "Plane",
    "PlaneConfig",
    "PlaneError",
    "Site",
    "SitesNotFoundError",
    "canonical_degrees",
    "cos_sin",
    "find_sites",
    "open_plane",
    "orthonormalise",
    "orthonormality_error",
    "rotate_by",
    "rotate_to",
]
