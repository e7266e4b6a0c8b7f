"""Module names, `model.layers.3.input_layernorm`, as sites."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from steering_planes.artifact import PlaneError
from steering_planes.sites import Site, roles


def module_sites(file: Path, modules: Collection[Any]) -> dict[str, Site]:
    """Module name -> site; roles go by all of the norms' names, as in a loaded model.

    Raises PlaneError for a name that is no norm's.
    """
    parts = {}
    for module in modules:
        match = re.search(r"(?:^|\.)(?:layers|h)\.(\d{1,5})\.(\w+)$", str(module), re.ASCII)
        if match is None or not isinstance(module, str):
            raise PlaneError(file, "module", module, "must end in layers.<number>.<norm>")
        parts[module] = (int(match[1]), match[2])
    if not parts:
        raise PlaneError(file, "modules", None, "there are none")
    layout = roles({name for _, name in parts.values()})
    for module, (_, name) in parts.items():
        if name not in layout:
            raise PlaneError(file, "module", module, f"{name} is no norm of a known layout")
    return {module: Site(layer, layout[name]) for module, (layer, name) in parts.items()}
