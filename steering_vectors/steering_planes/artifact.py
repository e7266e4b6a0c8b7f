"""The plane artifact: a folder with steering_config.json and steering_plane.safetensors.

    steering_config.json        PlaneConfig
    steering_plane.safetensors  float32; for each site
                                    layers.<i>.<role>.basis  [2, hidden]: b1, b2
                                    layers.<i>.<role>.means  [2, 2]: the positive class's mean
                                        activation, then the negative one's; columns c1, c2
                                    layers.<i>.<role>.rho    [1]: the distance of those means
                                the header's metadata repeats format_version, base model and digest
    README.md                   a model card, not read back

Means and rho are of raw activations, not of unit-normalised ones, so that METHOD.md 2b's operations
can be said in classes: add moves by s * rho, cap holds a coordinate to a place between the classes'
means. Format version 1 has bases only, and such a plane takes no add and no cap; everything else
about it is as in version 2.

The digest is SHA-256 over the canonical config (JSON: sorted keys, no spaces; `default_strength`
and `fingerprint` left out where they are null), then, site after site, over basis, means and rho: a
newline, the tensor's name, a newline, its bytes, little-endian.

Nothing here unpickles.
"""

import hashlib
import json
import math
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Final, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from steering_planes import fingerprint
from steering_planes.geometry import orthonormality_error
from steering_planes.sites import Site

FORMAT_VERSION: Final = 2
CONFIG_FILE = "steering_config.json"
TENSORS_FILE = "steering_plane.safetensors"
ANGLE_CONVENTION = "degrees; 0 points along b1 (the positive class), growing from b1 toward b2"
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
ORTHONORMALITY = 1e-5

Mode = Literal["rotate_by", "rotate_to", "add", "ablate", "cap"]
STRENGTHS: Mapping[str, tuple[float, float]] = MappingProxyType(
    {"add": (-1000.0, 1000.0), "ablate": (0.0, 1.0), "cap": (-1000.0, 1000.0)}
)
"""From the least to the greatest strength of each operation that takes one."""

Part = Literal["basis", "means", "rho"]
Text = Annotated[str, Field(min_length=1)]
Gain = Annotated[
    tuple[float, ...],
    Field(min_length=1 + fingerprint.SUMS, max_length=1 + fingerprint.SUMS),
]


class PlaneError(ValueError):
    """A plane that can't be used, said in one line: where, field, value and rule.

    Each part is an attribute too; `value` is already text and cut to a readable length.
    """

    def __init__(self, where: object, field: str, value: object, rule: str) -> None:
        self.where = one_line(str(where))
        self.field = one_line(field)
        self.value = _short(value)
        self.rule = one_line(rule)
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
    ("18.attn_in"), selected or not, to named numbers. `format_version` 1 has no class means.
    `default_strength` is of requests that name neither mode nor strength. `fingerprint` is of the
    base model's gains (:mod:`steering_planes.fingerprint`), None where they were not at hand.
    """

    format_version: Literal[1, 2] = FORMAT_VERSION
    name: Annotated[str, Field(pattern=NAME_PATTERN)]
    base_model_name_or_path: Text
    revision: Text | None = None
    model_type: Text
    hidden_size: Annotated[int, Field(ge=2)]
    num_layers: Annotated[int, Field(ge=1)]
    sites: Annotated[tuple[Site, ...], Field(min_length=1)]
    default_mode: Mode = "rotate_by"
    default_angle: Annotated[float, Field(ge=-360, le=360)] | None = None
    default_strength: float | None = None
    angle_convention: Text = ANGLE_CONVENTION
    gate: float | None = None
    extraction: Extraction
    statistics: dict[str, dict[str, float]] = Field(default_factory=dict)
    fingerprint: Annotated[dict[str, Gain], Field(min_length=1)] | None = None

    @field_validator("sites")
    @classmethod
    def _sorted_and_distinct(cls, sites: tuple[Site, ...]) -> tuple[Site, ...]:
        if len(set(sites)) != len(sites):
            raise ValueError("a site appears once")
        return tuple(sorted(sites))

    @model_validator(mode="after")
    def _sites_within_the_model(self) -> Self:
        described = (*self.statistics, *(self.fingerprint or ()))
        for site in (*self.sites, *map(Site.parse, described)):
            if site.layer >= self.num_layers:
                raise ValueError(f"site {site} is outside a model of {self.num_layers} layers")
        return self

    @model_validator(mode="after")
    def _strength_of_the_mode(self) -> Self:
        least, most = STRENGTHS.get(self.default_mode, (0.0, 0.0))
        if self.default_strength is not None:
            if self.default_mode not in STRENGTHS:
                raise ValueError(f"{self.default_mode} takes no strength")
            if not least <= self.default_strength <= most:
                raise ValueError(f"default_strength must be between {least:g} and {most:g}")
        return self

    def canonical(self) -> dict[str, Any]:
        """As plain values; fields that came later only where they say something."""
        later = {
            name for name in ("default_strength", "fingerprint") if getattr(self, name) is None
        }
        return self.model_dump(mode="json", exclude=later)


def tensor_name(site: Site, part: Part = "basis") -> str:
    """A key of the site's in the safetensors file, `layers.18.attn_in.basis`."""
    return f"layers.{site.layer}.{site.role}.{part}"


