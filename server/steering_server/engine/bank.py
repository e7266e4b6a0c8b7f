"""The planes on the device: one slot for each, at every steered site."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from steering_planes import Plane, Site


class Bank:
    """Bases of all loaded planes, as the rotation reads them.

    A slot holds one plane. At a site that the plane does not select its basis is zero, which the
    rotation leaves alone.

    Args:
        planes: the loaded planes; slots are given in this order.
        sites: the sites of this process.
        device: where the model runs.
    """

    def __init__(
        self, planes: Iterable[Plane], sites: Iterable[Site], device: torch.device
    ) -> None:
        planes = list(planes)
        self._slots = {plane.digest: slot for slot, plane in enumerate(planes)}
        self.bases: Mapping[Site, Tensor] = {
            site: self._at(site, planes).to(device) for site in sites
        }
        """Site -> [slots, 2, hidden] float32."""

    @staticmethod
    def _at(site: Site, planes: list[Plane]) -> Tensor:
        hidden = planes[0].config.hidden_size
        stack = torch.zeros(len(planes), 2, hidden, dtype=torch.float32)
        for slot, plane in enumerate(planes):
            if site in plane.bases:
                stack[slot] = plane.bases[site]
        return stack

    def slot(self, digest: str) -> int:
        """The slot of a plane.

        Raises:
            RuntimeError: a plane that admission knows and this process does not.
        """
        try:
            return self._slots[digest]
        except KeyError:
            raise RuntimeError(f"no plane with digest {digest} in this process's bank") from None
