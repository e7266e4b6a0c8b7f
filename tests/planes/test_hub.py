"""`hf://` is the Hub's cache, its JSON and its safetensors."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from planes import random_plane
from steering_planes import Plane, PlaneError, open_plane
from steering_planes.hub import fetch

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def plane(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plane:
    """A plane at org/mood, revision v1, in a Hub cache; in its folder `deep` as well."""
    import huggingface_hub.constants

    cache = tmp_path / "hub"
    repository = cache / "models--org--mood"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.parent.mkdir(parents=True)
    random_plane(snapshot, ["3.mlp_in"], name="mood")
    shutil.copytree(snapshot, tmp_path / "copy")
    (tmp_path / "copy").rename(snapshot / "deep")
    refs = repository / "refs"
    refs.mkdir()
    (refs / "v1").write_text(COMMIT)
    (refs / "main").write_text(COMMIT)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return Plane.load(snapshot)


@pytest.mark.parametrize(
    "location",
    ["hf://org/mood@v1", "hf://org/mood", f"hf://org/mood@{COMMIT}", "hf://org/mood/deep"],
)
def test_a_cached_repository_is_a_plane(plane: Plane, location: str) -> None:
    assert open_plane(location).digest == plane.digest


@pytest.mark.parametrize(
    ("location", "rule"),
    [
        ("hf://mood", "must be hf://organisation/repository"),
        ("hf://datasets/mood", "must be hf://organisation/repository"),
        ("hf://org/../mood/x y", "must be hf://organisation/repository"),
        ("hf://org/other", "can't be had"),
        ("hf://org/mood@v2", "can't be had"),
        ("hf://org/mood/none", "must be a folder"),
    ],
)
def test_what_is_not_there_is_one_line(plane: Plane, location: str, rule: str) -> None:
    with pytest.raises(PlaneError, match=rule) as caught:
        open_plane(location)
    assert "\n" not in str(caught.value)


def test_a_data_sets_repository_holds_planes_too(plane: Plane, tmp_path: Path) -> None:
    (tmp_path / "hub/models--org--mood").rename(tmp_path / "hub/datasets--org--mood")
    for location in ("hf://datasets/org/mood", "hf://datasets/org/mood/deep@v1"):
        assert open_plane(location).digest == plane.digest
    with pytest.raises(PlaneError, match="can't be had"):
        open_plane("hf://org/mood")


def test_any_file_may_be_fetched(plane: Plane, tmp_path: Path) -> None:
    snapshot = tmp_path / f"hub/models--org--mood/snapshots/{COMMIT}"
    (snapshot / "qwen").mkdir()
    (snapshot / "qwen/assistant_axis.pt").write_bytes(b"x")
    assert fetch("hf://org/mood/qwen/assistant_axis.pt").read_bytes() == b"x"
    assert fetch("hf://org/mood/qwen@v1") == snapshot / "qwen"
    assert fetch(tmp_path) == tmp_path
    with pytest.raises(PlaneError, match="is not in org/mood, or not in the Hub's cache"):
        fetch("hf://org/mood/none.pt")


@pytest.mark.parametrize(
    ("location", "wanted"),
    [
        ("hf://org/mood/Llama-3.1-8B", {"Llama-3.1-8B/plane.pt", "Llama-3.1-8B/config.json"}),
        (
            "hf://org/mood/Llama-3.1-8B/plane.pt",
            {"Llama-3.1-8B/plane.pt", "Llama-3.1-8B/config.json"},
        ),
        ("hf://org/mood/v.gguf", {"v.gguf"}),
        ("hf://org/mood/v.bin", {"v.bin"}),
        ("hf://org/mood", {"v.gguf", "Llama-3.1-8B/plane.pt", "Llama-3.1-8B/config.json"}),
    ],
)
def test_what_is_downloaded(
    location: str, wanted: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a repository that holds models' weights too."""
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    holds = ["Llama-3.1-8B/plane.pt", "Llama-3.1-8B/config.json", "v.gguf", "v.bin", "other/a.txt"]

    def download(repository: str, *, allow_patterns: list[str], **_: object) -> str:
        for name in filter_repo_objects(holds, allow_patterns=allow_patterns):
            file = tmp_path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(b"")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert fetch(location).exists()
    assert {str(f.relative_to(tmp_path)) for f in tmp_path.rglob("*") if f.is_file()} == wanted


def test_a_folder_stays_a_folder(tmp_path: Path) -> None:
    path = random_plane(tmp_path / "mood", ["3.mlp_in"])
    assert open_plane(path).digest == open_plane(str(path)).digest == Plane.load(path).digest