@dataclass(frozen=True)
class ClassMeans:
    """Where the two classes lie in a site's plane, in the activations' own units.

    positive: (c1, c2) of the positive class's raw mean activation, mean(x_pos) @ b1 and @ b2.
    negative: the negative class's.
    rho: |mean(x_pos) - mean(x_neg)| > 0, of the whole activations.

    All are rounded to float32 when made, so that a file gives back what it was given.
    """

    positive: tuple[float, float]
    negative: tuple[float, float]
    rho: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "positive", _rounded(*self.positive))
        object.__setattr__(self, "negative", _rounded(*self.negative))
        object.__setattr__(self, "rho", *_rounded(self.rho))


@dataclass(frozen=True, eq=False)
class Plane:
    """A named steering plane: its config and an orthonormal basis [2, hidden] float32 per site.

    `means` are the classes' at each site; None exactly for format version 1.

    Raises PlaneError if the bases don't fit the config, aren't finite or are off from orthonormal
    by more than 1e-5, or if the means don't fit the config, aren't finite or have a rho of 0 or
    less. Two planes are the same plane if their digests are equal.
    """

    config: PlaneConfig
    bases: Mapping[Site, Tensor]
    means: Mapping[Site, ClassMeans] | None = None

    def __post_init__(self) -> None:
        _check_bases(self.config, self.bases)
        _check_means(self.config, self.means)
        if self.config.default_mode not in self.modes:
            rule = f"must be one of {', '.join(self.modes)}: the plane has no class means"
            mode = self.config.default_mode
            raise PlaneError(f"plane {self.config.name}", "default_mode", mode, rule)
        bases = {site: self.bases[site].detach().cpu().clone() for site in self.config.sites}
        object.__setattr__(self, "bases", MappingProxyType(bases))
        if self.means is not None:
            means = {site: self.means[site] for site in self.config.sites}
            object.__setattr__(self, "means", MappingProxyType(means))

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def sites(self) -> tuple[Site, ...]:
        """The selected sites, sorted."""
        return self.config.sites

    @property
    def modes(self) -> tuple[str, ...]:
        """The operations that requests may ask of it: METHOD.md 2 and 2b."""
        if self.means is None:
            return ("rotate_by", "rotate_to", "ablate")
        return ("rotate_by", "rotate_to", "add", "ablate", "cap")

    @cached_property
    def digest(self) -> str:
        """SHA-256, 64 hex digits, over the canonical config and the tensors' bytes in order."""
        sha = hashlib.sha256(
            json.dumps(self.config.canonical(), sort_keys=True, separators=(",", ":")).encode()
        )
        for name, tensor in self._tensors().items():
            sha.update(f"\n{name}\n".encode())
            sha.update(tensor.numpy().astype("<f4").tobytes())
        return sha.hexdigest()

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read and check an artifact folder; raises PlaneError for everything wrong with it."""
        if not path.is_dir():
            raise PlaneError(path, "path", str(path), "must be a folder holding a steering plane")
        config = _read_config(path / CONFIG_FILE)
        file = path / TENSORS_FILE
        tensors, metadata = _read_tensors(file)
        expected = {tensor_name(site, part) for site in config.sites for part in _parts(config)}
        for name in sorted(expected - tensors.keys()):
            raise PlaneError(file, "tensor", name, f"is missing; {CONFIG_FILE} lists its site")
        for name in sorted(tensors.keys() - expected):
            rule = f"belongs to no site in {CONFIG_FILE}, format_version {config.format_version}"
            raise PlaneError(file, "tensor", name, rule)
        try:
            bases = {site: tensors[tensor_name(site)] for site in config.sites}
            plane = cls(config, bases, _means(config, tensors))
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
            config = json.dumps(self.config.canonical(), indent=2, ensure_ascii=False)
            (new / CONFIG_FILE).write_text(config + "\n", "utf-8")
            save_file(
                self._tensors(),
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
        """Raise PlaneError unless the plane was made for this model, as far as configs say.

        `hidden_size` and `num_layers` must always be equal. `model_type` must be too unless
        `allow_mismatch`, and of a plane without a fingerprint the model's name. Names are compared
        by `model_names`: it is enough that one name the served model goes by is one of the base
        model's, so a copy in a local folder of the same name passes and a fine-tune under another
        name doesn't. A fingerprint says more than a name: see `check_weights`.
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
        if self.config.fingerprint is None and not model_names(name_or_path) & model_names(base):
            raise PlaneError(
                where,
                "base_model_name_or_path",
                name_or_path,
                f"must be {base!r}, the plane's base model, unless a mismatch is allowed",
            )

    def check_weights(self, served: fingerprint.Fingerprint, dtype: torch.dtype) -> None:
        """Raise PlaneError unless the gains that a model was loaded with are the base model's.

        Of a pipeline's stage, those that it has. A plane without a fingerprint passes: it goes by
        its model's name.
        """
        half = dtype == torch.float16
        tolerance = fingerprint.HALF_TOLERANCE if half else fingerprint.TOLERANCE
        if self.config.fingerprint is None or not served:
            return  # a stage without norms
        apart = fingerprint.distance(self.config.fingerprint, served)
        if apart is None or apart > tolerance:
            raise PlaneError(
                f"plane {self.name}",
                "fingerprint",
                "no norm in common" if apart is None else f"{apart:.2g}",
                f"the served model's norms differ from those of "
                f"{self.config.base_model_name_or_path}, the plane's base model, by more than "
                f"{tolerance:.2g} of their size: another model or fine-tune, unless a "
                "mismatch is allowed",
            )

    def _tensors(self) -> dict[str, Tensor]:
        """What the safetensors file holds, in the digest's order."""
        tensors = {}
        for site, basis in self.bases.items():
            tensors[tensor_name(site)] = basis
            if self.means is not None:
                of = self.means[site]
                tensors[tensor_name(site, "means")] = _float32([of.positive, of.negative])
                tensors[tensor_name(site, "rho")] = _float32([of.rho])
        return tensors

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
        config = PlaneConfig.model_validate_json(text)
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
    # A file that names no version is of the first: only in Python is the newest the default.
    unsaid = "format_version" not in config.model_fields_set
    return config.model_copy(update={"format_version": 1}) if unsaid else config


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
        _check_tensor(where, field, basis, (2, config.hidden_size))
        if not bool(basis.isfinite().all()):
            bad = basis[~basis.isfinite()][0].item()
            raise PlaneError(where, field, bad, "must be finite")
        off = orthonormality_error(basis)
        if off > ORTHONORMALITY:
            rule = f"must be orthonormal: max |B B^T - I| is at most {ORTHONORMALITY:g}"
            raise PlaneError(where, field, f"{off:.1e}", rule)


