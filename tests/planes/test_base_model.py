"""The model a plane is for: its norms' gains, and whatever may be wrong with its folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from steering_planes import PlaneError, find_sites
from steering_planes.base_model import BaseModel, norms_of_type


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_a_direction_goes_through_a_norm_as_its_derivative_does(name: str, tmp_path: Path) -> None:
    """d norm(x) is gain * d up to the token's rms, less what lies along norm(x) itself."""
    model = tiny.make(name, tmp_path / "model").double()
    base = BaseModel.open(str(tmp_path / "model"))
    assert base is not None
    norms = find_sites(model, tiny.LAYERS)
    assert set(base.sites) == set(norms)
    torch.manual_seed(0)
    directions = torch.randn(2, tiny.HIDDEN, dtype=torch.float64)
    for site, norm in norms.items():
        x = torch.randn(tiny.HIDDEN, dtype=torch.float64)
        derivative = torch.autograd.functional.jvp(norm, (x,), (directions[1],))[1]
        along = (norm(x) - norm(-x)).detach() / 2
        moved = base.through(site, directions)[1]
        # The derivative lies in the plane of the two, and not along norm(x) alone.
        axes = torch.stack((moved, along), 1)
        shares = torch.linalg.lstsq(axes, derivative[:, None]).solution
        assert float((axes @ shares - derivative[:, None]).norm() / derivative.norm()) <= 1e-6
        assert float(shares[0]) > 0
    assert set(base.fingerprint()) == set(map(str, norms))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny.make("llama", tmp_path / "model")
    return tmp_path / "model"


def opened(folder: Path) -> Any:
    base = BaseModel.open(str(folder))
    assert base is not None
    return base.fingerprint()


BROKEN: dict[str, dict[str, Any]] = {
    "a text for a number": {"hidden_size": "128"},
    "no number of layers": {"num_hidden_layers": None},
    "heads that do not divide": {"num_attention_heads": 5, "head_dim": None},
    "no heads": {"num_attention_heads": 0},
    "another activation": {"hidden_act": "foo"},
    "another width": {"hidden_size": 64},
    "no model's type": {"model_type": "unheard_of"},
    "code of its own": {"model_type": "weird", "auto_map": {"AutoConfig": "configuration_weird.W"}},
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_config_is_one_line_and_runs_no_code(
    fault: str, folder: Path, tmp_path: Path
) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | BROKEN[fault]))
    (folder / "configuration_weird.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(PlaneError) as caught:
        opened(folder)
    assert str(caught.value).isprintable()
    assert str(folder) in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_a_broken_checkpoint_is_one_line(folder: Path) -> None:
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for content, rule in (
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
        (whole[:200], "must be a whole safetensors file"),
        (b"", "must be a whole safetensors file"),
    ):
        weights.write_bytes(content)
        with pytest.raises(PlaneError, match=rule):
            opened(folder)
    weights.write_bytes(whole)
    tensors = load_file(weights)
    del tensors["model.layers.2.input_layernorm.weight"]
    save_file(tensors, weights)
    with pytest.raises(PlaneError, match=r"has no layers\.2\.input_layernorm\.weight"):
        opened(folder)
    index = {"weight_map": {"model.layers.0.input_layernorm.weight": "none.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(PlaneError, match=r"no such file|has no layers"):
        opened(folder)


@pytest.mark.parametrize("name", ["~nosuchuser/x", "x" * 300, "a\0b", "org/none", "/no/such"])
def test_what_is_no_model_is_none(name: str) -> None:
    assert BaseModel.open(name) is None


def test_a_snapshot_is_known_by_its_repository(folder: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--some-org--Tiny-Llama/snapshots/0123abcd"
    shutil.copytree(folder, snapshot)
    base = BaseModel.open(str(snapshot))
    assert base is not None
    assert base.name == "some-org/Tiny-Llama"


def test_a_type_has_its_norms() -> None:
    assert norms_of_type("llama")["post_attention_layernorm"] == "mlp_in"
    assert norms_of_type("gemma2")["post_attention_layernorm"] == "attn_out"
    assert norms_of_type("gpt2") == {"ln_1": "attn_in", "ln_2": "mlp_in"}
    assert norms_of_type("unheard_of") == {}
