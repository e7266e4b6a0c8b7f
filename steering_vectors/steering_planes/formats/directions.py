"""Directions a layer as bases at a model's sites.

What is of the residual stream lies at the norms that read it as gain * d (METHOD.md 2b).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from steering_planes.artifact import PlaneError
from steering_planes.base_model import RESIDUAL_ROLES
from steering_planes.calibration import CalibrationError, first_component
from steering_planes.formats.bases import basis_at, chosen_among
from steering_planes.formats.source import Directions
from steering_planes.formats.target import Target
from steering_planes.sites import Selection, Site, named


def bases_of_directions(
    found: Sequence[Directions], selection: Selection | None, target: Target
) -> tuple[dict[Site, Tensor], dict[Site, Tensor]]:
    """(bases [2, d], and the directions [k, d] as they lie there), of each selected site.

    Raises:
        PlaneError: what does not fit the model, selects no site, or spans no plane.
    """
    file = found[0].facts.file
    for each in found:
        if len(found) == 2 and each.rows != 1:
            rule = "must have one direction a layer, to be one of two axes"
            raise PlaneError(each.facts.file, "sources", each.rows, rule)
        wanted = found[0].hidden_size if target.base is None else target.base.hidden_size
        if each.hidden_size != wanted:
            rule = f"must be {wanted}, as of {target.name}"
            raise PlaneError(each.facts.file, "hidden_size", each.hidden_size, rule)
        most = target.num_layers - (0 if each.index == "hidden-states" else 1)
        if beyond := [i for i in each.by_index if i is not None and i > most]:
            rule = f"must be at most {most}, of a model of {target.num_layers} layers"
            raise PlaneError(each.facts.file, "layer", min(beyond), rule)
    readable = _readable(found, selection, target)
    if selection is not None:
        chosen = chosen_among(file, selection, readable)
    elif all(each.steers_all for each in found):
        chosen = _own_layers(found, readable)
        if lost := [str(i) for i in found[0].caps if not _is_read(found[0], i, chosen)]:
            rule = (
                f"no site reads block {', '.join(lost)}'s output: name the sites to cap (--sites)"
            )
            raise PlaneError(file, "sites", None, rule)
    else:
        rule = f"this format selects none: name the sites to steer (--sites), of {named(readable)}"
        raise PlaneError(file, "sites", None, rule)
    lying = {
        site: torch.cat([_at(each, site, target) for each in found])
        for site in (readable if found[0].rows == 1 and len(found) == 1 else chosen)
    }
    at = {site: lying[site] for site in chosen}
    if found[0].rows == 2 or len(found) == 2:
        return {site: basis_at(file, site, directions) for site, directions in at.items()}, at
    for site, directions in lying.items():
        if not float(directions.norm()):
            raise PlaneError(file, f"direction at {site}", 0.0, "must not be zero")
    units = {site: directions[0] / directions[0].norm() for site, directions in lying.items()}
    try:
        second, _ = first_component(units)
    except CalibrationError:
        rule = (
            f"one direction, the same at each of {named(readable)}, spans no plane: give a second "
            "source for the other axis"
        )
        raise PlaneError(file, "sources", len(found), rule) from None
    if float(second[second.abs().argmax()]) < 0:
        second = -second
    pairs = {site: torch.stack((units[site], second)) for site in chosen}
    return {site: basis_at(file, site, pair) for site, pair in pairs.items()}, at


def _readable(
    found: Sequence[Directions], selection: Selection | None, target: Target
) -> tuple[Site, ...]:
    """The model's sites at which every source has a direction."""
    facts = found[0].facts
    residual = any(each.space == "residual" for each in found)
    if target.base is not None:
        sites: tuple[Site, ...] = target.base.sites
    elif residual:
        rule = (
            "directions of the residual stream are read through the model's norms: give its folder "
            "with --base-model, or --space norm if they are of a norm's output"
        )
        raise PlaneError(facts.file, "base_model", target.name, rule)
    else:
        named_roles = {role for _, _, role in selection.parts} if selection else {None}
        if None in named_roles:
            rule = "say which norms with --sites, as 12-20.attn_in, or give --base-model"
            raise PlaneError(facts.file, "sites", None, rule)
        sites = tuple(
            Site(layer, role) for layer in range(target.num_layers) for role in named_roles if role
        )
    if residual:
        sites = tuple(site for site in sites if site.role in RESIDUAL_ROLES)
    sites = tuple(site for site in sites if all(_covers(each, site) for each in found))
    if not sites:
        what = ", ".join(f"{each.facts.data} ({each.index or each.space})" for each in found)
        rule = f"no norm of {target.name} reads a direction of {what}"
        raise PlaneError(facts.file, "sites", None, rule)
    return sites


def _covers(found: Directions, site: Site) -> bool:
    try:
        _number(found, site)
    except KeyError:
        return False
    return True


def _number(found: Directions, site: Site) -> int | None:
    """Which direction of a source a site reads; KeyError if none."""
    if found.space == "norm":
        number = site.layer
    else:
        number = site.layer - 1 if found.index == "block-output" else site.layer
    if len(found.by_index) == 1:
        (only,) = found.by_index
        # What is added to the residual stream stays in it, for all later layers to read.
        if only is None or found.space == "norm" or number >= only:
            return only
        raise KeyError(number)
    if number not in found.by_index:
        raise KeyError(number)
    return number


def _is_read(found: Directions, number: int, sites: Sequence[Site]) -> bool:
    return any(_number(found, site) == number for site in sites)


def _own_layers(found: Sequence[Directions], readable: Sequence[Site]) -> tuple[Site, ...]:
    """The sites that read the stream right where the sources changed it."""

    def own(each: Directions, site: Site) -> bool:
        ahead = 0 if each.space == "norm" or each.index != "block-output" else 1
        return site.layer - ahead in each.by_index

    return tuple(site for site in readable if all(own(each, site) for each in found))


def _at(found: Directions, site: Site, target: Target) -> Tensor:
    """[k, d] of a source at a site: gain * d of the residual stream's."""
    directions = found.by_index[_number(found, site)]
    if found.space == "norm" or target.base is None:
        return directions
    unit = directions / directions.norm(dim=1, keepdim=True) if found.caps else directions
    return target.base.through(site, unit)


def caps_at(
    found: Directions, at: Mapping[Site, Tensor], residual_rms: float | None
) -> dict[Site, float]:
    """The caps on c1 at each site: of x . d / |d| <= cap they become |gain * d| / rms * cap.

    Raises PlaneError where that rms is not said.
    """
    if not found.caps:
        return {}
    if found.space == "residual" and residual_rms is None:
        rule = (
            "caps are in the residual stream's units, and a norm divides each token by its own "
            "rms: give the typical one with --residual-rms"
        )
        raise PlaneError(found.facts.file, "residual_rms", None, rule)
    scale = {
        site: 1.0 if found.space == "norm" else float(directions.norm()) / (residual_rms or 1.0)
        for site, directions in at.items()
    }
    return {site: scale[site] * found.caps[_number(found, site) or 0] for site in at}
