"""The assistant axis's capping_config.pt (Lu et al., arXiv 2601.10387).

vectors      {name: {vector: [d], layer: L}}, at the output of block L
experiments  [{id, interventions: [{vector: name, cap: the projection's upper bound}]}]
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from steering_planes.artifact import PlaneError
from steering_planes.formats.source import Directions, Facts
from steering_planes.formats.vectors import Asked, check_alike, one_direction


def is_capping(loaded: Any) -> bool:
    return isinstance(loaded, dict) and {"vectors", "experiments"} <= loaded.keys()


def read_capping(file: Path, loaded: Mapping[str, Any], asked: Asked) -> Directions:
    """One experiment's directions and caps; raises PlaneError."""
    if asked.rows:
        raise PlaneError(file, "row", list(asked.rows), "an experiment has one direction a layer")
    vectors, experiments = loaded["vectors"], loaded["experiments"]
    if not isinstance(vectors, dict) or not isinstance(experiments, list):
        raise PlaneError(file, "experiments", None, "must be a list, beside a mapping of vectors")
    by_id = {str(e["id"]): e for e in experiments if isinstance(e, dict) and "id" in e}
    if (asked.experiment is None and len(by_id) != 1) or asked.experiment not in (None, *by_id):
        rule = f"must be one of {', '.join(by_id) or 'none'} (--experiment)"
        raise PlaneError(file, "experiment", asked.experiment, rule)
    name = asked.experiment or next(iter(by_id))
    interventions = by_id[name].get("interventions")
    if not isinstance(interventions, list) or not interventions:
        raise PlaneError(file, f"{name}.interventions", None, "must be a list of {vector, cap}")
    by_index: dict[int, Tensor] = {}
    caps: dict[int, float] = {}
    for i, intervention in enumerate(interventions):
        place = f"{name}.interventions.{i}"
        layer, vector, cap = _intervention(file, place, intervention, vectors)
        if layer in by_index:
            rule = f"a second cap at layer {layer}: a plane holds one"
            raise PlaneError(file, place, intervention.get("vector"), rule)
        by_index[layer], caps[layer] = one_direction(file, f"{place}.vector", vector), cap
        if not bool(by_index[layer].any()):
            raise PlaneError(file, f"{place}.vector", 0.0, "must not be zero")
    check_alike(file, by_index)
    facts = Facts(
        file=file,
        method=f"imported activation capping: {name}",
        data=file.name,
        default_mode="cap",
        default_angle=0.0,
        default_strength=1.0,
    )
    index, space = asked.index or "block-output", asked.space or "residual"
    keyed: dict[int | None, Tensor] = dict(by_index.items())
    return Directions(facts, keyed, index, space, caps, steers_all=True)


def _intervention(
    file: Path, place: str, intervention: Any, vectors: Mapping[str, Any]
) -> tuple[int, Any, float]:
    if not isinstance(intervention, dict) or not {"vector", "cap"} <= intervention.keys():
        raise PlaneError(file, place, None, "must be {vector, cap}")
    name, cap = intervention["vector"], intervention["cap"]
    entry = vectors.get(name) if isinstance(name, str) else None
    if not isinstance(entry, dict) or not {"vector", "layer"} <= entry.keys():
        raise PlaneError(file, f"{place}.vector", name, "must name one of {vector, layer}")
    layer = entry["layer"]
    if not isinstance(layer, int) or isinstance(layer, bool) or not 0 <= layer < 100_000:
        raise PlaneError(file, f"vectors.{name}.layer", layer, "must be a layer's number")
    if not isinstance(cap, int | float) or isinstance(cap, bool) or not math.isfinite(cap):
        raise PlaneError(file, f"{place}.cap", cap, "must be a finite number")
    return layer, entry["vector"], float(cap)
