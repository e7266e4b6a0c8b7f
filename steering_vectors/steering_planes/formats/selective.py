"""Selective Steering's calibrations: a folder of plane.pt, config.json and metadata.json.

    plane.pt  basis: (b1, b2), or {b1, b2}, or b1 and b2 beside it; bfloat16 [d] or [1, d]
              projections: {module: (x, y)}; plane_type
              extra_info: target_layers, layer_steering_mask {module: bool}

A mask selects (`selective`). The other modes, `standard` and `adaptive`, steer all target layers to
an absolute angle, the latter where c1 exceeds config.json's threshold.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steering_planes.archive import optional_json, rows, torch_archive
from steering_planes.artifact import PlaneError
from steering_planes.formats.modules import check_modules
from steering_planes.formats.source import Bases, Facts

_ABSOLUTE = ("standard", "adaptive")


def read_selective(folder: Path) -> Bases:
    """The plane in a folder; raises PlaneError."""
    file = folder / "plane.pt"
    plane = torch_archive(file)
    if not isinstance(plane, dict) or not ("basis" in plane or {"b1", "b2"} <= plane.keys()):
        raise PlaneError(file, "basis", None, "is missing; this is no plane.pt")
    basis = _basis(file, plane)
    config = optional_json(folder / "config.json")
    steering = _section(folder / "config.json", config, "steering")
    mode = _mode(folder, plane, steering)
    modules, selected, why = _selection(file, plane, mode)
    metadata = optional_json(folder / "metadata.json")
    n = metadata.get("harmful_samples")
    base = _section(folder / "config.json", config, "model").get("name")
    return Bases(
        Facts(
            file=file,
            method="imported from Selective Steering: difference of means, one plane for all sites",
            data=f"{folder.name}/plane.pt, session {metadata.get('session_id', 'unknown')}",
            n=n if isinstance(n, int) and n > 0 else 1,
            base_model=base if isinstance(base, str) and base else None,
            default_mode="rotate_to" if mode in _ABSOLUTE else "rotate_by",
            gate=_threshold(folder, steering) if mode == "adaptive" else None,
        ),
        dict.fromkeys(modules, basis),
        selected,
        why,
    )


def _basis(file: Path, plane: Mapping[str, Any]) -> Tensor:
    found = plane.get("basis", plane)
    if isinstance(found, dict):
        if not {"b1", "b2"} <= found.keys():
            raise PlaneError(file, "basis", sorted(map(str, found)), "must be (b1, b2) or {b1, b2}")
        found = (found["b1"], found["b2"])
    if not isinstance(found, tuple | list) or len(found) != 2:
        raise PlaneError(file, "basis", type(found).__name__, "must be (b1, b2) or {b1, b2}")
    pair = [rows(file, f"basis.b{k}", vector) for k, vector in enumerate(found, 1)]
    for k, vector in enumerate(pair, 1):
        if vector.shape != (1, pair[0].shape[1]):
            rule = f"must be [{pair[0].shape[1]}]"
            raise PlaneError(file, f"basis.b{k}.shape", list(vector.shape), rule)
    return torch.cat(pair)


def _selection(
    file: Path, plane: Mapping[str, Any], mode: Any
) -> tuple[list[str], tuple[str, ...] | None, str]:
    """(all modules that it names, the selected ones, why there are none)."""
    extra = _section(file, plane, "extra_info")
    mask = _section(file, extra, "layer_steering_mask")
    targets = extra.get("target_layers")
    if targets is not None and not isinstance(targets, list | tuple):
        raise PlaneError(file, "target_layers", type(targets).__name__, "must be a list")
    projections = list(_section(file, plane, "projections"))
    named = [*mask, *(targets or ()), *projections]
    check_modules(file, named)
    modules = list(dict.fromkeys(named))
    if any(value is True for value in mask.values()):
        return modules, tuple(name for name, on in mask.items() if on is True), ""
    if not mask and mode in _ABSOLUTE:
        return modules, tuple(targets or projections), ""
    # An old bug of such artifacts' readers: no mask meant every layer.
    return modules, None, f"layer_steering_mask is missing or selects nothing, and mode is {mode!r}"


def _mode(folder: Path, plane: Mapping[str, Any], steering: Mapping[str, Any]) -> Any:
    """config.json's: some plane.pt say "adaptive" whatever they are."""
    mode, kind = steering.get("mode"), plane.get("plane_type")
    if mode is None and kind in _ABSOLUTE:
        rule = "says the mode and its threshold, and is missing beside plane.pt"
        raise PlaneError(folder / "config.json", "steering.mode", None, rule)
    return mode or kind


def _threshold(folder: Path, steering: Mapping[str, Any]) -> float:
    value = steering.get("threshold")
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise PlaneError(folder / "config.json", "steering.threshold", value, "must be a number")
    return float(value)


def _section(file: Path, of: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = of.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise PlaneError(file, key, type(value).__name__, "must be a mapping")
    return value