def _check_tensor(where: str, field: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.dtype != torch.float32:
        raise PlaneError(where, f"{field}.dtype", tensor.dtype, "must be torch.float32")
    if tensor.shape != shape:
        raise PlaneError(where, f"{field}.shape", list(tensor.shape), f"must be {list(shape)}")


def _parts(config: PlaneConfig) -> tuple[Part, ...]:
    """What a site has in the safetensors file."""
    return ("basis",) if config.format_version == 1 else ("basis", "means", "rho")


def _means(config: PlaneConfig, tensors: Mapping[str, Tensor]) -> dict[Site, ClassMeans] | None:
    """The class means among a file's tensors, of which none is missing."""
    if config.format_version == 1:
        return None
    where, found = f"plane {config.name}", {}
    for site in config.sites:
        means, rho = tensor_name(site, "means"), tensor_name(site, "rho")
        _check_tensor(where, means, tensors[means], (2, 2))
        _check_tensor(where, rho, tensors[rho], (1,))
        positive, negative = map(tuple, tensors[means].tolist())
        found[site] = ClassMeans(positive, negative, tensors[rho].item())
    return found


def _check_means(config: PlaneConfig, means: Mapping[Site, ClassMeans] | None) -> None:
    where = f"plane {config.name}"
    if config.format_version == 1:
        if means is not None:
            given = ", ".join(map(str, sorted(means)))
            raise PlaneError(where, "means", given, "must be None: format_version 1 holds none")
        return
    if means is None or means.keys() != set(config.sites):
        raise PlaneError(
            where,
            "means",
            None if means is None else ", ".join(map(str, sorted(means))),
            f"must be class means for each of {', '.join(map(str, config.sites))}",
        )
    for site, of in means.items():
        for value in (*of.positive, *of.negative):
            if not math.isfinite(value):
                raise PlaneError(where, tensor_name(site, "means"), value, "must be finite")
        if not 0 < of.rho < math.inf:
            rule = "must be finite and above 0: the distance of the classes' means"
            raise PlaneError(where, tensor_name(site, "rho"), of.rho, rule)


def _rounded(*values: float) -> tuple[float, ...]:
    """The values as float32 holds them; one beyond its range is infinite."""
    return tuple(_float32(values).tolist())


def _float32(values: Sequence[Any]) -> Tensor:
    """On the CPU, whatever torch's defaults are: a model that is being loaded sets others."""
    return torch.tensor(values, dtype=torch.float32, device="cpu")


def _short(value: Any) -> str:
    text = value if isinstance(value, str) and value.isprintable() else one_line(repr(value))
    return text if len(text) <= 120 else text[:117] + "..."


def one_line(text: str) -> str:
    """One line, with what a terminal would obey written out: names in files are others'."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(text.split()))
