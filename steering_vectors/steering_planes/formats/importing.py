"""From a published file to a plane for a certain model.

Directions of the residual stream become directions at the norms that read it: gain * d (METHOD.md
2b). Bases are made orthonormal again in float64: published ones are rounded to bfloat16.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor

from steering_planes.artifact import (
    ClassMeans,
    Extraction,
    Mode,
    Plane,
    PlaneConfig,
    PlaneError,
)
from steering_planes.base_model import RESIDUAL_ROLES, BaseModel
from steering_planes.calibration import CalibrationError, first_component
from steering_planes.formats.layouts import read
from steering_planes.formats.modules import module_sites
from steering_planes.formats.source import Bases, Directions, Facts, Index, Space
from steering_planes.formats.vectors import Asked
from steering_planes.geometry import orthonormalise
from steering_planes.hub import fetch
from steering_planes.sites import Selection, Site, named


@dataclass(frozen=True)
class _Model:
    """The model that a plane is for: as its config says, or as it was told."""

    name: str
    model_type: str
    num_layers: int
    base: BaseModel | None


def import_plane(
    sources: Sequence[str | Path],
    *,
    name: str,
    base_model: str | None = None,
    model_type: str | None = None,
    num_layers: int | None = None,
    sites: str | None = None,
    default_mode: Mode | None = None,
    index: Index | None = None,
    space: Space | None = None,
    rows: Sequence[int] = (),
    experiment: str | None = None,
    residual_rms: float | None = None,
) -> Plane:
    """A published plane, or published directions, as one of our planes.

    Args:
        sources: a file, a folder or an ``hf://`` address of one of `formats.layouts.LAYOUTS`; or
            two of one direction a layer, which give the two axes.
        name: the plane's.
        base_model: the model it is for: a folder, a repository in the Hub's cache, or a mere name;
            what the source says unless given.
        model_type, num_layers: as in that model's config.json, where it is not at hand.
        sites: which to steer, as `sites.Selection` has them; what the source steers unless given.
        default_mode: of requests that name none; the source's unless given.
        index, space, rows, experiment: see `formats.vectors.Asked`.
        residual_rms: the residual stream's root mean square where caps of a capping_config.pt are
            to hold, by which they become caps at norms' outputs.

    Raises:
        PlaneError: what can't be read, that needs to be told more, or that spans no plane.
    """
    selection = _parsed(sources[0], sites)
    opened = None if base_model is None else BaseModel.open(base_model)
    layers = num_layers or (None if opened is None else opened.num_layers)
    asked = Asked(index, space, tuple(rows), experiment, layers)
    found = [read(fetch(source), asked) for source in sources]
    first = found[0]
    facts = first.facts
    model = _model(facts, base_model, opened, model_type, num_layers)
    caps: Mapping[Site, float] = {}
    _check_used(first, asked, residual_rms)
    if isinstance(first, Bases):
        if len(found) != 1:
            rule = "a plane has both axes: name it alone"
            raise PlaneError(facts.file, "sources", len(found), rule)
        bases = _from_bases(first, selection, model)
    else:
        directions = [each for each in found if isinstance(each, Directions)]
        if len(directions) != len(found) or len(found) > 2:
            rule = "must be one, or two of one direction a layer"
            raise PlaneError(facts.file, "sources", len(found), rule)
        if len(found) == 2 and any(each.caps for each in directions):
            rule = "caps are along one direction: name capping_config.pt alone"
            raise PlaneError(facts.file, "sources", len(found), rule)
        bases, lengths = _from_directions(directions, selection, model)
        caps = _caps(first, lengths, residual_rms)
        if len(found) == 2:
            data = ", ".join(each.facts.data for each in found)
            facts = replace(facts, method=f"two axes: {facts.method}", data=data)
    return _plane(name, facts, model, bases, caps, default_mode)


def _model(
    facts: Facts,
    base_model: str | None,
    opened: BaseModel | None,
    model_type: str | None,
    num_layers: int | None,
) -> _Model:
    """Never guessed: what a config says, or what was told."""
    wanted = base_model or facts.base_model
    if wanted is None:
        rule = "the source names no model: give --base-model"
        raise PlaneError(facts.file, "base_model", None, rule)
    opened = opened or BaseModel.open(wanted)
    if facts.model_type is not None and model_type not in (None, facts.model_type):
        raise PlaneError(facts.file, "model_type", facts.model_type, f"must be {model_type!r}")
    told = {"model_type": model_type, "num_layers": num_layers}
    if opened is None:
        for field, value in told.items():
            if value is None:
                rule = (
                    f"{wanted} is no folder with a config.json and not in the Hub's cache: give "
                    "its folder with --base-model, or --model-type and --num-layers"
                )
                raise PlaneError(facts.file, field, None, rule)
        assert model_type is not None
        assert num_layers is not None
        return _Model(wanted, model_type, num_layers, None)
    types = dict.fromkeys((opened.model_type, opened.outer_type))
    for field, value, own in (
        ("num_layers", num_layers, [opened.num_layers]),
        ("model_type", model_type, [*types]),
        ("model_type", facts.model_type, [*types]),
    ):
        if value is not None and value not in own:
            rule = f"must be {' or '.join(map(repr, own))}, as {opened.folder}/config.json says"
            raise PlaneError(facts.file, field, value, rule)
    # A folder's own name says less than the source does.
    if base_model is not None and Path(base_model).expanduser().is_dir():
        wanted = facts.base_model or opened.name
    return _Model(wanted, opened.model_type, opened.num_layers, opened)


def _parsed(source: str | Path, sites: str | None) -> Selection | None:
    try:
        return None if sites is None else Selection.parse(sites)
    except ValueError as error:
        raise PlaneError(source, "sites", sites, str(error)) from None


def _check_used(found: Bases | Directions, asked: Asked, residual_rms: float | None) -> None:
    """Raise PlaneError for what was said and is of no use to such a source."""
    useless: dict[str, object] = {"experiment": asked.experiment, "residual_rms": residual_rms}
    if isinstance(found, Bases):
        useless |= {"index": asked.index, "space": asked.space, "row": asked.rows or None}
    elif found.caps:
        useless = {}
    if isinstance(found, Directions) and found.space == "norm":
        useless["index"] = asked.index
    for field, value in useless.items():
        if value is not None:
            raise PlaneError(found.facts.file, field, value, "says nothing of such a source")


def _from_bases(found: Bases, selection: Selection | None, model: _Model) -> dict[Site, Tensor]:
    file = found.facts.file
    sites = module_sites(file, found.by_module, model.base, model.model_type)
    by_site = {site: found.by_module[module] for module, site in sites.items()}
    if selection is not None:
        chosen = _among(file, selection, by_site)
    elif found.selected:
        chosen = tuple(sorted({sites[module] for module in found.selected}))
    else:
        rule = f"{found.unselected}: name the sites to steer (--sites), of {named(by_site)}"
        raise PlaneError(file, "sites", None, rule)
    return {site: _basis(file, site, by_site[site]) for site in chosen}


def _among(
    file: Path, selection: Selection, sites: Mapping[Site, object] | Sequence[Site]
) -> tuple[Site, ...]:
    try:
        return selection.among(tuple(sites))
    except ValueError as error:
        raise PlaneError(file, "sites", str(selection), str(error)) from None


def _from_directions(
    found: Sequence[Directions], selection: Selection | None, model: _Model
) -> tuple[dict[Site, Tensor], dict[Site, Tensor]]:
    """(bases, the directions [k, d] as they lie at each selected site, with their lengths)."""
    file = found[0].facts.file
    for each in found:
        if len(found) == 2 and each.rows != 1:
            rule = "must have one direction a layer, to be one of two axes"
            raise PlaneError(each.facts.file, "sources", each.rows, rule)
        wanted = found[0].hidden_size if model.base is None else model.base.hidden_size
        if each.hidden_size != wanted:
            rule = f"must be {wanted}, as of {model.name}"
            raise PlaneError(each.facts.file, "hidden_size", each.hidden_size, rule)
        most = model.num_layers - (0 if each.index == "hidden-states" else 1)
        if beyond := [i for i in each.by_index if i is not None and i > most]:
            rule = f"must be at most {most}, of a model of {model.num_layers} layers"
            raise PlaneError(each.facts.file, "layer", min(beyond), rule)
    readable = _readable(found, selection, model)
    if selection is not None:
        chosen = _among(file, selection, readable)
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
        site: torch.cat([_at(each, site, model) for each in found])
        for site in (readable if found[0].rows == 1 and len(found) == 1 else chosen)
    }
    at = {site: lying[site] for site in chosen}
    if found[0].rows == 2 or len(found) == 2:
        return {site: _basis(file, site, directions) for site, directions in at.items()}, at
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
    return {site: _basis(file, site, pair) for site, pair in pairs.items()}, at


def _readable(
    found: Sequence[Directions], selection: Selection | None, model: _Model
) -> tuple[Site, ...]:
    """The model's sites at which every source has a direction."""
    facts = found[0].facts
    residual = any(each.space == "residual" for each in found)
    if model.base is not None:
        sites: tuple[Site, ...] = model.base.sites
    elif residual:
        rule = (
            "directions of the residual stream are read through the model's norms: give its folder "
            "with --base-model, or --space norm if they are of a norm's output"
        )
        raise PlaneError(facts.file, "base_model", model.name, rule)
    else:
        named_roles = {role for _, _, role in selection.parts} if selection else {None}
        if None in named_roles:
            rule = "say which norms with --sites, as 12-20.attn_in, or give --base-model"
            raise PlaneError(facts.file, "sites", None, rule)
        sites = tuple(
            Site(layer, role) for layer in range(model.num_layers) for role in named_roles if role
        )
    if residual:
        sites = tuple(site for site in sites if site.role in RESIDUAL_ROLES)
    sites = tuple(site for site in sites if all(_covers(each, site) for each in found))
    if not sites:
        what = ", ".join(f"{each.facts.data} ({each.index or each.space})" for each in found)
        rule = f"no norm of {model.name} reads a direction of {what}"
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


