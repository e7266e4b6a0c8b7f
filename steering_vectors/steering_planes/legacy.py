"""Planes that others have published, read without running any code of theirs.

    plane.pt, directions.pt   Selective Steering's artifacts: torch archives, read weights-only
    *.npy                     Angular Steering's: a pickled {module: {first_direction: array,
                              second_direction: array}}, read by an unpickler that admits arrays and
                              plain containers, and nothing else
    *.gguf                    llama.cpp's and repeng's control vectors: one direction a layer; two
                              files give the two axes

Published bases are rounded to bfloat16; they are made orthonormal again in float64. None of these
files holds the classes' raw means, so what comes of them are planes of format version 1: requests
may not ask them for add or cap.
"""

from __future__ import annotations

import io
import json
import pickle
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from steering_planes.artifact import Extraction, Mode, Plane, PlaneConfig, PlaneError
from steering_planes.geometry import orthonormalise
from steering_planes.sites import Site, roles

# What readers of pickles raise at bytes that are none.
_NOT_AN_ARCHIVE = (
    pickle.UnpicklingError,
    EOFError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    AssertionError,
)


@dataclass(frozen=True, eq=False)
class Imported:
    """Bases [2, hidden] float32 of the selected sites, and what the source says of its model."""

    bases: Mapping[Site, Tensor]
    num_layers: int
    base_model: str | None
    method: str
    data: str
    n: int


# Names of models and the type that transformers gives them, where no config is at hand.
_MODEL_TYPES = (
    ("llama", "llama"),
    ("qwen2", "qwen2"),
    ("qwen3", "qwen3"),
    ("gemma-2", "gemma2"),
    ("mistral", "mistral"),
)


def import_plane(
    sources: Sequence[Path],
    *,
    name: str,
    base_model: str | None = None,
    model_type: str | None = None,
    num_layers: int | None = None,
    sites: Sequence[Site] | None = None,
    default_mode: Mode = "rotate_by",
) -> Plane:
    """A published plane as one of ours.

    Args:
        sources: a folder or file of Selective Steering, a file of Angular Steering, or two GGUF
            files, of which the first gives b1.
        name: the plane's.
        base_model: the model it is for; what the source says unless given.
        model_type: as in the model's config.json; by the model's name unless given.
        num_layers: of the model; as many as the source names unless given.
        sites: which of them to keep; required where the source selects none.
        default_mode: of requests that name none.

    Raises:
        PlaneError: as `read`, or a model that is neither named nor known.
    """
    found = read(sources, sites)
    base = base_model or found.base_model
    if base is None:
        raise PlaneError(sources[0], "base_model", None, "the source names none: name the model")
    kind = model_type or next((kind for part, kind in _MODEL_TYPES if part in base.lower()), None)
    if kind is None:
        raise PlaneError(sources[0], "model_type", None, f"that of {base} is not known: name it")
    try:
        config = PlaneConfig(
            format_version=1,
            name=name,
            base_model_name_or_path=base,
            model_type=kind,
            hidden_size=next(iter(found.bases.values())).shape[1],
            num_layers=num_layers or found.num_layers,
            sites=tuple(found.bases),
            default_mode=default_mode,
            extraction=Extraction(method=found.method, data=found.data, n=found.n),
        )
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"])) or "config"
        raise PlaneError(sources[0], field, first["input"], first["msg"]) from None
    return Plane(config, found.bases)


def read(sources: Sequence[Path], sites: Sequence[Site] | None = None) -> Imported:
    """Read a published plane.

    Args:
        sources: a folder or file of Selective Steering, a file of Angular Steering, or two GGUF
            files, of which the first gives b1.
        sites: which of them to keep; required where the source selects none.

    Raises:
        PlaneError: a source of another kind, one that would run code, one without a selection, or
            directions that span no plane.
    """
    first = sources[0]
    if len(sources) == 2 and all(source.suffix == ".gguf" for source in sources):
        return _control_vectors(sources[0], sources[1], sites)
    if len(sources) != 1:
        raise PlaneError(first, "sources", len(sources), "must be one, or two GGUF files")
    if first.suffix == ".gguf":
        raise PlaneError(first, "sources", 1, "a control vector is one axis: name two GGUF files")
    if first.is_dir() or first.name in ("plane.pt", "directions.pt"):
        return _selective(first if first.is_dir() else first.parent, sites)
    if first.suffix == ".npy":
        return _angular(first, sites)
    raise PlaneError(
        first,
        "source",
        first.name,
        "must be a folder with plane.pt, plane.pt itself, an .npy file or two .gguf files",
    )


