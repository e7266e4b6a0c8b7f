"""Settings that a worker gets are those that the server resolved, or it does not start."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import steering_kernels
from planes import random_plane
from steering_planes import Site
from steering_server.engine import settings as module
from steering_server.engine.settings import Settings, SettingsError, graph_code

CPU = torch.device("cpu")


@pytest.fixture
def resolved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    settings = Settings(planes={"mood": str(random_plane(tmp_path / "mood", ["1.attn_in"]))})
    return settings.resolved(settings.load_planes(), CPU)


def test_a_worker_reads_what_was_resolved(resolved: Settings) -> None:
    there = Settings.parse(resolved.model_dump(mode="json"))
    assert there == resolved
    assert there.parsed_sites() == (Site.parse("1.attn_in"),)
    assert there.kernels_on(CPU).kernels == there.chosen == "torch"


def test_planes_without_sites_steer_nothing_and_are_refused() -> None:
    with pytest.raises(SettingsError, match=r"steering\.planes = \['mood'\] without sites"):
        Settings(planes={"mood": "path"}).parsed_sites()
    assert Settings().parsed_sites() == ()


def test_other_kernels_in_a_worker_are_refused(resolved: Settings) -> None:
    settings = resolved.model_copy(update={"chosen": "triton"})
    with pytest.raises(
        SettingsError, match=r"kernels = 'auto' is 'triton' where .* and 'torch' in"
    ):
        settings.kernels_on(CPU)


def test_kernels_that_cannot_run_stop_the_start(resolved: Settings) -> None:
    settings = resolved.model_copy(update={"kernels": "triton"})
    with pytest.raises(SettingsError, match=r"steering\.kernels = 'triton' on cpu: "):
        settings.resolved(settings.load_planes(), CPU)


@pytest.mark.parametrize(
    ("kernels", "asked", "where", "chosen"),
    [
        ("triton", "auto", {}, "fused"),
        ("triton", "auto", {"compiled": False}, "fused"),
        ("triton", "auto", {"all_reduce_fused": True}, "kept"),
        ("triton", "fused", {"all_reduce_fused": True}, "fused"),
        ("triton", "kept", {}, "kept"),
        ("torch", "auto", {}, "fused"),
        ("torch", "auto", {"compiled": False}, "kept"),
        ("torch", "auto", {"all_reduce_fused": True}, "kept"),
        ("torch", "fused", {"compiled": False}, "fused"),
    ],
)
def test_norms_are_ours_where_that_is_fewer_kernels(
    resolved: Settings,
    monkeypatch: pytest.MonkeyPatch,
    kernels: str,
    asked: str,
    where: dict[str, bool],
    chosen: str,
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    settings = resolved.model_copy(update={"kernels": kernels, "norms": asked})
    assert settings.resolved(settings.load_planes(), CPU, **where).chosen_norms == chosen


def test_other_code_in_a_worker_is_refused(resolved: Settings) -> None:
    settings = resolved.model_copy(update={"code": "0" * 64})
    with pytest.raises(SettingsError, match=r"worker's code .* the server's is 000000000000"):
        settings.kernels_on(CPU)


def test_every_source_of_the_graph_is_in_its_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels, engine = tmp_path / "steering_kernels", tmp_path / "engine"
    shutil.copytree(Path(steering_kernels.__file__).parent, kernels)
    shutil.copytree(Path(module.__file__).parent, engine)
    before = graph_code()
    monkeypatch.setattr(steering_kernels, "__file__", str(kernels / "__init__.py"))
    monkeypatch.setattr(module, "__file__", str(engine / "settings.py"))
    assert graph_code() == before
    seen = {before}
    files = [*kernels.glob("*.py"), *(engine / name for name in ("bank.py", "rows.py", "sites.py"))]
    for file in files:
        file.write_text(file.read_text() + "\n")
        seen.add(graph_code())
    assert len(seen) == len(files) + 1