def _at(found: Directions, site: Site, model: _Model) -> Tensor:
    """[k, d] of a source at a site: gain * d of the residual stream's."""
    directions = found.by_index[_number(found, site)]
    if found.space == "norm" or model.base is None:
        return directions
    unit = directions / directions.norm(dim=1, keepdim=True) if found.caps else directions
    return model.base.through(site, unit)


def _basis(file: Path, site: Site, directions: Tensor) -> Tensor:
    try:
        return orthonormalise(directions)
    except ValueError as error:
        raise PlaneError(file, f"basis at {site}", list(directions.shape), str(error)) from None


def _caps(
    found: Directions, at: Mapping[Site, Tensor], residual_rms: float | None
) -> dict[Site, float]:
    """The caps on c1 at each site: of x . d / |d| <= cap they become |gain * d| / rms * cap."""
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


def _plane(
    name: str,
    facts: Facts,
    model: _Model,
    bases: Mapping[Site, Tensor],
    caps: Mapping[Site, float],
    default_mode: Mode | None,
) -> Plane:
    if model.base is not None:
        width = next(iter(bases.values())).shape[1]
        if width != model.base.hidden_size:
            rule = f"must be {model.base.hidden_size}, as of {model.name}"
            raise PlaneError(facts.file, "hidden_size", width, rule)
    mode = default_mode or facts.default_mode or "rotate_by"
    own = mode == facts.default_mode
    try:
        config = PlaneConfig(
            format_version=2 if caps else 1,
            name=name,
            base_model_name_or_path=model.name,
            model_type=model.model_type,
            hidden_size=next(iter(bases.values())).shape[1],
            num_layers=model.num_layers,
            sites=tuple(bases),
            default_mode=mode,
            default_angle=facts.default_angle if own else None,
            default_strength=facts.default_strength if own else None,
            gate=facts.gate,
            extraction=Extraction(method=facts.method, data=facts.data, n=facts.n),
            fingerprint=(
                (model.base.fingerprint() or None)
                if model.base and model.base.has_weights
                else None
            ),
        )
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"])) or "config"
        value = first["input"] if first["loc"] else None
        raise PlaneError(facts.file, field, value, first["msg"]) from None
    # A cap's classes are the cap itself and nothing at all: strength 1 is as published.
    means = {
        site: ClassMeans((cap, 0.0), (0.0, 0.0), rho=abs(cap) or 1.0) for site, cap in caps.items()
    }
    return Plane(config, bases, means if caps else None)
