"""Which sites a worker takes for its own."""

from __future__ import annotations

import pytest

from steering_planes import Site
from steering_server.engine.runner import sites_here
from steering_server.engine.settings import SettingsError

ASKED = [Site(layer, role) for layer in (1, 3, 6) for role in ("attn_in", "mlp_in")]


def norms(*layers: int, roles: tuple[str, ...] = ("attn_in", "mlp_in")) -> set[Site]:
    return {Site(layer, role) for layer in layers for role in roles}


def test_a_whole_model_has_every_site() -> None:
    assert sites_here(ASKED, norms(*range(8)), range(8)) == ASKED


@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_the_stages_of_a_pipeline_share_the_sites_out(size: int) -> None:
    """As vLLM deals layers out: each site is one stage's, and stays numbered as in the model."""
    from vllm.distributed.utils import get_pp_indices

    stages = [range(*get_pp_indices(8, rank, size)) for rank in range(size)]
    shares = [sites_here(ASKED, norms(*layers), layers) for layers in stages]
    assert [site for share in shares for site in share] == ASKED
    for share, layers in zip(shares, stages, strict=True):
        assert all(site.layer in layers for site in share)


def test_a_stage_without_steered_layers_steers_nothing() -> None:
    assert sites_here(ASKED, norms(4, 5), range(4, 6)) == []


def test_a_site_that_should_be_here_stops_the_start() -> None:
    with pytest.raises(SettingsError, match=r"no site 3\.attn_in, 3\.mlp_in in .* layers 2 to 3"):
        sites_here(ASKED, norms(2), range(2, 4))
    with pytest.raises(SettingsError, match=r"1\.attn_in.*roles mlp_in$"):
        sites_here(ASKED, norms(*range(8), roles=("mlp_in",)), range(8))
