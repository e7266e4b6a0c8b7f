"""`make gpu-check`, rehearsed: all of it but the GPU."""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import traffic

ROOT = Path(__file__).parents[2]
CHECK = ROOT / "benchmarks/gpu_check"
MINUTES = 4


def run(
    *words: str, output: Path, environment: dict[str, str] | None = None
) -> tuple[int, list[dict[str, Any]], str]:
    """Its exit status, its verdicts, and what it printed."""
    done = subprocess.run(
        [sys.executable, str(CHECK), "--output", str(output), *words],
        env={**os.environ, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    found = [json.loads(line) for line in output.read_text().splitlines()]
    return done.returncode, [f for f in found if "claim" in f], done.stdout


def test_every_step_can_be_rehearsed(tmp_path: Path) -> None:
    began = time.monotonic()
    status, verdicts, said = run("--rehearse", output=tmp_path / "found.jsonl")
    assert status == 0, said[-4000:]
    assert time.monotonic() - began <= 60 * MINUTES
    assert not [v for v in verdicts if v["holds"] is False]
    held = {v["step"] for v in verdicts if v["holds"]}
    # Times of a CPU say nothing: those two steps show that they can be measured.
    assert held == {"exactness", "engine"}
    assert {v["step"] for v in verdicts} == {"exactness", "speed", "engine", "serving"}


def test_an_answer_that_is_not_a_number_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does it excuse another: what unsteered answers are off by is a steered one's measure."""
    monkeypatch.setattr(sys, "path", [str(CHECK), str(CHECK.parent), *sys.path])
    engine = importlib.import_module("engine")
    oracle = mock.Mock()
    oracle.logprobs.return_value = torch.zeros(4, 8, dtype=torch.float64)
    ask = traffic.Ask([1, 2], [], None, tokens=2)

    def found(*logprobs: float) -> Any:
        reply = traffic.Reply(choices=[traffic.Choice([3, 4], list(logprobs))])
        return engine.compared(oracle, [ask], [reply])

    assert found(0.0, 0.25).within(0.25)
    assert not found(0.0, 0.25).within(0.2)
    broken = found(0.0, math.nan)
    assert not broken.within(1.0)
    assert not found(math.nan, 0.0).within(engine.NOISE * broken.largest)
    sys.modules.pop("engine")
    sys.modules.pop("findings")


@pytest.mark.parametrize(
    ("package", "steps"),
    [
        ("torch", ("exactness", "speed", "engine", "serving")),
        ("triton", ("exactness", "speed")),
        ("vllm", ("engine", "serving")),
        ("transformers", ("engine", "serving")),
    ],
)
def test_a_missing_package_ends_a_step_by_its_name(
    tmp_path: Path, package: str, steps: tuple[str, ...]
) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.partition('.')[0] == {package!r}:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Absent())\n"
    )
    # The interpreter's folder has a sitecustomize of its own; ours must come first.
    environment = {"PYTHONPATH": str(tmp_path)}
    status, verdicts, said = run(
        "--rehearse", "--steps", *steps, output=tmp_path / "found.jsonl", environment=environment
    )
    assert status == 2, said[-4000:]
    assert [(v["step"], v["holds"]) for v in verdicts] == [(step, None) for step in steps]
    for verdict in verdicts:
        assert f"no {package}" in verdict["figure"]
    assert "Traceback" not in said


def test_kernels_need_nothing_but_torch_and_triton() -> None:
    """Neither pydantic nor safetensors, which a bare GPU machine may lack."""
    code = (
        "import sys\n"
        "for name in ('pydantic', 'safetensors', 'huggingface_hub', 'vllm', 'transformers'):\n"
        "    sys.modules[name] = None\n"
        "import steering_kernels, steering_kernels.norm_kernel, cases\n"
    )
    folders = ("steering_vectors", "kernels", "tests/support")
    path = os.pathsep.join(str(ROOT / folder) for folder in folders)
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_without_a_gpu_nothing_is_claimed(tmp_path: Path) -> None:
    status, verdicts, _ = run(
        "--steps", "exactness", output=tmp_path / "found.jsonl",
        environment={"CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert status == 2
    assert [(v["holds"], v["figure"]) for v in verdicts] == [(None, "torch sees none")]


def test_a_step_that_breaks_is_a_verdict(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "from steering_kernels import reference\n"
        "def broken(*args):\n"
        "    raise RuntimeError('no such kernel')\n"
        "reference.steer = broken\n"
    )
    status, verdicts, said = run(
        "--rehearse", "--steps", "exactness", output=tmp_path / "found.jsonl",
        environment={"PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert status == 1, said[-4000:]
    (verdict,) = verdicts
    assert (verdict["holds"], verdict["figure"]) == (False, "RuntimeError: no such kernel")
