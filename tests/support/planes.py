"""Planes for tests: random bases, so that every site and slot is told apart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from steering_planes import Extraction, Plane, PlaneConfig, Site, orthonormalise

SMOLLM2 = {
    "base_model_name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "model_type": "llama",
    "hidden_size": 576,
    "num_layers": 30,
}


def random_plane(folder: Path, sites: Sequence[str], seed: int = 0, **config: Any) -> Path:
    """Save a plane with another random basis at each site; returns its folder.

    Args:
        folder: where to; its name is the plane's.
        sites: such as "18.attn_in".
        seed: of the bases.
        config: fields of the artifact's config; SmolLM2's shape unless given.
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
    Plane(PlaneConfig(sites=parsed, **config), bases).save(folder)
    return folder
