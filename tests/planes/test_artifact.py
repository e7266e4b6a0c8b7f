"""steering_planes.artifact: a plane survives its files, and bad files are refused by name."""

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from planes import random_plane
from steering_planes.artifact import (
    CONFIG_FILE,
    TENSORS_FILE,
    ClassMeans,
    Extraction,
    Plane,
    PlaneConfig,
    PlaneError,
    model_names,
)
from steering_planes.sites import Site

HIDDEN = 8
SITES = (Site(1, "attn_in"), Site(1, "mlp_in"))
MEANS = {
    SITES[0]: ClassMeans((1.5, 0.25), (-0.5, 0.75), 2.5),
    SITES[1]: ClassMeans((0.1, -0.2), (-0.3, 0.4), 0.5),
}
VERSION_1 = Path(__file__).parent / "version_1"
"""A plane as it was written before there were class means."""


def config(**changes: Any) -> PlaneConfig:
    fields: dict[str, Any] = {
        "name": "mood",
        "base_model_name_or_path": "some-org/Small-Model",
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "num_layers": 4,
        "sites": SITES,
        "default_mode": "rotate_to",
        "extraction": Extraction(method="difference of means", data="mood.json", n=80, seed=0),
        "statistics": {"1.attn_in": {"mean_positive": 0.5}, "3.mlp_in": {"mean_positive": 0.1}},
    }
    return PlaneConfig(**(fields | changes))


def basis(seed: int = 0) -> Tensor:
    q, _ = torch.linalg.qr(torch.randn(HIDDEN, 2, generator=torch.Generator().manual_seed(seed)))
    return q.T.contiguous()


def plane(**changes: Any) -> Plane:
    built = config(**changes)
    return Plane(built, {site: basis(seed) for seed, site in enumerate(built.sites)}, MEANS)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    plane().save(tmp_path / "mood")
    return tmp_path / "mood"


def edit_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads((folder / CONFIG_FILE).read_text())
    change(data)
    (folder / CONFIG_FILE).write_text(json.dumps(data))


def edit_tensors(
    folder: Path,
    change: Callable[[dict[str, Tensor]], object] = lambda tensors: None,
    metadata: dict[str, str] | None = None,
) -> None:
    """Rewrite the tensors file, with the right metadata unless other is given."""
    tensors = load_file(folder / TENSORS_FILE)
    change(tensors)
    save_file(tensors, folder / TENSORS_FILE, metadata or plane()._metadata())


