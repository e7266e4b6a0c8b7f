"""A model is told by its norms' gains, in whatever dtype they are."""

from __future__ import annotations

import pytest
import torch

from steering_planes import fingerprint
from steering_planes.fingerprint import HALF_TOLERANCE, TOLERANCE, distance, numbers


def gains(sites: int = 60, seed: int = 0) -> dict[str, torch.Tensor]:
    """As a checkpoint in bfloat16 has them."""
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{site}.attn_in": (0.5 + torch.rand(576, generator=generator)).bfloat16()
        for site in range(sites)
    }


def of(weights: dict[str, torch.Tensor]) -> dict[str, tuple[float, ...]]:
    return {site: numbers(gain) for site, gain in weights.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_a_dtype_that_holds_the_gains_changes_nothing(dtype: torch.dtype) -> None:
    weights = gains()
    assert of(weights) == of({site: gain.to(dtype) for site, gain in weights.items()})


def test_rounding_once_more_on_the_way_is_within_the_tolerance() -> None:
    """A float32 checkpoint, served in float16."""
    generator = torch.Generator().manual_seed(2)
    exact = {site: 0.5 + torch.rand(576, generator=generator) for site in gains()}
    apart = distance(of(exact), of({site: gain.half() for site, gain in exact.items()}))
    assert apart is not None
    assert TOLERANCE < apart <= HALF_TOLERANCE
    assert distance(of(exact), of({site: gain.bfloat16() for site, gain in exact.items()})) == 0.0


@pytest.mark.parametrize("share", [0.01, 0.1])
def test_few_gains_of_another_last_place_are_seen(share: float) -> None:
    weights = gains()
    generator = torch.Generator().manual_seed(1)
    tuned = {
        site: torch.where(
            torch.rand(576, generator=generator) < share, gain * (1 + 2**-7), gain
        ).bfloat16()
        for site, gain in weights.items()
    }
    apart = distance(of(weights), of(tuned))
    assert apart is not None
    assert apart > TOLERANCE


@pytest.mark.parametrize("relative", [3e-3, 1e-2, 1.0])
def test_gains_that_were_trained_on_are_others(relative: float) -> None:
    weights = gains()
    generator = torch.Generator().manual_seed(1)
    tuned = {
        site: gain.float() * (1 + relative * torch.randn(576, generator=generator))
        for site, gain in weights.items()
    }
    apart = distance(of(weights), of(tuned))
    assert apart is not None
    assert TOLERANCE < apart == pytest.approx(relative, rel=0.25)


def test_sites_that_only_one_side_has_do_not_count() -> None:
    whole = of(gains())
    stage = {site: whole[site] for site in list(whole)[:3]}
    assert distance(whole, stage) == 0.0
    assert distance(whole, {}) is None
    assert distance({"0.mlp_in": (1.0, 1, 1, 1, 1)}, whole) is None


def test_the_numbers_are_the_same_for_ever() -> None:
    """They are in files. The first is the root mean square; the signs are SHAKE-256's bits."""
    gain = torch.arange(1, 11) / 8
    assert numbers(gain) == pytest.approx(PINNED, abs=1e-6)
    assert len(PINNED) - 1 == fingerprint.SUMS


PINNED = (0.775605, -0.830098, 0.197642, -0.0395285, -1.3835)
