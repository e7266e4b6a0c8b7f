"""The server's steering settings, as they travel to every process of vLLM."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

import steering_kernels
from steering_kernels import Choice, Kernels, choose
from steering_planes import Plane, Site, open_plane
from steering_server.request.admission import Admission
from steering_server.request.error import SteeringError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

SECTION = "steering"
"""The key of vLLM's ``additional_config`` that holds these settings.

``additional_config`` reaches every worker and enters the compile cache's key, so that a graph
traced for one layout of sites, one kind of kernels or one version of their code is never used for
another.
"""

Norms = Literal["fused", "kept"]
"""At selected sites: our norm, which steers in the same pass; or vLLM's own, with all that vLLM
fuses into it, whose output is steered."""

_ENGINE = ("bank.py", "rows.py", "sites.py")


def graph_code() -> str:
    """SHA-256 over the source of all that steering adds to a model's graph: code and constants.

    vLLM itself compares the files that Dynamo traced. One that only defines the layout of a row or
    of the bank, or the schema of a kernel, is not among them.
    """
    kernels = sorted(Path(steering_kernels.__file__).parent.glob("*.py"))
    digest = hashlib.sha256()
    for file in (*kernels, *map(Path(__file__).with_name, _ENGINE)):
        source = file.read_bytes()
        digest.update(f"{file.name} {len(source)}\n".encode() + source)
    return digest.hexdigest()


class SettingsError(ValueError):
    """Steering that this server cannot give as it was asked to; said in one line at start-up."""


class Settings(BaseModel):
    """What the server steers with.

    All is the user's but the fields from ``digests`` on, which are filled in once, by the process
    that creates vLLM's configuration.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    planes: dict[str, str] = Field(default_factory=dict)
    """Name -> the plane's folder, or ``hf://organisation/repository@revision``."""
    max_planes: Annotated[int, Field(ge=1, le=8)] = 1
    """How many planes one request may combine; each costs a pass in the graph."""
    allow_model_mismatch: bool = False
    """Accept a plane that was made for another model of the same shape."""
    kernels: Literal["auto", "triton", "torch"] = "auto"
    """What rotates; see :func:`steering_kernels.choose`."""
    norms: Literal["auto", "fused", "kept"] = "auto"
    """Whether ours, steering included, replace vLLM's; see :meth:`resolved`."""
    skip_proof: bool = False
    """Start without having seen that each site steers; see :mod:`steering_server.engine.proof`."""
    default: str | None = None
    """What steers a request that says nothing of it; see :mod:`steering_server.request.words`."""
    required: bool = False
    """Refuse a request that would be unsteered."""
    presets: dict[str, str] = Field(default_factory=dict)
    """Model ids that stand for a steering: name -> words."""
    digests: dict[str, str] = Field(default_factory=dict)
    sites: tuple[str, ...] = ()
    chosen: Kernels | None = None
    """What ``kernels`` comes to on the server's device."""
    chosen_norms: Norms | None = None
    """What ``norms`` comes to there."""
    code: str = ""
    """See :func:`graph_code`."""

    @classmethod
    def of(cls, vllm_config: VllmConfig) -> Settings:
        """The settings in vLLM's configuration; empty ones where it has none.

        Raises:
            SettingsError: a section that does not parse.
        """
        section = (
            vllm_config.additional_config.get(SECTION)
            if isinstance(vllm_config.additional_config, dict)
            else None
        )
        return cls.parse({} if section is None else section)

    @classmethod
    def parse(cls, section: Any) -> Settings:
        """Settings from plain values.

        Raises:
            SettingsError: naming each field, its value and the rule.
        """
        try:
            return cls.model_validate(section)
        except ValidationError as error:
            problems = "; ".join(
                f"{SECTION}.{'.'.join(map(str, e['loc']))} = {e['input']!r}: {e['msg']}"
                for e in error.errors()
            )
            raise SettingsError(problems) from None

    def load_planes(self) -> dict[str, Plane]:
        """Every configured plane, by name.

        Raises:
            PlaneError: a plane that is missing or broken.
            SettingsError: a plane that changed on disk since the server read it.
        """
        planes = {name: open_plane(path) for name, path in self.planes.items()}
        for name, digest in self.digests.items():
            if planes[name].digest != digest:
                raise SettingsError(
                    f"plane {name!r} at {self.planes[name]} changed while the server started: "
                    f"digest {planes[name].digest[:12]} is not {digest[:12]}"
                )
        return planes

    def resolved(
        self,
        planes: dict[str, Plane],
        device: torch.device,
        *,
        compiled: bool = True,
        all_reduce_fused: bool = False,
    ) -> Settings:
        """With all that shapes the graph: the planes' digests, the union of their sites, what
        rotates on ``device``, in which norms, and the code around it.

        Args:
            planes: the configured ones, by name.
            device: the workers'.
            compiled: whether vLLM compiles the model.
            all_reduce_fused: whether it then fuses norms with the all-reduce before them.

        Raises:
            SettingsError: kernels that cannot run there.
        """
        sites = sorted({site for plane in planes.values() for site in plane.sites})
        kernels = self._choose(device).kernels
        # In place of one fused kernel, ours would be two; uncompiled, plain torch would be many.
        keep = all_reduce_fused or (kernels == "torch" and not compiled)
        norms: Norms = "kept" if keep else "fused"
        return self.model_copy(
            update={
                "digests": {name: plane.digest for name, plane in planes.items()},
                "sites": tuple(map(str, sites)),
                "chosen": kernels,
                "chosen_norms": norms if self.norms == "auto" else self.norms,
                "code": graph_code(),
            }
        )

    def _choose(self, device: torch.device) -> Choice:
        try:
            return choose(device, self.kernels)
        except ValueError as error:
            raise SettingsError(f"{SECTION}.{error}") from None

    def kernels_on(self, device: torch.device) -> Choice:
        """What rotates in a worker: what the compile cache's key says.

        Raises:
            SettingsError: these kernels, or this code, are not what the server resolved.
        """
        here = self._choose(device)
        if here.kernels != self.chosen:
            raise SettingsError(
                f"{SECTION}.kernels = {self.kernels!r} is {self.chosen!r} where the server started "
                f"and {here.kernels!r} in this worker ({here.why}); name one: --steering-kernels"
            )
        if (code := graph_code()) != self.code:
            raise SettingsError(
                f"this worker's code of steering-server is {code[:12]}, the server's is "
                f"{self.code[:12]}: one version must run them all"
            )
        return here

    def admission(self) -> Admission:
        """What decides, for these planes, what a request's steering fields mean.

        Raises:
            PlaneError: see :meth:`load_planes`.
            SettingsError: a default or a preset that no request could ask for; or one of them, or
                that steering is required, without a plane.
        """
        for name in ("default", "required", "presets"):
            if not self.planes and (value := getattr(self, name)):
                raise SettingsError(
                    f"{SECTION}.{name} = {value!r}: needs a plane (--steering-plane)"
                )
        try:
            return Admission(
                self.load_planes(),
                self.max_planes,
                default=self.default,
                required=self.required,
                presets=self.presets,
            )
        except SteeringError as error:
            raise SettingsError(str(error)) from None

    def parsed_sites(self) -> tuple[Site, ...]:
        """The sites to steer, in order.

        Raises:
            SettingsError: planes without sites, which would steer nothing.
        """
        if self.planes and not self.sites:
            raise SettingsError(
                f"{SECTION}.planes = {sorted(self.planes)} without sites: this VllmConfig does not "
                "come from EngineArgs.create_engine_config with the plugin loaded, which finds them"
            )
        return tuple(map(Site.parse, self.sites))
