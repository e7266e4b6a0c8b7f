"""The server's steering settings, as they travel to every process of vLLM."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from steering_planes import Plane, Site, open_plane

if TYPE_CHECKING:
    from vllm.config import VllmConfig

SECTION = "steering"
"""The key of vLLM's ``additional_config`` that holds these settings.

``additional_config`` reaches every worker and enters the compile cache's key, so that a graph
traced for one layout of sites is never used for another.
"""


class SettingsError(ValueError):
    """Steering that this server cannot give as it was asked to; said in one line at start-up."""


class Settings(BaseModel):
    """What the server steers with.

    All is the user's but ``digests`` and ``sites``, which are filled in once, by the process that
    creates vLLM's configuration.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    planes: dict[str, str] = Field(default_factory=dict)
    """Name -> the plane's folder, or ``hf://organisation/repository@revision``."""
    max_planes: Annotated[int, Field(ge=1, le=8)] = 1
    """How many planes one request may combine; each costs a pass in the graph."""
    allow_model_mismatch: bool = False
    """Accept a plane that was calibrated on another model of the same shape."""
    kernels: Literal["auto", "triton", "torch"] = "auto"
    """What rotates; see :func:`steering_kernels.choose`."""
    digests: dict[str, str] = Field(default_factory=dict)
    sites: tuple[str, ...] = ()

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

    def resolved(self, planes: dict[str, Plane]) -> Settings:
        """With the digests and the union of the sites of ``planes``."""
        sites = sorted({site for plane in planes.values() for site in plane.sites})
        return self.model_copy(
            update={
                "digests": {name: plane.digest for name, plane in planes.items()},
                "sites": tuple(map(str, sites)),
            }
        )

    def parsed_sites(self) -> tuple[Site, ...]:
        """The sites to steer, in order."""
        return tuple(map(Site.parse, self.sites))
