"""From a published file to a plane for a certain model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

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
from steering_planes.base_model import BaseModel
from steering_planes.formats.bases import bases_of_modules
from steering_planes.formats.directions import bases_of_directions, caps_at
from steering_planes.formats.layouts import read
from steering_planes.formats.source import Bases, Directions, Facts, Index, Space
from steering_planes.formats.target import Target, target_of
from steering_planes.formats.vectors import Asked
from steering_planes.hub import fetch
from steering_planes.sites import Selection, Site


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
    target = target_of(facts, base_model, opened, model_type, num_layers)
    caps: Mapping[Site, float] = {}
    _check_used(first, asked, residual_rms)
    if isinstance(first, Bases):
        if len(found) != 1:
            rule = "a plane has both axes: name it alone"
            raise PlaneError(facts.file, "sources", len(found), rule)
        bases = bases_of_modules(first, selection, target)
    else:
        directions = [each for each in found if isinstance(each, Directions)]
        if len(directions) != len(found) or len(found) > 2:
            rule = "must be one, or two of one direction a layer"
            raise PlaneError(facts.file, "sources", len(found), rule)
        if len(found) == 2 and any(each.caps for each in directions):
            rule = "caps are along one direction: name capping_config.pt alone"
            raise PlaneError(facts.file, "sources", len(found), rule)
        bases, lengths = bases_of_directions(directions, selection, target)
        caps = caps_at(first, lengths, residual_rms)
        if len(found) == 2:
            data = ", ".join(each.facts.data for each in found)
            facts = replace(facts, method=f"two axes: {facts.method}", data=data)
    return _plane(name, facts, target, bases, caps, default_mode)


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


def _plane(
    name: str,
    facts: Facts,
    target: Target,
    bases: Mapping[Site, Tensor],
    caps: Mapping[Site, float],
    default_mode: Mode | None,
) -> Plane:
    if target.base is not None:
        width = next(iter(bases.values())).shape[1]
        if width != target.base.hidden_size:
            rule = f"must be {target.base.hidden_size}, as of {target.name}"
            raise PlaneError(facts.file, "hidden_size", width, rule)
    mode = default_mode or facts.default_mode or "rotate_by"
    own = mode == facts.default_mode
    try:
        config = PlaneConfig(
            format_version=2 if caps else 1,
            name=name,
            base_model_name_or_path=target.name,
            model_type=target.model_type,
            hidden_size=next(iter(bases.values())).shape[1],
            num_layers=target.num_layers,
            sites=tuple(bases),
            default_mode=mode,
            default_angle=facts.default_angle if own else None,
            default_strength=facts.default_strength if own else None,
            gate=facts.gate,
            extraction=Extraction(method=facts.method, data=facts.data, n=facts.n),
            fingerprint=(
                (target.base.fingerprint() or None)
                if target.base and target.base.has_weights
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