# Selective Steering.


def _selective(folder: Path, sites: Sequence[Site] | None) -> Imported:
    plane = _weights(folder / "plane.pt")
    extra = plane.get("extra_info") or {}
    mask = extra.get("layer_steering_mask")
    if not mask or not any(mask.values()):
        if sites is None:
            # An old bug of such artifacts' readers: no mask meant every layer.
            raise PlaneError(
                folder / "plane.pt",
                "layer_steering_mask",
                mask,
                "is missing or selects nothing; name the sites to steer",
            )
        mask = dict.fromkeys(plane.get("projections") or {}, False)
    named = _module_sites(folder / "plane.pt", mask)
    selected = sites or [site for module, site in named.items() if mask[module]]
    basis = _basis(folder / "plane.pt", torch.stack([v.double() for v in plane["basis"]]))
    config = _json(folder / "config.json")
    metadata = _json(folder / "metadata.json")
    return Imported(
        bases=dict.fromkeys(selected, basis),
        num_layers=1 + max(site.layer for site in named.values()),
        base_model=(config.get("model") or {}).get("name"),
        method="imported from Selective Steering: difference of means, one plane for all sites",
        data=f"{folder.name}/plane.pt, session {metadata.get('session_id', 'unknown')}",
        n=int(metadata.get("harmful_samples", 1)),
    )


def _weights(file: Path) -> dict[str, Any]:
    try:
        loaded = torch.load(file, weights_only=True, map_location="cpu")
    except FileNotFoundError:
        raise PlaneError(file, "file", file.name, "no such file") from None
    except (*_NOT_AN_ARCHIVE, zipfile.BadZipFile, RuntimeError) as error:
        said = str(error).partition("\n")[0] or type(error).__name__
        rule = f"must be a torch archive of tensors and plain containers: {said}"
        raise PlaneError(file, "file", file.name, rule) from None
    if not isinstance(loaded, dict) or "basis" not in loaded:
        raise PlaneError(file, "basis", None, "is missing; this is no plane.pt")
    return loaded


def _json(file: Path) -> dict[str, Any]:
    if not file.exists():
        return {}
    try:
        loaded = json.loads(file.read_bytes())
    except ValueError as error:
        raise PlaneError(file, "file", file.name, f"must be JSON: {error}") from None
    return loaded if isinstance(loaded, dict) else {}


# Angular Steering.


