"""The plane artifact: a folder with steering_config.json and steering_plane.safetensors.

    steering_config.json        PlaneConfig
    steering_plane.safetensors  layers.<i>.<role>.basis, [2, hidden] float32, one per site; the
                                header's metadata repeats format_version, base model and digest
    README.md                   a model card, not read back

Nothing here unpickles.
"""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from steering_planes.geometry import orthonormality_error
from steering_planes.sites import Site

FORMAT_VERSION = 1
CONFIG_FILE = "steering_config.json"
TENSORS_FILE = "steering_plane.safetensors"
ANGLE_CONVENTION = "degrees; 0 points along b1 (the positive class), growing from b1 toward b2"
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
ORTHONORMALITY = 1e-5

Mode = Literal["rotate_by", "rotate_to"]
Text = Annotated[str, Field(min_length=1)]


class PlaneError(ValueError):
    """A plane that can't be used, said in one line: where, field, value and rule.

    Each part is an attribute too; `value` is already text and cut to a readable length.
    """

    def __init__(self, where: object, field: str, value: object, rule: str) -> None:
        self.where = " ".join(str(where).split())
        self.field = field
        self.value = _short(value)
        self.rule = " ".join(rule.split())
        super().__init__(f"{self.where}: {field}={self.value}: {self.rule}")


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Extraction(_Model):
    """How a plane was found: enough to find it again."""

    method: Text
    data: Text
    n: Annotated[int, Field(ge=1)]
    """Examples on each side."""
    seed: int | None = None
    chat_template_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None


class PlaneConfig(_Model):
    """steering_config.json; DESIGN.md's "Artifact".

    `sites` are the selected ones, kept sorted. `default_angle` is in degrees, None for no default.
    `gate` steers only tokens with c1 > gate, None for all. `statistics` maps a site's name
    ("18.attn_in"), selected or not, to named numbers.
    """

    format_version: Literal[1] = 1
    name: Annotated[str, Field(pattern=NAME_PATTERN)]
    base_model_name_or_path: Text
    revision: Text | None = None
    model_type: Text
    hidden_size: Annotated[int, Field(ge=2)]
    num_layers: Annotated[int, Field(ge=1)]
    sites: Annotated[tuple[Site, ...], Field(min_length=1)]
    default_mode: Mode = "rotate_by"
    default_angle: Annotated[float, Field(ge=-360, le=360)] | None = None
    angle_convention: Text = ANGLE_CONVENTION
    gate: float | None = None
    extraction: Extraction
    statistics: dict[str, dict[str, float]] = Field(default_factory=dict)

    @field_validator("sites")
    @classmethod
    def _sorted_and_distinct(cls, sites: tuple[Site, ...]) -> tuple[Site, ...]:
        if len(set(sites)) != len(sites):
            raise ValueError("a site appears once")
        return tuple(sorted(sites))

    @model_validator(mode="after")
    def _sites_within_the_model(self) -> Self:
        for site in (*self.sites, *map(Site.parse, self.statistics)):
            if site.layer >= self.num_layers:
                raise ValueError(f"site {site} is outside a model of {self.num_layers} layers")
        return self


def tensor_name(site: Site) -> str:
    """The site's key in the safetensors file, `layers.18.attn_in.basis`."""
    return f"layers.{site.layer}.{site.role}.basis"


