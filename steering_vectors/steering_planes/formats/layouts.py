"""Which layout a path has: the table that docs/formats.md explains, and what reads each."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steering_planes.archive import numpy_file, torch_archive
from steering_planes.artifact import CONFIG_FILE, TENSORS_FILE, PlaneError
from steering_planes.formats.angular import read_angular
from steering_planes.formats.capping import is_capping, read_capping
from steering_planes.formats.selective import read_selective
from steering_planes.formats.source import Bases, Directions
from steering_planes.formats.vectors import (
    Asked,
    read_caa,
    read_gguf,
    read_sae,
    read_safetensors,
    read_svec,
    read_torch,
)
from steering_planes.hub import SUFFIXES


@dataclass(frozen=True)
class Layout:
    """A published layout: how it looks in a file system, and whose it is."""

    looks: str
    whose: str

    def __str__(self) -> str:
        return f"{self.looks} ({self.whose})"


LAYOUTS = (
    Layout("plane.pt", "Selective Steering, or the folder that holds it"),
    Layout("steering_config.npy", "Angular Steering"),
    Layout("vector.gguf", "repeng, Dialz, EasySteer, llama.cpp"),
    Layout("vector.pt", "persona vectors, assistant axis, EasySteer, hotwire, steering-vectors"),
    Layout("vec_layer_13.pt", "CAA, or the folder that holds one a layer"),
    Layout("capping_config.pt", "assistant axis"),
    Layout("vector.svec", "IBM activation-steering, AISteer360"),
    Layout("method_weight.pt", "AxBench, with --row"),
    Layout("sae_weights.safetensors", "SAELens, Gemma Scope, with --row; or its folder"),
    Layout("vector.safetensors", "a tensor a layer, or one [layers, d]"),
)


def read(path: Path, asked: Asked) -> Bases | Directions:
    """What a file or a folder holds.

    Raises:
        PlaneError: a layout that is none of `LAYOUTS`, or one that is broken.
    """
    try:
        is_folder = path.is_dir()
    except (OSError, ValueError) as error:  # a name too long, or with a NUL in it
        raise PlaneError(str(path)[:80], "file", path.name, str(error)) from None
    if is_folder:
        return _read_folder(path, asked)
    if path.name == "plane.pt":
        return read_selective(path.parent)
    match path.suffix.lower():
        case ".gguf":
            return read_gguf(path, asked)
        case ".svec":
            return read_svec(path, asked)
        case ".safetensors":
            return read_safetensors(path, asked)
        case ".npy":
            loaded = numpy_file(path)
            if isinstance(loaded, dict):
                return read_angular(path, loaded)
            return read_torch(path, loaded, asked)
        case ".pt" | ".pth":
            return _read_torch(path, asked)
        case _:
            raise _unknown(path)


def _read_torch(path: Path, asked: Asked) -> Bases | Directions:
    loaded: Any = torch_archive(path)
    if is_capping(loaded):
        return read_capping(path, loaded, asked)
    if isinstance(loaded, dict) and ("basis" in loaded or {"b1", "b2"} <= loaded.keys()):
        rule = "Selective Steering's plane is read with its folder: name it plane.pt"
        raise PlaneError(path, "file", path.name, rule)
    return read_torch(path, loaded, asked)


def _read_folder(folder: Path, asked: Asked) -> Bases | Directions:
    if (folder / "plane.pt").exists():
        return read_selective(folder)
    if (folder / CONFIG_FILE).exists() and (folder / TENSORS_FILE).exists():
        rule = "is a steering plane already: serve it as it is"
        raise PlaneError(folder, "source", folder.name, rule)
    if (sae := folder / "sae_weights.safetensors").exists():
        return read_sae(sae, asked)
    if files := sorted(folder.glob("vec_layer_*.pt")):
        return read_caa(folder, files, asked)
    suffixes = set(SUFFIXES) - {".json"}
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in suffixes)
    if len(files) == 1:
        return read(files[0], asked)
    if files:
        names = ", ".join(file.name for file in files[:12]) + (", …" if len(files) > 12 else "")
        raise PlaneError(folder, "source", folder.name, f"holds several: name one of {names}")
    raise _unknown(folder)


def _unknown(path: Path) -> PlaneError:
    if not path.exists():
        return PlaneError(path, "file", path.name, "no such file")
    holds = [path.name, *(file.name for file in path.iterdir())] if path.is_dir() else [path.name]
    nearest = max(
        LAYOUTS,
        key=lambda layout: max(
            difflib.SequenceMatcher(None, layout.looks, name).ratio() for name in holds
        ),
    )
    known = "; ".join(map(str, LAYOUTS))
    rule = f"is of no known layout; the nearest is {nearest}. Known are: {known}"
    return PlaneError(path, "source", path.name, rule)