class _ArraysOnly(pickle.Unpickler):
    """Admits NumPy arrays; containers, numbers and strings need no admission."""

    ADMITTED = frozenset(
        {
            ("numpy", "dtype"),
            ("numpy", "ndarray"),
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ADMITTED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        # Where NumPy 2 keeps it; the old name warns.
        return super().find_class(module.replace("numpy.core.", "numpy._core."), name)


def _angular(file: Path, sites: Sequence[Site] | None) -> Imported:
    directions = _pickled(file)
    named = _module_sites(file, directions)
    if sites is None:
        raise PlaneError(file, "sites", None, "this format selects none: name the sites to steer")
    by_site = {site: directions[module] for module, site in named.items()}
    bases = {}
    for site in sites:
        if site not in by_site:
            raise PlaneError(
                file, "site", str(site), f"must be one of {', '.join(map(str, by_site))}"
            )
        pair = [by_site[site].get(key) for key in ("first_direction", "second_direction")]
        if not all(isinstance(v, np.ndarray) and v.ndim == 1 and v.dtype.kind == "f" for v in pair):
            raise PlaneError(file, f"{site}", None, "must have two directions, arrays of numbers")
        stacked = torch.stack([torch.from_numpy(v.astype(np.float64)) for v in pair])
        bases[site] = _basis(file, stacked)
    return Imported(
        bases=bases,
        num_layers=1 + max(site.layer for site in by_site),
        base_model=None,
        method="imported from Angular Steering",
        data=file.name,
        n=1,
    )


def _pickled(file: Path) -> dict[str, Any]:
    try:
        content = io.BytesIO(file.read_bytes())
        version = np.lib.format.read_magic(content)  # type: ignore[no-untyped-call]
        read_header = getattr(np.lib.format, f"read_array_header_{version[0]}_0")
        shape, _, dtype = read_header(content)
        if shape != () or dtype != np.dtype(object):
            raise pickle.UnpicklingError(f"it is an array {list(shape)} of {dtype}")
        loaded = _ArraysOnly(content).load()
        if isinstance(loaded, np.ndarray) and loaded.shape == ():
            loaded = loaded.item()
    except OSError as error:
        raise PlaneError(file, "file", file.name, error.strerror or "can't be read") from None
    except _NOT_AN_ARCHIVE as error:
        rule = f"must be a pickle of arrays and plain containers: {error}"
        raise PlaneError(file, "file", file.name, rule) from None
    if not isinstance(loaded, dict) or not all(
        isinstance(k, str) and isinstance(v, dict) for k, v in loaded.items()
    ):
        raise PlaneError(file, "file", file.name, "must be {module: {first_direction, …}}")
    return loaded


# Control vectors.


def _control_vectors(first: Path, second: Path, sites: Sequence[Site] | None) -> Imported:
    if sites is None:
        raise PlaneError(first, "sites", None, "this format selects none: name the sites to steer")
    one, other = (_directions(file) for file in (first, second))
    bases = {}
    for site in sites:
        for file, directions in ((first, one), (second, other)):
            if site.layer not in directions:
                layers = ", ".join(map(str, sorted(directions)))
                raise PlaneError(file, "site", str(site), f"must be in one of the layers {layers}")
        bases[site] = _basis(first, torch.stack([one[site.layer], other[site.layer]]))
    return Imported(
        bases=bases,
        num_layers=1 + max(*one, *other),
        base_model=None,
        method="imported from two control vectors",
        data=f"{first.name}, {second.name}",
        n=1,
    )


def _directions(file: Path) -> dict[int, Tensor]:
    """Layer -> [d] float64."""
    from gguf import GGUFReader

    try:
        tensors = GGUFReader(file).tensors
    except FileNotFoundError:
        raise PlaneError(file, "file", file.name, "no such file") from None
    except (ValueError, IndexError) as error:
        raise PlaneError(file, "file", file.name, f"must be a GGUF file: {error}") from None
    found = {}
    for tensor in tensors:
        match = re.fullmatch(r"direction\.(\d+)", tensor.name)
        if match and tensor.data.dtype.kind == "f":
            # repeng's layer i steers what leaves block i, which the next block's norm reads.
            found[int(match[1])] = torch.from_numpy(tensor.data.astype(np.float64).reshape(-1))
    if not found:
        raise PlaneError(file, "tensor", None, "must have direction.<layer> tensors of floats")
    return found


# What they share.


def _module_sites(file: Path, modules: Mapping[str, Any]) -> dict[str, Site]:
    """Module name -> site; roles go by all of the norms' names, as in a loaded model."""
    parts = {}
    for module in modules:
        match = re.search(r"(?:^|\.)(?:layers|h)\.(\d+)\.(\w+)$", module)
        if match is None:
            raise PlaneError(file, "module", module, "must end in layers.<number>.<norm>")
        parts[module] = (int(match[1]), match[2])
    if not parts:
        raise PlaneError(file, "modules", None, "there are none")
    layout = roles({name for _, name in parts.values()})
    for module, (_, name) in parts.items():
        if name not in layout:
            raise PlaneError(file, "module", module, f"{name} is no norm of a known layout")
    return {module: Site(layer, layout[name]) for module, (layer, name) in parts.items()}


def _basis(file: Path, directions: Tensor) -> Tensor:
    try:
        return orthonormalise(directions)
    except ValueError as error:
        raise PlaneError(file, "basis", list(directions.shape), str(error)) from None
