"""Selective Steering's folders: what selects, and how it steers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from published import LAYERS, selective
from steering_planes import Plane, PlaneError, Site, orthonormality_error
from steering_planes.formats import import_plane
from steering_planes.sites import named

TOLD: dict[str, Any] = {"model_type": "llama", "num_layers": LAYERS}


def first_layer(module: str) -> bool:
    return ".1." in module


def test_a_mask_selects_and_the_basis_is_orthonormal_again(tmp_path: Path) -> None:
    folder = selective(tmp_path / "a", mask=first_layer)
    plane = import_plane([folder], name="refusal", **TOLD)
    assert plane.sites == (Site(1, "attn_in"), Site(1, "mlp_in"))
    assert plane.config.base_model_name_or_path == "org/tiny"
    assert plane.config.extraction.n == 7
    assert import_plane([folder / "plane.pt"], name="refusal", **TOLD).digest == plane.digest
    stored = torch.stack([v.double() for v in torch.load(folder / "plane.pt")["basis"]])
    assert orthonormality_error(stored.float()) > 1e-5
    for basis in plane.bases.values():
        assert orthonormality_error(basis) <= 1e-6
        kept = torch.nn.functional.cosine_similarity(basis[0].double(), stored[0], dim=0)
        assert float(kept) >= 1 - 1e-9
        outside = stored[1] - basis.double().T @ (basis.double() @ stored[1])
        assert float(outside.norm()) <= 1e-6


def test_a_published_plane_has_no_class_means(tmp_path: Path) -> None:
    folder = selective(tmp_path / "a", mask=first_layer)
    plane = import_plane([folder], name="refusal", **TOLD)
    plane.save(tmp_path / "refusal")
    for each in (plane, Plane.load(tmp_path / "refusal")):
        assert each.config.format_version == 1
        assert each.means is None
        assert each.modes == ("rotate_by", "rotate_to", "ablate")
    with pytest.raises(PlaneError, match="default_mode=cap: must be one of rotate_by"):
        import_plane([folder], name="refusal", default_mode="cap", **TOLD)


@pytest.mark.parametrize(
    ("mode", "threshold", "gate"), [("standard", 0.5, None), ("adaptive", 0.25, 0.25)]
)
def test_standard_and_adaptive_steer_their_targets_to_an_angle(
    mode: str, threshold: float, gate: float | None, tmp_path: Path
) -> None:
    folder = selective(tmp_path / "a", mode=mode, threshold=threshold)
    config = import_plane([folder], name="refusal", **TOLD).config
    assert named(config.sites) == "0-3.attn_in, 0-3.mlp_in"
    assert (config.default_mode, config.gate) == ("rotate_to", gate)
    over = import_plane([folder], name="r", sites="2", default_mode="rotate_by", **TOLD).config
    assert (named(over.sites), over.default_mode) == ("2.attn_in, 2.mlp_in", "rotate_by")


def test_the_config_says_the_mode_where_the_plane_says_another(tmp_path: Path) -> None:
    """An older version wrote "adaptive" into every plane.pt."""
    folder = selective(tmp_path / "a", mode="standard", threshold=0.5, targets=False)
    plane = torch.load(folder / "plane.pt", weights_only=True)
    torch.save({**plane, "plane_type": "adaptive", "extra_info": {}}, folder / "plane.pt")
    config = import_plane([folder], name="refusal", **TOLD).config
    assert (config.default_mode, config.gate) == ("rotate_to", None)
    assert named(config.sites) == "0-3.attn_in, 0-3.mlp_in"


@pytest.mark.parametrize("on", [None, False])
def test_selective_without_a_mask_selects_nothing(tmp_path: Path, on: bool | None) -> None:
    folder = selective(tmp_path / "a", mask=None if on is None else lambda module: on)
    with pytest.raises(PlaneError, match="layer_steering_mask is missing or selects nothing"):
        import_plane([folder], name="refusal", **TOLD)
    plane = import_plane([folder], name="refusal", sites="2.mlp_in", **TOLD)
    assert plane.sites == (Site(2, "mlp_in"),)


def test_a_target_that_is_no_name_is_refused(tmp_path: Path) -> None:
    folder = selective(tmp_path / "a")
    plane = torch.load(folder / "plane.pt", weights_only=True)
    plane["extra_info"]["target_layers"] = [["x"]]
    torch.save(plane, folder / "plane.pt")
    with pytest.raises(PlaneError, match=r"module=\['x'\]: must end in layers\.<number>\.<norm>"):
        import_plane([folder], name="refusal", **TOLD)


def test_a_norms_role_goes_by_all_the_names(tmp_path: Path) -> None:
    """`post_attention_layernorm` is another role in Gemma-2."""
    folder = selective(tmp_path / "a", mask=first_layer)
    plane = torch.load(folder / "plane.pt", weights_only=True)
    mask = plane["extra_info"]["layer_steering_mask"]
    for norm in ("pre_feedforward_layernorm", "post_feedforward_layernorm"):
        mask |= {f"model.layers.{i}.{norm}": i == 1 for i in range(LAYERS)}
    torch.save(plane, folder / "plane.pt")
    told = {**TOLD, "model_type": "gemma2"}
    sites = import_plane([folder], name="refusal", **told).sites
    assert {site.role for site in sites} == {"attn_in", "attn_out", "mlp_in", "mlp_out"}
