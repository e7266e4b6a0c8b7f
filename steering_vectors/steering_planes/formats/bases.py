"""Orthonormal bases at a model's sites, of two directions that a source has there.

Bases are made orthonormal again in float64: published ones are rounded to bfloat16.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from steering_planes.artifact import PlaneError
from steering_planes.formats.modules import module_sites
from steering_planes.formats.source import Bases
from steering_planes.formats.target import Target
from steering_planes.geometry import orthonormalise
from steering_planes.sites import Selection, Site, named


def bases_of_modules(
    found: Bases, selection: Selection | None, target: Target
) -> dict[Site, Tensor]:
    """[2, d] at each selected site; raises PlaneError."""
    file = found.facts.file
    sites = module_sites(file, found.by_module, target.base, target.model_type)
    by_site = {site: found.by_module[module] for module, site in sites.items()}
    if selection is not None:
        chosen = chosen_among(file, selection, by_site)
    elif found.selected:
        chosen = tuple(sorted({sites[module] for module in found.selected}))
    else:
        rule = f"{found.unselected}: name the sites to steer (--sites), of {named(by_site)}"
        raise PlaneError(file, "sites", None, rule)
    return {site: basis_at(file, site, by_site[site]) for site in chosen}


def chosen_among(
    file: Path, selection: Selection, sites: Mapping[Site, object] | Sequence[Site]
) -> tuple[Site, ...]:
    """What is selected of a source's sites; raises PlaneError where there is no such one."""
    try:
        return selection.among(tuple(sites))
    except ValueError as error:
        raise PlaneError(file, "sites", str(selection), str(error)) from None


def basis_at(file: Path, site: Site, directions: Tensor) -> Tensor:
    """[2, d] orthonormal float32 of two directions; raises PlaneError where they span no plane."""
    try:
        return orthonormalise(directions)
    except ValueError as error:
        raise PlaneError(file, f"basis at {site}", list(directions.shape), str(error)) from None
