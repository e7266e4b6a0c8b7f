"""Planes for tests: random bases and class means, so that every site and slot is told apart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from steering_planes import ClassMeans, Extraction, Plane, PlaneConfig, Site, orthonormalise

SMOLLM2 = {
    "base_model_name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "model_type": "llama",
    "hidden_size": 576,
    "num_layers": 30,
}


def random_plane(folder: Path, sites: Sequence[str], seed: int = 0, **config: Any) -> Path:
    """Save a plane with another random basis at each site; returns its folder.

    Its class means are of the size of activations whose elements are about 1.

    Args:
        folder: where to; its name is the plane's.
        sites: such as "18.attn_in".
        seed: of the bases and the means.
        config: fields of the artifact's config; SmolLM2's shape unless given. With
            ``format_version=1`` the plane has no means.
    """
    config = {
        **SMOLLM2,
        "name": folder.name,
        "extraction": Extraction(method="random", data="none", n=1, seed=seed),
        **config,
    }
    parsed = tuple(Site.parse(site) for site in sites)
    generator = torch.Generator().manual_seed(seed)
    bases = {
        site: orthonormalise(torch.randn(2, config["hidden_size"], generator=generator))
        for site in parsed
    }
    built = PlaneConfig(sites=parsed, **config)
    # After all bases: those of a seed are the same in both versions of the format.
    means = {site: random_means(generator) for site in parsed}
    Plane(built, bases, None if built.format_version == 1 else means).save(folder)
    return folder


def random_means(generator: torch.Generator) -> ClassMeans:
    """Coordinates of about +-1, and a rho of 0.5 to 2."""
    p1, p2, n1, n2 = torch.randn(4, generator=generator).tolist()
    rho = 0.5 + 1.5 * float(torch.rand(1, generator=generator))
    return ClassMeans((p1, p2), (n1, n2), rho)
