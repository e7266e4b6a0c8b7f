"""The server knows a plane's model by the weights that it loaded."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import engines
import published
import tiny
from planes import random_plane
from steering_planes import Plane, PlaneError
from steering_planes.formats import import_plane

OPTIONS: dict[str, Any] = {
    "in_process": True,
    "skip_tokenizer_init": True,
    "max_model_len": 64,
    "gpu_memory_utilization": 0.9,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "Some-Model"
    tiny.make("llama", folder)
    return folder


@pytest.fixture(scope="module")
def plane(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Imported for `model`, and so with its fingerprint."""
    folder = tmp_path_factory.mktemp("planes")
    source = published.PUBLISHED["IBM activation-steering"](folder)
    made = import_plane(source.sources, name="mood", base_model=str(model), sites="1-3")
    assert made.config.fingerprint is not None
    made.save(folder / "mood")
    return folder / "mood"


def variant(model: Path, folder: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> Path:
    shutil.copytree(model, folder)
    file = folder / "model.safetensors"
    weights = {name: change(name, tensor) for name, tensor in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    return folder


def start(model: Path, plane: Path, **options: Any) -> None:
    for _ in engines.start(model, {"mood": plane}, **{**OPTIONS, **options}):
        pass


def fp8(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """What an FP8 checkpoint keeps of a weight; norms it leaves alone."""
    if tensor.ndim == 1:
        return tensor
    scale = tensor.abs().max() / 448
    return (tensor / scale).to(torch.float8_e4m3fn).to(tensor.dtype) * scale


def tuned(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if tensor.ndim != 1:
        return tensor
    return tensor * (
        1 + 5e-3 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(3))
    )


def test_the_same_weights_pass_under_any_name_and_in_any_dtype(
    model: Path, plane: Path, tmp_path: Path
) -> None:
    renamed = variant(model, tmp_path / "quantised-under-another-name", fp8)
    for dtype in ("float32", "bfloat16", "float16"):
        start(renamed, plane, dtype=dtype)


def test_a_fine_tune_of_the_same_name_is_refused_unless_allowed(
    model: Path, plane: Path, tmp_path: Path
) -> None:
    other = variant(model, tmp_path / model.name, tuned)
    with pytest.raises(PlaneError, match=r"fingerprint=0\.00\d+: the served model's norms differ"):
        start(other, plane)
    start(other, plane, steering={"allow_model_mismatch": True})


def test_a_plane_without_a_fingerprint_goes_by_name_and_the_log_says_so(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = {"model_type": "llama", "hidden_size": 128, "num_layers": 4}
    bare = random_plane(
        tmp_path / "mood", ["1.mlp_in"], base_model_name_or_path=model.name, **shape
    )
    assert Plane.load(bare).config.fingerprint is None
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    # Whatever level another test's command has set.
    caplog.set_level(logging.INFO, logger="vllm")
    start(model, bare)
    assert "Plane mood has no fingerprint of its base model's weights: it goes by" in caplog.text
    renamed = variant(model, tmp_path / "another-name", lambda name, tensor: tensor)
    with pytest.raises(PlaneError, match="base_model_name_or_path"):
        start(renamed, bare)
