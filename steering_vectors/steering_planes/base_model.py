"""The model that a plane is for, as far as a plane must know it: its config, and its norms' gains.

Read from a folder or from the Hub's cache, by transformers: the model is built without weights, and
of its checkpoint only the norms' own tensors are read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import safe_open
from torch import Tensor, nn

from steering_planes import fingerprint
from steering_planes.archive import reading
from steering_planes.artifact import PlaneError
from steering_planes.sites import NOT_THE_DECODER, Site, SitesNotFoundError, find_sites

RESIDUAL_ROLES = ("attn_in", "mlp_in")
"""The norms that read the residual stream; the others read what a sublayer adds to it."""


@dataclass(frozen=True, eq=False)
class BaseModel:
    """A model's folder, and what its text config says."""

    folder: Path
    config: Any
    """transformers' config of the text model."""
    outer_type: str
    """The whole model's type, which of a multimodal one is another."""

    @classmethod
    def open(cls, name_or_path: str) -> Self | None:
        """A folder with a config.json, or a repository in the Hub's cache; None where it is none.

        Raises:
            PlaneError: a config that transformers does not read, or only by running its code.
        """
        folder = _folder(name_or_path)
        if folder is None:
            return None
        from transformers import AutoConfig

        with _by_transformers(folder / "config.json"):
            whole = AutoConfig.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
            config = whole.get_text_config()
            int(config.num_hidden_layers), int(config.hidden_size), str(config.model_type)
        return cls(folder, config, str(whole.model_type))

    @property
    def name(self) -> str:
        """The public name: a cached repository's, else the folder's."""
        for part in self.folder.absolute().parts:
            if part.startswith("models--"):
                return part.removeprefix("models--").replace("--", "/", 1)
        return self.folder.resolve().name

    @property
    def model_type(self) -> str:
        return str(self.config.model_type)

    @property
    def num_layers(self) -> int:
        return int(self.config.num_hidden_layers)

    @property
    def hidden_size(self) -> int:
        return int(self.config.hidden_size)

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(self._norms)

    def by_name(self) -> dict[str, Site]:
        """Every norm's name, as `layers.3.input_layernorm`, and its site."""
        return {name: site for site, (name, _) in self._norms.items()}

    @cached_property
    def _norms(self) -> Mapping[Site, tuple[str, nn.Module]]:
        """Every site's norm, without weights, and its name as `layers.3.input_layernorm`."""
        with _by_transformers(self.folder / "config.json"):
            return _norms_of(self.config)

    @cached_property
    def weights(self) -> Mapping[Site, Mapping[str, Tensor]]:
        """Each norm's own tensors, as the checkpoint has them.

        Raises:
            PlaneError: no checkpoint in safetensors, or one without these norms.
        """
        keys = self._keys()
        wanted: dict[Path, list[tuple[str, Site, str, torch.Size]]] = {}
        for site, (name, norm) in self._norms.items():
            for parameter, meta in norm.named_parameters(recurse=False):
                key = _ending(keys, f"{name}.{parameter}")
                if key is None:
                    rule = f"has no {name}.{parameter}: is this the model's checkpoint?"
                    raise PlaneError(self.folder, "weights", str(site), rule)
                wanted.setdefault(keys[key], []).append((key, site, parameter, meta.shape))
        found: dict[Site, dict[str, Tensor]] = {}
        for file, tensors in wanted.items():
            with reading(file, "a whole safetensors file"), _opened(file) as opened:
                for key, site, parameter, shape in tensors:
                    # A copy: the tensor would keep the whole file mapped.
                    tensor = opened.get_tensor(key).clone()
                    _check_tensor(file, key, tensor, shape)
                    found.setdefault(site, {})[parameter] = tensor
        return found

    def through(self, site: Site, directions: Tensor) -> Tensor:
        """Directions [k, d] of the residual stream as the site's norm hands them on; float64.

        A norm gives x / rms(x) * gain, of x less its mean if it is a LayerNorm: a direction becomes
        gain * direction, up to each token's own rms. The gain is what the norm itself does to
        +1, -1, +1, ..., so that a family's habit of storing gain - 1 needs no table.
        """
        norm = self._loaded(site)
        d = directions.shape[1]
        alternating = torch.ones(d).index_fill(0, torch.arange(1, d, 2), -1.0)
        ones = torch.ones(d)
        with torch.no_grad():
            gain = (norm(alternating) - norm(-alternating)).double() / (2 * alternating)
            centred = float((norm(ones) - norm(-ones)).abs().max()) < 1e-3 * float(gain.abs().max())
        given = directions.double()
        moved: Tensor = gain * (given - given.mean(1, keepdim=True) if centred else given)
        return moved

    def fingerprint(self) -> dict[str, tuple[float, ...]]:
        """See :mod:`steering_planes.fingerprint`; of every site whose norm has a weight."""
        return {
            str(site): fingerprint.numbers(tensors["weight"])
            for site, tensors in self.weights.items()
            if "weight" in tensors
        }

    @property
    def has_weights(self) -> bool:
        """Whether there is a checkpoint to read norms from."""
        return bool(self._files())

    def _loaded(self, site: Site) -> nn.Module:
        _, norm = self._norms[site]
        if any(parameter.is_meta for parameter in norm.parameters()):
            tensors = {name: t.float() for name, t in self.weights.get(site, {}).items()}
            with reading(self.folder, "a checkpoint of this config", str(site)):
                norm.to_empty(device="cpu").float().load_state_dict(tensors, strict=False)
        return norm

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("*.safetensors"))

    def _keys(self) -> dict[str, Path]:
        """Every tensor of the checkpoint -> its file."""
        index = self.folder / "model.safetensors.index.json"
        if index.exists():
            try:
                return {
                    str(key): self.folder / str(file)
                    for key, file in json.loads(index.read_bytes())["weight_map"].items()
                }
            except (ValueError, KeyError, AttributeError, TypeError):
                raise PlaneError(index, "weight_map", None, "must map tensors to files") from None
        if not (files := self._files()):
            rule = "has no *.safetensors, from which gains could be read"
            raise PlaneError(self.folder, "weights", self.folder.name, rule)
        keys: dict[str, Path] = {}
        for file in files:
            with reading(file, "a whole safetensors file"), _opened(file) as opened:
                keys |= dict.fromkeys(opened.keys(), file)
        return keys


