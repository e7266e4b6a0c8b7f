"""Telling a model by its norms' gains: a few numbers a site, the same in every dtype and format.

    numbers(g) = (rms(g), s1 . g / sqrt(d), ..., s4 . g / sqrt(d))

of the gain g [d] rounded to bfloat16, with fixed vectors of signs s. Quantisation leaves gains as
they are, so a model's FP8 checkpoint has its fingerprint; fine-tuning changes them, and so does
what folds scales into them (AWQ, SmoothQuant), after which a plane's activations are others as
well. A merged LoRA that trained no norm is not told from its base.
"""

import hashlib
import math
from collections.abc import Mapping
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn

from steering_planes.sites import Site

Fingerprint = Mapping[str, tuple[float, ...]]
"""A site's name ("18.attn_in") -> its numbers."""

SUMS = 4

TOLERANCE = 2.0**-12
"""The largest `distance` of a model from itself, which is 0 but for the numbers' own rounding. A
hundredth of the gains that differ in bfloat16's last place are seen."""

HALF_TOLERANCE = 2.0**-9
"""Where the gains are float16: of a float32 checkpoint they are rounded twice on the way here, and
an eighth of them lie halfway then (seen: 2^-9.3)."""


def numbers(gain: Tensor) -> tuple[float, ...]:
    """Five numbers of a norm's weight [d], of any floating dtype."""
    rounded = gain.detach().to("cpu", torch.bfloat16).double()
    d = len(rounded)
    sums = _signs(d) @ rounded / math.sqrt(d)
    values = (math.sqrt(float(rounded.square().mean())), *sums.tolist())
    # Six digits: far below the tolerance, and short in a file.
    return tuple(float(f"{value:.6g}") for value in values)


def of(norms: Mapping[Site, nn.Module]) -> dict[str, tuple[float, ...]]:
    """The fingerprint of a loaded model, of every norm that has a weight."""
    weights = {str(site): getattr(norm, "weight", None) for site, norm in norms.items()}
    return {site: numbers(gain) for site, gain in weights.items() if isinstance(gain, Tensor)}


def distance(one: Fingerprint, other: Fingerprint) -> float | None:
    """How far two models' gains lie apart over the sites that both name, relative to their size.

    The root mean square of the sums' differences over that of the gains, which for random signs is
    that of the gains' own differences. None where no site is in both.
    """
    sites = one.keys() & other.keys()
    if not sites:
        return None
    size = sum(one[site][0] ** 2 for site in sites)
    apart = sum(
        (a - b) ** 2 / SUMS
        for site in sites
        for a, b in zip(one[site][1:], other[site][1:], strict=True)
    )
    if not apart:
        return 0.0
    return math.sqrt(apart / size) if size else math.inf


@lru_cache
def _signs(d: int) -> Tensor:
    """[4, d] of +-1, from SHAKE-256: the same everywhere and for ever."""
    rows = [
        np.unpackbits(
            np.frombuffer(
                hashlib.shake_256(f"steering-planes {k}".encode()).digest((d + 7) // 8), np.uint8
            )
        )[:d]
        for k in range(SUMS)
    ]
    return torch.from_numpy(np.stack(rows)).double() * 2 - 1