def refusal(folder: Path) -> PlaneError:
    with pytest.raises(PlaneError) as caught:
        Plane.load(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert str(folder) in message
    assert caught.value.rule in message
    return caught.value


def test_a_plane_comes_back_as_it_was(folder: Path) -> None:
    before, after = plane(), Plane.load(folder)
    assert after.config == before.config
    assert after.digest == before.digest
    assert after.name == "mood"
    assert after.sites == SITES
    for site in SITES:
        assert torch.equal(after.bases[site], before.bases[site])
    assert after.means == before.means == MEANS
    assert after.modes == ("rotate_by", "rotate_to", "add", "ablate", "cap")


def test_the_tensors_are_named_as_documented(folder: Path) -> None:
    tensors = load_file(folder / TENSORS_FILE)
    assert tensors.keys() == {
        f"layers.1.{role}.{part}"
        for role in ("attn_in", "mlp_in")
        for part in ("basis", "means", "rho")
    }
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert tensors["layers.1.attn_in.means"].tolist() == [[1.5, 0.25], [-0.5, 0.75]]
    assert tensors["layers.1.attn_in.rho"].tolist() == [2.5]


finite = st.floats(-1e30, 1e30)


@given(*[finite] * 4, st.floats(1e-30, 1e30))
def test_any_means_come_back_as_they_were(
    tmp_path_factory: pytest.TempPathFactory, c1: float, c2: float, d1: float, d2: float, rho: float
) -> None:
    means = ClassMeans((c1, c2), (d1, d2), rho)
    before = Plane(config(), {site: basis() for site in SITES}, dict.fromkeys(SITES, means))
    folder = tmp_path_factory.mktemp("any") / "mood"
    before.save(folder)
    after = Plane.load(folder)
    assert after.means == dict.fromkeys(SITES, means)
    assert after.digest == before.digest
    # Rounded when made, to the nearest, and not again.
    held = np.array([*means.positive, *means.negative, means.rho])
    assert np.array_equal(held, np.array([c1, c2, d1, d2, rho], np.float32))


def test_torchs_defaults_do_not_matter() -> None:
    """A model that is being loaded sets others."""
    digest, again = plane().digest, plane()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            assert ClassMeans((0.1, -0.2), (-0.3, 0.4), 0.5) == MEANS[SITES[1]]
            assert again.digest == digest
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_plane_of_version_1_is_what_it_was(tmp_path: Path) -> None:
    loaded = Plane.load(VERSION_1)
    assert loaded.config.format_version == 1
    assert loaded.means is None
    assert loaded.modes == ("rotate_by", "rotate_to", "ablate")
    digest = "0de741c68262673c44785c5377bd96f700b25fdb5a5a57adc8300cf73321106d"
    assert loaded.digest == digest
    loaded.save(tmp_path / "mood")
    again = tmp_path / "mood"
    assert (again / CONFIG_FILE).read_bytes() == (VERSION_1 / CONFIG_FILE).read_bytes()
    # Tensor by tensor: safetensors writes its metadata in any order.
    old, new = (load_file(path / TENSORS_FILE) for path in (VERSION_1, again))
    assert old.keys() == new.keys()
    assert all(torch.equal(old[name], new[name]) for name in old)
    with safe_open(again / TENSORS_FILE, "pt") as opened:
        assert opened.metadata()["format_version"] == "1"
        assert opened.metadata()["digest"] == digest


def test_a_file_that_names_no_version_is_of_the_first(tmp_path: Path) -> None:
    copied = tmp_path / "mood"
    shutil.copytree(VERSION_1, copied)
    edit_config(copied, lambda data: data.pop("format_version"))
    assert Plane.load(copied).digest == Plane.load(VERSION_1).digest


def test_the_digest_is_hex_and_knows_every_part() -> None:
    digest = plane().digest
    assert len(digest) == 64
    assert int(digest, 16)
    others = [
        plane(name="other"),
        plane(default_angle=10.0),
        plane(gate=0.0),
        plane(statistics={}),
        Plane(config(), {SITES[0]: basis(1), SITES[1]: basis(0)}, MEANS),
        Plane(config(), plane().bases, {SITES[0]: MEANS[SITES[1]], SITES[1]: MEANS[SITES[0]]}),
        *(
            Plane(config(), plane().bases, MEANS | {SITES[0]: replace(MEANS[SITES[0]], **change)})
            for change in ({"positive": (1.5, 0.5)}, {"negative": (0.0, 0.75)}, {"rho": 2.75})
        ),
        Plane(config(format_version=1), plane().bases),
    ]
    assert len({digest, *(other.digest for other in others)}) == len(others) + 1


def test_the_digest_ignores_order_and_layout(folder: Path) -> None:
    def reorder(data: dict[str, Any]) -> None:
        data["sites"].reverse()
        for key in sorted(data):
            data[key] = data.pop(key)

    edit_config(folder, reorder)
    assert Plane.load(folder).digest == plane().digest
    reordered = Plane(
        config(sites=SITES[::-1]),
        dict(reversed(plane().bases.items())),
        dict(reversed(MEANS.items())),
    )
    assert reordered.digest == plane().digest


def test_a_loaded_plane_can_not_be_changed(folder: Path) -> None:
    loaded = Plane.load(folder)
    with pytest.raises(TypeError):
        loaded.bases[SITES[0]] = basis(5)  # type: ignore[index]
    with pytest.raises(TypeError):
        loaded.means[SITES[0]] = MEANS[SITES[1]]  # type: ignore[index]
    with pytest.raises(ValidationError):
        loaded.config.name = "other"


def test_save_refuses_an_existing_target_and_leaves_it(folder: Path) -> None:
    before = Plane.load(folder).digest
    with pytest.raises(FileExistsError, match="mood"):
        plane(default_angle=1.0).save(folder)
    assert Plane.load(folder).digest == before
    plane(default_angle=1.0).save(folder, overwrite=True, readme="# Mood\n")
    assert Plane.load(folder).config.default_angle == 1.0
    assert (folder / "README.md").read_text() == "# Mood\n"
    assert [child.name for child in folder.parent.iterdir()] == ["mood"]


def test_all_files_can_be_read_by_whom_the_config_can(folder: Path) -> None:
    modes = {(folder / file).stat().st_mode for file in (CONFIG_FILE, TENSORS_FILE)}
    assert len(modes) == 1


def test_a_failed_save_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("steering_planes.artifact.save_file", full)
    with pytest.raises(OSError, match="disk full"):
        plane().save(tmp_path / "mood")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_overwrite_keeps_the_old_plane(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def fails_for_new(self: Path, target: Path) -> Path:
        if self.name == "new":
            raise OSError("disk full")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails_for_new)
    with pytest.raises(OSError, match="disk full"):
        plane(default_angle=1.0).save(folder, overwrite=True)
    assert Plane.load(folder).digest == plane().digest


def test_missing_folder_and_files(tmp_path: Path, folder: Path) -> None:
    assert refusal(tmp_path / "nowhere").field == "path"
    (folder / TENSORS_FILE).rename(folder / "away")
    assert TENSORS_FILE in str(refusal(folder))
    (folder / CONFIG_FILE).unlink()
    assert CONFIG_FILE in str(refusal(folder))


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b'{"name": "\xff"}', b"\x80\x04."])
def test_config_that_is_no_json_object(folder: Path, text: bytes) -> None:
    (folder / CONFIG_FILE).write_bytes(text)
    assert refusal(folder).field == "config"