def _check_tensor(file: Path, key: str, tensor: Tensor, shape: torch.Size) -> None:
    if not tensor.is_floating_point() or not bool(tensor.float().isfinite().all()):
        raise PlaneError(file, key, tensor.dtype, "must be finite numbers")
    if tensor.shape != shape:
        rule = f"must be {list(shape)}, as the config says"
        raise PlaneError(file, f"{key}.shape", list(tensor.shape), rule)


@contextmanager
def _by_transformers(file: Path) -> Iterator[None]:
    """One line for whatever transformers says to a config."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        with reading(file, "the config of a model that transformers knows", "config"):
            yield
    except (ImportError, StrictDataclassError, SitesNotFoundError) as error:
        rule = f"must be the config of a model that transformers knows: {_first_line(error)}"
        raise PlaneError(file, "config", file.name, rule) from None


def _norms_of(config: Any) -> dict[Site, tuple[str, nn.Module]]:
    """Of a model that is built without weights; raises what transformers raises."""
    from transformers import AutoModel, AutoModelForCausalLM

    with torch.device("meta"):
        try:
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        except ValueError:  # a text model that is only ever a part of another
            model = AutoModel.from_config(config, trust_remote_code=False)
    names = {id(module): name for name, module in model.named_modules()}
    return {
        site: (".".join(["", *names[id(norm)].split(".")][-3:]).lstrip("."), norm)
        for site, norm in find_sites(model, int(config.num_hidden_layers)).items()
    }


@lru_cache
def norms_of_type(model_type: str) -> Mapping[str, str]:
    """Norm's name -> role of a type of model, by transformers; empty for one it doesn't know."""
    from transformers import CONFIG_MAPPING

    try:
        config = CONFIG_MAPPING[model_type]().get_text_config()
        return {name.split(".")[-1]: site.role for site, (name, _) in _norms_of(config).items()}
    except (KeyError, ValueError, ImportError, AttributeError, TypeError, RuntimeError):
        return {}


def _opened(file: Path) -> Any:
    return safe_open(file, framework="pt")


def _folder(name_or_path: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        path = Path(name_or_path).expanduser()
        if path.is_dir():
            return path if (path / "config.json").exists() else None
        cached = try_to_load_from_cache(name_or_path, "config.json")
    except (HFValidationError, OSError, RuntimeError, ValueError):
        return None  # no name of a file or of a repository
    return Path(cached).parent if isinstance(cached, str) else None


def _ending(keys: Mapping[str, Path], name: str) -> str | None:
    """The checkpoint's own name of the decoder's tensor; prefixes differ between classes."""
    found = [
        key
        for key in keys
        if f".{key}".endswith(f".{name}")
        and not any(word in key.lower() for word in NOT_THE_DECODER)
    ]
    return found[0] if len(found) == 1 else None


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