@dataclass(frozen=True, eq=False)
class Plane:
    """A named steering plane: its config and an orthonormal basis [2, hidden] float32 per site.

    Raises PlaneError if the bases don't fit the config, aren't finite or are off from orthonormal
    by more than 1e-5. Two planes are the same plane if their digests are equal.
    """

    config: PlaneConfig
    bases: Mapping[Site, Tensor]

    def __post_init__(self) -> None:
        _check_bases(self.config, self.bases)
        bases = {site: self.bases[site].detach().cpu().clone() for site in self.config.sites}
        object.__setattr__(self, "bases", MappingProxyType(bases))

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def sites(self) -> tuple[Site, ...]:
        """The selected sites, sorted."""
        return self.config.sites

    @cached_property
    def digest(self) -> str:
        """SHA-256, 64 hex digits, over the canonical config and the tensors' bytes."""
        sha = hashlib.sha256(
            json.dumps(
                self.config.model_dump(mode="json"), sort_keys=True, separators=(",", ":")
            ).encode()
        )
        for site in self.sites:
            sha.update(f"\n{tensor_name(site)}\n".encode())
            sha.update(self.bases[site].numpy().astype("<f4").tobytes())
        return sha.hexdigest()

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read and check an artifact folder; raises PlaneError for everything wrong with it."""
        if not path.is_dir():
            raise PlaneError(path, "path", str(path), "must be a folder holding a steering plane")
        config = _read_config(path / CONFIG_FILE)
        file = path / TENSORS_FILE
        tensors, metadata = _read_tensors(file)
        expected = {tensor_name(site): site for site in config.sites}
        for name in sorted(expected.keys() - tensors.keys()):
            raise PlaneError(file, "tensor", name, f"is missing; {CONFIG_FILE} lists its site")
        for name in sorted(tensors.keys() - expected.keys()):
            raise PlaneError(file, "tensor", name, f"belongs to no site in {CONFIG_FILE}")
        try:
            plane = cls(config, {site: tensors[name] for name, site in expected.items()})
        except PlaneError as error:
            raise PlaneError(file, error.field, error.value, error.rule) from None
        for key, value in plane._metadata().items():
            if metadata.get(key) != value:
                raise PlaneError(
                    file, f"metadata.{key}", metadata.get(key), f"must be {value!r}, as configured"
                )
        return plane

    def save(
        self,
        path: Path,
        *,
        readme: str | None = None,
        beside: Mapping[str, bytes] | None = None,
        overwrite: bool = False,
    ) -> None:
        """Write the artifact folder, all of it or nothing.

        `beside` are further files, by name. Raises FileExistsError if `path` exists, unless
        `overwrite`.
        """
        path = Path(os.path.abspath(path))
        if path.exists() and not overwrite:
            raise FileExistsError(f"{path}: exists; a plane is never written over another unasked")
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as temporary:
            new = Path(temporary) / "new"
            new.mkdir()  # unlike the temporary folder itself, with the umask's permissions
            (new / CONFIG_FILE).write_text(self.config.model_dump_json(indent=2) + "\n", "utf-8")
            save_file(
                {tensor_name(site): basis for site, basis in self.bases.items()},
                new / TENSORS_FILE,
                metadata=self._metadata(),
            )
            # safetensors writes 0600, which a container's other user can't read.
            (new / TENSORS_FILE).chmod((new / CONFIG_FILE).stat().st_mode)
            if readme is not None:
                (new / "README.md").write_text(readme, "utf-8")
            for name, content in (beside or {}).items():
                (new / name).write_bytes(content)
            old = Path(temporary) / "old"
            if overwrite and path.exists():
                path.rename(old)
            try:
                new.rename(path)
            except OSError:
                if old.exists():
                    old.rename(path)
                raise

    def check_model(
        self,
        *,
        hidden_size: int,
        num_layers: int,
        model_type: str,
        name_or_path: str,
        allow_mismatch: bool = False,
    ) -> None:
        """Raise PlaneError unless the plane was made for this model.

        `hidden_size` and `num_layers` must always be equal. `model_type` and the model's name must
        be too unless `allow_mismatch`. Names are compared by `model_names`: it is enough that one
        name the served model goes by is one of the base model's, so a copy in a local folder
        of the same name passes and a fine-tune under another name doesn't.
        """
        where = f"plane {self.name}"
        wanted: tuple[tuple[str, int, int], ...] = (
            ("hidden_size", hidden_size, self.config.hidden_size),
            ("num_layers", num_layers, self.config.num_layers),
        )
        for field, served, planned in wanted:
            if served != planned:
                raise PlaneError(where, field, served, f"must be {planned}, the plane's base model")
        if allow_mismatch:
            return
        if model_type != self.config.model_type:
            raise PlaneError(
                where,
                "model_type",
                model_type,
                f"must be {self.config.model_type!r}, the plane's base model, unless a mismatch is "
                "allowed",
            )
        base = self.config.base_model_name_or_path
        if not model_names(name_or_path) & model_names(base):
            raise PlaneError(
                where,
                "base_model_name_or_path",
                name_or_path,
                f"must be {base!r}, the plane's base model, unless a mismatch is allowed",
            )

    def _metadata(self) -> dict[str, str]:
        return {
            "format_version": str(self.config.format_version),
            "base_model_name_or_path": self.config.base_model_name_or_path,
            "digest": self.digest,
        }


def model_names(name_or_path: str) -> frozenset[str]:
    """The lower-case names by which a model is known, without organisation or folder.

    They are the last component of the name or path; in a Hugging Face cache path
    (`models--org--name/snapshots/<hash>`) the repository's name; and for a local folder also the
    last component of `_name_or_path` in its config.json.
    """
    parts = [part for part in re.split(r"[/\\]", name_or_path) if part not in ("", ".")]
    names = set(parts[-1:])
    names |= {part.rsplit("--", 1)[-1] for part in parts if part.startswith("models--")}
    try:
        config = json.loads((Path(name_or_path) / "config.json").read_bytes())
    except (OSError, ValueError):
        config = None  # a repository's name, or a folder whose fault the model loader reports
    origin = config.get("_name_or_path") if isinstance(config, dict) else None
    if isinstance(origin, str):
        names |= set(origin.rstrip("/").split("/")[-1:])
    return frozenset(name.lower() for name in names if name)


def _read_config(file: Path) -> PlaneConfig:
    try:
        text = file.read_bytes()
    except OSError as error:
        raise PlaneError(file, "file", file.name, error.strerror or "can't be read") from None
    try:
        return PlaneConfig.model_validate_json(text)
    except ValidationError as error:
        first, *others = error.errors(include_url=False)
        field = ".".join(map(str, first["loc"])) or "config"
        value = first["input"]
        if first["type"] == "missing" or isinstance(value, bytes):
            value = None
        elif field == "config" and isinstance(value, dict):
            value = value.get("name")
        more = f" (and {len(others)} more)" if others else ""
        raise PlaneError(file, field, value, first["msg"] + more) from None


def _read_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            return tensors, opened.metadata() or {}
    except OSError as error:
        rule = error.strerror or "no such file, or it can't be read"
        raise PlaneError(file, "file", file.name, rule) from None
    except SafetensorError as error:
        rule = f"must be a whole safetensors file: {error}"
        raise PlaneError(file, "file", file.name, rule) from None


def _check_bases(config: PlaneConfig, bases: Mapping[Site, Tensor]) -> None:
    where = f"plane {config.name}"
    if bases.keys() != set(config.sites):
        raise PlaneError(
            where,
            "bases",
            ", ".join(map(str, sorted(bases))),
            f"must be one basis for each of {', '.join(map(str, config.sites))}",
        )
    for site in config.sites:
        field, basis = tensor_name(site), bases[site]
        if basis.dtype != torch.float32:
            raise PlaneError(where, f"{field}.dtype", basis.dtype, "must be torch.float32")
        if basis.shape != (2, config.hidden_size):
            rule = f"must be [2, {config.hidden_size}], two rows of hidden_size"
            raise PlaneError(where, f"{field}.shape", list(basis.shape), rule)
        if not bool(basis.isfinite().all()):
            bad = basis[~basis.isfinite()][0].item()
            raise PlaneError(where, field, bad, "must be finite")
        off = orthonormality_error(basis)
        if off > ORTHONORMALITY:
            rule = f"must be orthonormal: max |B B^T - I| is at most {ORTHONORMALITY:g}"
            raise PlaneError(where, field, f"{off:.1e}", rule)


def _short(value: Any) -> str:
    text = value if isinstance(value, str) and value.isprintable() else repr(value)
    return text if len(text) <= 120 else text[:117] + "..."
