"""Published formats become planes; nothing in them is ever run."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from steering_planes import Plane, PlaneError, Site, orthonormality_error
from steering_planes.legacy import import_plane, read

REFERENCE = Path(__file__).parents[3] / "shared/reference"
HIDDEN = 32


def selective(folder: Path, *, mask: dict[str, bool] | None, names: tuple[str, str]) -> Path:
    """A folder as Selective Steering's code writes it, in bfloat16, of three layers."""
    folder.mkdir()
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(HIDDEN, 2))[0].T.bfloat16()
    modules = [f"model.layers.{i}.{name}" for i in range(3) for name in names]
    plane = {
        "basis": tuple(basis),
        "projections": dict.fromkeys(modules, (0.1, -0.1)),
        "plane_type": "selective",
        "extra_info": {"target_layers": modules, "layer_steering_mask": mask},
        "metadata": {},
    }
    torch.save(plane, folder / "plane.pt")
    (folder / "config.json").write_text('{"model": {"name": "org/Tiny"}}')
    (folder / "metadata.json").write_text('{"session_id": "s1", "harmful_samples": 7}')
    return folder


LLAMA = ("input_layernorm", "post_attention_layernorm")
MASK = {f"model.layers.{i}.{name}": i == 1 for i in range(3) for name in LLAMA}


def test_a_selective_plane_is_orthonormal_again_and_keeps_its_mask(tmp_path: Path) -> None:
    folder = selective(tmp_path / "a", mask=MASK, names=LLAMA)
    found = read([folder])
    assert read([folder / "plane.pt"]).bases.keys() == found.bases.keys()
    assert list(found.bases) == [Site(1, "attn_in"), Site(1, "mlp_in")]
    assert (found.base_model, found.num_layers, found.n) == ("org/Tiny", 3, 7)
    stored = torch.stack([v.double() for v in torch.load(folder / "plane.pt")["basis"]])
    assert orthonormality_error(stored.float()) > 1e-5
    for basis in found.bases.values():
        assert orthonormality_error(basis) <= 1e-6
        # The direction is kept, the plane is.
        assert float(basis[0].double() @ stored[0]) / float(stored[0].norm()) >= 1 - 1e-9
        outside = stored[1] - basis.double().T @ (basis.double() @ stored[1])
        assert float(outside.norm()) <= 1e-6


def test_a_published_plane_has_no_class_means(tmp_path: Path) -> None:
    folder = selective(tmp_path / "a", mask=MASK, names=LLAMA)
    plane = import_plane([folder], name="refusal", model_type="llama")
    plane.save(tmp_path / "refusal")
    for each in (plane, Plane.load(tmp_path / "refusal")):
        assert each.config.format_version == 1
        assert each.means is None
        assert each.modes == ("rotate_by", "rotate_to", "ablate")


@pytest.mark.parametrize("mask", [None, {}, dict.fromkeys(MASK, False)])
def test_no_mask_is_no_selection(tmp_path: Path, mask: dict[str, bool] | None) -> None:
    folder = selective(tmp_path / "a", mask=mask, names=LLAMA)
    with pytest.raises(PlaneError, match="layer_steering_mask"):
        read([folder])
    if mask is None:
        assert list(read([folder], [Site(2, "mlp_in")]).bases) == [Site(2, "mlp_in")]


def test_a_norms_role_goes_by_all_the_names(tmp_path: Path) -> None:
    """`post_attention_layernorm` is another role in Gemma-2."""
    names = (*LLAMA, "pre_feedforward_layernorm", "post_feedforward_layernorm")
    mask = {f"model.layers.{i}.{name}": i == 2 for i in range(3) for name in names}
    found = read([selective(tmp_path / "a", mask=mask, names=LLAMA)])
    assert {site.role for site in found.bases} == {"attn_in", "attn_out", "mlp_in", "mlp_out"}


