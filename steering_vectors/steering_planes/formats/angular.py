"""Angular Steering's planes: a .npy that pickles {module: {first_direction, second_direction}}."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from steering_planes.archive import rows
from steering_planes.artifact import PlaneError
from steering_planes.formats.modules import check_modules
from steering_planes.formats.source import Bases, Facts

_AXES = ("first_direction", "second_direction")


def read_angular(file: Path, directions: Any) -> Bases:
    """The planes in what was unpickled; raises PlaneError."""
    if not isinstance(directions, dict) or not all(
        isinstance(v, dict) for v in directions.values()
    ):
        rule = "must be {module: {first_direction, second_direction}}"
        raise PlaneError(file, "file", type(directions).__name__, rule)
    check_modules(file, directions)
    by_module = {}
    for module in directions:
        pair = []
        for axis in _AXES:
            if axis not in directions[module]:
                raise PlaneError(file, f"{module}.{axis}", None, "is missing")
            pair.append(rows(file, f"{module}.{axis}", directions[module][axis]))
            if pair[-1].shape != (1, pair[0].shape[1]):
                rule = f"must be [{pair[0].shape[1]}]"
                raise PlaneError(file, f"{module}.{axis}.shape", list(pair[-1].shape), rule)
        by_module[module] = torch.cat(pair)
    facts = Facts(
        file=file,
        method="imported from Angular Steering",
        data=file.name,
        default_mode="rotate_to",
    )
    return Bases(facts, by_module)