@pytest.mark.parametrize(
    ("key", "value", "field"),
    [
        ("format_version", 3, "format_version"),
        ("format_version", "2", "format_version"),
        ("name", "../etc", "name"),
        ("name", "", "name"),
        ("name", "a" * 65, "name"),
        ("name", "mood\n", "name"),
        ("hidden_size", "8", "hidden_size"),
        ("num_layers", 0, "num_layers"),
        ("default_mode", "rotate", "default_mode"),
        ("default_angle", 361, "default_angle"),
        ("gate", float("nan"), "gate"),
        ("gate", float("inf"), "gate"),
        ("sites", [], "sites"),
        ("sites", [{"layer": 1, "role": "q_norm"}], "sites.0"),
        ("sites", [{"layer": -1, "role": "attn_in"}], "sites.0"),
        ("sites", [{"layer": 1, "role": "attn_in"}] * 2, "sites"),
        ("sites", [{"layer": 4, "role": "attn_in"}], "config"),
        ("statistics", {"4.attn_in": {}}, "config"),
        ("statistics", {"attn_in": {}}, "config"),
        ("extraction", {"method": "x", "data": "y", "n": 0}, "extraction.n"),
        ("surprise", 1, "surprise"),
    ],
)
def test_a_wrong_field_is_named(folder: Path, key: str, value: object, field: str) -> None:
    edit_config(folder, lambda data: data.update({key: value}))
    assert refusal(folder).field == field


def test_a_missing_field_is_named(folder: Path) -> None:
    edit_config(folder, lambda data: data.pop("hidden_size"))
    error = refusal(folder)
    assert error.field == "hidden_size"
    assert "required" in error.rule


def test_tensors_cut_short(folder: Path) -> None:
    file = folder / TENSORS_FILE
    whole = file.read_bytes()
    for length in (0, 7, 100, len(whole) - 1):
        file.write_bytes(whole[:length])
        assert "safetensors" in refusal(folder).rule


def test_tensors_that_are_a_folder(folder: Path) -> None:
    (folder / TENSORS_FILE).unlink()
    (folder / TENSORS_FILE).mkdir()
    refusal(folder)


FIRST = "layers.1.attn_in.basis"


def with_entry(value: float) -> Tensor:
    spoiled = basis()
    spoiled[0, 0] = value
    return spoiled


@pytest.mark.parametrize(
    ("tensor", "field", "rule"),
    [
        (basis()[:, :-1].contiguous(), f"{FIRST}.shape", r"[2, 8]"),
        (basis().T.contiguous(), f"{FIRST}.shape", r"[2, 8]"),
        (basis().bfloat16(), f"{FIRST}.dtype", "float32"),
        (with_entry(float("nan")), FIRST, "finite"),
        (with_entry(float("inf")), FIRST, "finite"),
        (basis() * 1.00002, FIRST, "orthonormal"),
        (basis()[[0, 0]], FIRST, "orthonormal"),
    ],
)
def test_a_wrong_basis_is_named(folder: Path, tensor: Tensor, field: str, rule: str) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({FIRST: tensor}))
    error = refusal(folder)
    assert error.field == field
    assert rule in error.rule


