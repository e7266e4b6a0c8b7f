"""The planes on the device: one slot for each, at every steered site."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from steering_planes import Plane, Site

SLOTS = 8
"""The fewest slots; those that no plane needs are zero. The proof at start-up tries as many sites
in one forward pass as there are slots (see :mod:`.proof`)."""


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
        """Site -> [slots, 2, hidden] float32; at addresses that never change."""

    @staticmethod
    def _at(site: Site, planes: list[Plane]) -> Tensor:
        hidden = planes[0].config.hidden_size
        stack = torch.zeros(max(len(planes), SLOTS), 2, hidden, dtype=torch.float32)
        for slot, plane in enumerate(planes):
            if site in plane.bases:
                stack[slot] = plane.bases[site]
        return stack

    @property
    def digests(self) -> tuple[str, ...]:
        """The planes' digests, in the order of their slots."""
        return tuple(self._slots)

    def slot(self, digest: str) -> int:
        """The slot of a plane.

        Raises:
            RuntimeError: a plane that admission knows and this process does not.
        """
        try:
            return self._slots[digest]
        except KeyError:
            raise RuntimeError(f"no plane with digest {digest} in this process's bank") from None

    @contextmanager
    def lent(self, length: float) -> Iterator[Callable[[Mapping[int, tuple[Site, int]]], None]]:
        """An empty bank whose slot k answers to the digest ``str(k)``, and the planes to none.

        Afterwards, whatever happened, all is as it was.

        Yields:
            A function that lets slot k hold, at one site, the basis that a slot held there before,
            ``length`` times as long: k -> (site, slot). All others are zero.
        """
        planes, held = self._slots, {site: basis.clone() for site, basis in self.bases.items()}

        def show(shown: Mapping[int, tuple[Site, int]]) -> None:
            for basis in self.bases.values():
                basis.zero_()
            for place, (site, slot) in shown.items():
                self.bases[site][place].copy_(held[site][slot]).mul_(length)

        try:
            self._slots = {str(slot): slot for slot in range(SLOTS)}
            show({})
            yield show
        finally:
            self._slots = planes
            for site, basis in held.items():
                self.bases[site].copy_(basis)
