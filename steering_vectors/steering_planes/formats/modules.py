"""Module names, `model.layers.3.input_layernorm`, as sites of a model."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from steering_planes.artifact import PlaneError
from steering_planes.base_model import BaseModel, norms_of_type
from steering_planes.sites import Site, roles

_NORM = re.compile(r"(?:^|.*\.)((?:layers|h)\.(\d{1,5})\.(\w+))", re.ASCII)


def check_modules(file: Path, modules: Collection[Any]) -> None:
    """Raise PlaneError for a name that is no norm's, or if there are none."""
    for module in modules:
        if not isinstance(module, str) or _NORM.fullmatch(module) is None:
            raise PlaneError(file, "module", module, "must end in layers.<number>.<norm>")
    if not modules:
        raise PlaneError(file, "modules", None, "there are none")


def module_sites(
    file: Path, modules: Collection[str], base: BaseModel | None, model_type: str
) -> dict[str, Site]:
    """Module name -> site, by the model's own norms; or those that its type has.

    One name has two roles: `post_attention_layernorm` feeds the MLP in Llama and follows attention
    in Gemma-2. Only for a type that transformers doesn't know do all the names of a file decide.

    Raises:
        PlaneError: a norm that the model doesn't have.
    """
    found = {module: _NORM.fullmatch(module) for module in modules}
    names = {match[3] for match in found.values() if match is not None}
    by_type: Mapping[str, str] = norms_of_type(model_type) or roles(names)
    by_name = {} if base is None else base.by_name()
    sites = {}
    for module, match in found.items():
        assert match is not None
        site = None
        if base is not None:
            site = by_name.get(match[1])
        elif (role := by_type.get(match[3])) is not None:
            site = Site(int(match[2]), role)
        if site is None:
            has = {name.split(".")[-1] for name in by_name} if base is not None else set(by_type)
            rule = f"is no norm of {model_type}, which has {', '.join(sorted(has)) or 'none known'}"
            raise PlaneError(file, "module", module, rule)
        sites[module] = site
    return sites