MEANS_FIRST, RHO_FIRST = "layers.1.attn_in.means", "layers.1.attn_in.rho"
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("name", "tensor", "field", "rule"),
    [
        (MEANS_FIRST, torch.zeros(2, 3), f"{MEANS_FIRST}.shape", "[2, 2]"),
        (MEANS_FIRST, torch.zeros(4), f"{MEANS_FIRST}.shape", "[2, 2]"),
        (MEANS_FIRST, torch.zeros(2, 2).double(), f"{MEANS_FIRST}.dtype", "float32"),
        (MEANS_FIRST, torch.tensor([[0, NAN], [0, 0]]), MEANS_FIRST, "finite"),
        (MEANS_FIRST, torch.tensor([[0, 0], [-INF, 0]]), MEANS_FIRST, "finite"),
        (RHO_FIRST, torch.tensor(1.0), f"{RHO_FIRST}.shape", "[1]"),
        (RHO_FIRST, torch.ones(2), f"{RHO_FIRST}.shape", "[1]"),
        (RHO_FIRST, torch.ones(1).half(), f"{RHO_FIRST}.dtype", "float32"),
        (RHO_FIRST, torch.tensor([0.0]), RHO_FIRST, "above 0"),
        (RHO_FIRST, torch.tensor([-1.0]), RHO_FIRST, "above 0"),
        (RHO_FIRST, torch.tensor([NAN]), RHO_FIRST, "finite"),
        (RHO_FIRST, torch.tensor([INF]), RHO_FIRST, "finite"),
    ],
)
def test_wrong_class_means_are_named(
    folder: Path, name: str, tensor: Tensor, field: str, rule: str
) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({name: tensor}))
    error = refusal(folder)
    assert error.field == field
    assert rule in error.rule
    assert TENSORS_FILE in str(error)


@pytest.mark.parametrize("name", [FIRST, MEANS_FIRST, RHO_FIRST])
def test_missing_and_extra_tensors(folder: Path, name: str) -> None:
    extra = name.replace("layers.1", "layers.2")
    edit_tensors(folder, lambda tensors: tensors.update({extra: tensors[name].clone()}))
    error = refusal(folder)
    assert (error.field, error.value) == ("tensor", extra)
    edit_tensors(folder, lambda tensors: (tensors.pop(extra), tensors.pop(name)))
    error = refusal(folder)
    assert (error.field, error.value) == ("tensor", name)
    assert "missing" in error.rule


def test_the_tensors_of_the_other_version_are_noticed(folder: Path) -> None:
    edit_config(folder, lambda data: data.update(format_version=1))
    error = refusal(folder)
    assert error.value == MEANS_FIRST
    assert "format_version 1" in error.rule
    edit_config(folder, lambda data: data.update(format_version=2))
    edit_tensors(
        folder,
        lambda tensors: [tensors.pop(name) for name in list(tensors) if "basis" not in name],
    )
    assert refusal(folder).value == MEANS_FIRST


@pytest.mark.parametrize("key", ["format_version", "base_model_name_or_path", "digest"])
def test_metadata_must_agree_with_the_config(folder: Path, key: str) -> None:
    metadata = plane()._metadata()
    edit_tensors(folder, metadata=metadata | {key: "other"})
    assert refusal(folder).field == f"metadata.{key}"
    del metadata[key]
    edit_tensors(folder, metadata=metadata)
    assert refusal(folder).field == f"metadata.{key}"


def test_tensors_of_another_plane_are_noticed(folder: Path, tmp_path: Path) -> None:
    Plane(config(), {site: basis(9) for site in SITES}, MEANS).save(tmp_path / "other")
    (tmp_path / "other" / CONFIG_FILE).replace(folder / CONFIG_FILE)
    edit_config(folder, lambda data: data.update(default_angle=3))
    assert refusal(folder).field == "metadata.digest"


def test_a_plane_in_memory_is_checked_too() -> None:
    with pytest.raises(PlaneError, match="orthonormal"):
        Plane(config(), {site: 2 * basis() for site in SITES}, MEANS)
    with pytest.raises(PlaneError, match=r"1\.attn_in, 1\.mlp_in"):
        Plane(config(), {SITES[0]: basis()}, MEANS)


