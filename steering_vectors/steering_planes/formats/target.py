"""The model that a plane is imported for, as its config says or as it was told; never guessed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from steering_planes.artifact import PlaneError
from steering_planes.base_model import BaseModel
from steering_planes.formats.source import Facts


@dataclass(frozen=True)
class Target:
    """The model that a plane is for: as its config says, or as it was told."""

    name: str
    model_type: str
    num_layers: int
    base: BaseModel | None


def target_of(
    facts: Facts,
    base_model: str | None,
    opened: BaseModel | None,
    model_type: str | None,
    num_layers: int | None,
) -> Target:
    """What a config says, or what was told; raises PlaneError where neither does, or they differ.

    Args:
        base_model: a folder, a repository in the Hub's cache, or a mere name.
        opened: it, where it has a config.
    """
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
        return Target(wanted, model_type, num_layers, None)
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
    return Target(wanted, opened.model_type, opened.num_layers, opened)
