"""The planes on the device: one slot for each, at every steered site."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from steering_kernels import CLASSES_WIDTH
from steering_planes import ClassMeans, Plane, Site

SLOTS = 8
"""The fewest slots; those that no plane needs are zero. The proof at start-up tries as many sites
in one forward pass as there are slots (see :mod:`.proof`)."""


class Bank:
    """Bases and class means of all loaded planes, as the kernels read them.

    A slot holds one plane. At a site that the plane does not select both are zero, which every
    operation leaves alone.

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
        sites, slots = list(sites), max(len(planes), SLOTS)
        self.bases: Mapping[Site, Tensor] = {
            site: torch.zeros(slots, 2, planes[0].config.hidden_size, device=device)
            for site in sites
        }
        """Site -> [slots, 2, hidden] float32; at addresses that never change."""
        self.classes: Mapping[Site, Tensor] = {
            site: torch.zeros(slots, CLASSES_WIDTH, device=device) for site in sites
        }
        """Site -> [slots, 5] float32, see :mod:`steering_kernels.rows`; likewise. Zero of a plane
        without class means, which admission asks for no operation that needs them."""
        for slot, plane in enumerate(planes):
            for site in plane.bases.keys() & self.bases.keys():
                self.bases[site][slot] = plane.bases[site]
                if plane.means is not None:
                    self.classes[site][slot] = _row_of(plane.means[site])

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


def _row_of(means: ClassMeans) -> Tensor:
    """[5], in the order of :mod:`steering_kernels.rows`."""
    return torch.tensor([*means.positive, *means.negative, means.rho])