@pytest.mark.parametrize(
    ("version", "means", "message"),
    [
        (2, None, r"means=None: must be class means for each of 1\.attn_in, 1\.mlp_in"),
        (2, {SITES[0]: MEANS[SITES[0]]}, r"means=1\.attn_in: must be class means for each of"),
        (2, MEANS | {Site(2, "attn_in"): MEANS[SITES[0]]}, r"means=.*2\.attn_in: must be"),
        (1, MEANS, r"means=1\.attn_in, 1\.mlp_in: must be None: format_version 1"),
        (1, {}, r"means=.*: must be None"),
        (2, MEANS | {SITES[1]: ClassMeans((0, 0), (0, 0), 0)}, r"1\.mlp_in\.rho=0\.0: must be"),
        # What float32 holds counts.
        (2, MEANS | {SITES[1]: ClassMeans((0, 0), (0, 0), 1e-60)}, r"1\.mlp_in\.rho=0\.0: must"),
        (2, MEANS | {SITES[1]: ClassMeans((0, 1e60), (0, 0), 1)}, r"1\.mlp_in\.means=inf: must"),
    ],
)
def test_the_means_go_with_the_version(
    version: int, means: dict[Site, ClassMeans] | None, message: str
) -> None:
    with pytest.raises(PlaneError, match=message):
        Plane(config(format_version=version), plane().bases, means)


def test_random_planes_keep_their_bases_in_both_versions(tmp_path: Path) -> None:
    sites = ["3.mlp_in", "1.attn_in"]
    new = Plane.load(random_plane(tmp_path / "new", sites, seed=3))
    old = Plane.load(random_plane(tmp_path / "old", sites, seed=3, format_version=1))
    assert new.means is not None
    assert old.means is None
    assert all(torch.equal(new.bases[site], old.bases[site]) for site in new.sites)
    assert len(set(new.means.values())) == len(sites)
    assert all(0.5 <= of.rho <= 2 for of in new.means.values())


SERVED = {"hidden_size": HIDDEN, "num_layers": 4, "model_type": "llama"}


@pytest.mark.parametrize(
    "name",
    [
        "some-org/Small-Model",
        "small-model",
        "/cache/Small-Model/",
        "other-org/SMALL-MODEL",
        "/hub/models--some-org--Small-Model/snapshots/0123abcd",
    ],
)
def test_the_base_model_is_known_by_its_name(name: str) -> None:
    plane().check_model(**SERVED, name_or_path=name)  # type: ignore[arg-type]


def test_a_renamed_folder_is_known_by_its_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"_name_or_path": "some-org/Small-Model"}')
    plane().check_model(**SERVED, name_or_path=str(tmp_path))  # type: ignore[arg-type]
    (tmp_path / "config.json").write_text("[]")
    assert model_names(str(tmp_path)) == {tmp_path.name.lower()}


@pytest.mark.parametrize(
    ("served", "field"),
    [
        ({"model_type": "qwen2"}, "model_type"),
        ({"name_or_path": "some-org/Small-Model-Instruct"}, "base_model_name_or_path"),
    ],
)
def test_another_model_is_refused_unless_allowed(served: dict[str, Any], field: str) -> None:
    arguments = SERVED | {"name_or_path": "Small-Model"} | served
    with pytest.raises(PlaneError, match="unless a mismatch is allowed") as caught:
        plane().check_model(**arguments)
    assert caught.value.field == field
    plane().check_model(**arguments, allow_mismatch=True)


@pytest.mark.parametrize("field", ["hidden_size", "num_layers"])
def test_another_shape_is_always_refused(field: str) -> None:
    arguments: dict[str, Any] = SERVED | {"name_or_path": "Small-Model", field: 5}
    for allow in (False, True):
        with pytest.raises(PlaneError, match=f"{field}=5"):
            plane().check_model(**arguments, allow_mismatch=allow)


def test_a_killed_save_leaves_no_half_of_a_plane(tmp_path: Path) -> None:
    """The process dies between the last file and the folder's name."""
    script = f"""
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parents[1] / "support")!r})
from planes import random_plane
Path.rename = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
random_plane(Path({str(tmp_path / "mood")!r}), ["3.mlp_in"])
"""
    run = subprocess.run([sys.executable, "-c", script], check=False)
    assert run.returncode == -signal.SIGKILL
    assert not (tmp_path / "mood").exists()
    # What is left bears no plane's name, and is no hindrance to the next run.
    assert all(left.name.startswith(".mood.") for left in tmp_path.iterdir())
    random_plane(tmp_path / "mood", ["3.mlp_in"])
    Plane.load(tmp_path / "mood")