class Bomb:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def test_a_pickle_that_would_run_code_is_never_run(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    folder = tmp_path / "a"
    folder.mkdir()
    torch.save({"basis": Bomb(mark)}, folder / "plane.pt")
    with pytest.raises(PlaneError, match=r"plane\.pt"):
        read([folder])
    bomb = np.empty((), dtype=object)
    bomb[()] = {"model.layers.0.input_layernorm": {"first_direction": Bomb(mark)}}
    np.save(tmp_path / "b.npy", bomb, allow_pickle=True)
    with pytest.raises(PlaneError, match="it asks for"):
        read([tmp_path / "b.npy"], [Site(0, "attn_in")])
    assert not mark.exists()
    pickle.loads((tmp_path / "b.npy").read_bytes().partition(b"\n")[2])
    assert mark.exists(), "the bomb was a dud"


def angular(file: Path, directions: dict[str, Any]) -> Path:
    """A file as Angular Steering's code writes it."""
    np.save(file, np.array(directions, dtype=object), allow_pickle=True)
    return file


def test_an_angular_plane_has_a_basis_a_module(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    directions = {
        f"model.layers.{i}.{name}": {
            "first_direction": rng.normal(size=HIDDEN).astype(np.float32),
            "second_direction": rng.normal(size=HIDDEN).astype(np.float32),
        }
        for i in range(2)
        for name in LLAMA
    }
    file = angular(tmp_path / "a.npy", directions)
    found = read([file], [Site(1, "mlp_in")])
    (basis,) = found.bases.values()
    first = directions["model.layers.1.post_attention_layernorm"]["first_direction"]
    assert float(basis[0].numpy() @ first) == pytest.approx(float(np.linalg.norm(first)), rel=1e-6)
    assert orthonormality_error(basis) <= 1e-6
    with pytest.raises(PlaneError, match="name the sites"):
        read([file])
    with pytest.raises(PlaneError, match=r"site=5\.mlp_in: must be one of"):
        read([file], [Site(5, "mlp_in")])


def gguf(file: Path, seed: int) -> dict[int, np.ndarray]:
    """A control vector as repeng and llama.cpp write it; returns its directions."""
    from gguf import GGUFWriter

    rng = np.random.default_rng(seed)
    directions = {layer: rng.normal(size=HIDDEN).astype(np.float32) for layer in (1, 2)}
    writer = GGUFWriter(file, "controlvector")
    for layer, direction in directions.items():
        writer.add_tensor(f"direction.{layer}", direction)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return directions


def test_two_control_vectors_are_two_axes(tmp_path: Path) -> None:
    files = [tmp_path / "a.gguf", tmp_path / "b.gguf"]
    one, _ = (gguf(file, seed) for seed, file in enumerate(files))
    (basis,) = read(files, [Site(2, "attn_in")]).bases.values()
    assert float(basis[0].numpy() @ one[2]) == pytest.approx(
        float(np.linalg.norm(one[2])), rel=1e-6
    )
    with pytest.raises(PlaneError, match="name the sites"):
        read(files)
    with pytest.raises(PlaneError, match="name two GGUF files"):
        read(files[:1], [Site(2, "attn_in")])
    with pytest.raises(PlaneError, match="one of the layers 1, 2"):
        read(files, [Site(0, "attn_in")])
    with pytest.raises(PlaneError, match="parallel"):
        read([files[0], files[0]], [Site(2, "attn_in")])


@pytest.mark.parametrize("name", ["plane.pt", "a.npy", "a.gguf", "a.bin"])
def test_rubbish_is_one_line(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.write_bytes(b"rubbish")
    sources = [file, file] if name.endswith("gguf") else [file]
    for each in (file, tmp_path / f"no-{name}"):
        with pytest.raises(PlaneError) as caught:
            read([each] * len(sources), [Site(0, "attn_in")])
        assert "\n" not in str(caught.value)


@pytest.mark.skipif(not REFERENCE.exists(), reason="the published artifacts are not in a clone")
@pytest.mark.parametrize(
    ("name", "selected", "of"),
    [
        ("Llama-3.2-1B-Instruct", 18, 32),
        ("Qwen2.5-7B-Instruct", 26, 56),
        ("gemma-2-2b-it", 40, 104),
    ],
)
def test_the_published_planes_have_the_published_sites(name: str, selected: int, of: int) -> None:
    found = read([REFERENCE / f"calibration_{name}"])
    assert len(found.bases) == selected
    per_layer = 4 if "gemma" in name else 2
    assert found.num_layers * per_layer == of
    assert all(orthonormality_error(basis) <= 1e-6 for basis in found.bases.values())
