"""`make gpu-check`, rehearsed: all of it but the GPU."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
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


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Any]]:
    """The check's modules by name, as its own process imports them."""
    monkeypatch.setattr(sys, "path", [str(CHECK), str(CHECK.parent), *sys.path])
    before = set(sys.modules)
    yield importlib.import_module
    for name in ("engine", "exactness", "serving", "findings", "figures"):
        if name not in before:
            sys.modules.pop(name, None)


def test_an_answer_that_is_not_a_number_is_a_fault(steps: Callable[[str], Any]) -> None:
    """Nor does it excuse another: what unsteered answers are off by is a steered one's measure."""
    engine = steps("engine")
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


@pytest.mark.parametrize(
    ("choices", "prompt_logprobs"),
    [([], [0.0]), ([[3]], [0.0]), ([[3, 4], [3, 4]], [0.0]), ([[3, 4]], None), ([[3, 4]], [9.0])],
    ids=["none", "short", "one too many", "unscored", "wrongly scored"],
)
def test_an_answer_that_is_not_whole_is_a_fault(
    steps: Callable[[str], Any], choices: list[list[int]], prompt_logprobs: list[float] | None
) -> None:
    oracle = mock.Mock()
    oracle.logprobs.return_value = torch.zeros(4, 8, dtype=torch.float64)
    ask = traffic.Ask([1, 2], [], None, tokens=2, prompt_logprobs=True)

    def found(choices: list[list[int]], scores: list[float] | None) -> Any:
        replies = [traffic.Choice(tokens, [0.0] * len(tokens)) for tokens in choices]
        return steps("engine").compared(oracle, [ask], [traffic.Reply(replies, scores)])

    assert found([[3, 4]], [0.0]).within(1.0)
    assert not found(choices, prompt_logprobs).within(1.0)


def test_nothing_is_claimed_of_what_was_not_compared(
    steps: Callable[[str], Any], tmp_path: Path
) -> None:
    findings = steps("findings").Findings("exactness", tmp_path / "found.jsonl", limit=0)
    steps("exactness").run(findings, rehearse=False, widths=None)
    assert (findings.held, findings.failed) == (False, False)


@pytest.mark.parametrize(
    ("plain", "steered", "holds"), [(1.0, 0.995, True), (1.0, 0.98, False), (0.97, 0.995, None)]
)
def test_engines_that_differ_by_more_than_the_bound_tell_nothing(
    steps: Callable[[str], Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    plain: float,
    steered: float,
    holds: bool | None,
) -> None:
    serving, figures = steps("serving"), steps("figures")
    speed = {"plain": 1.0, "second": plain, "selected": steered}
    monkeypatch.setattr(
        serving, "ask", lambda engines, way, load: figures.Run(speed[way.engine], 1.0, 1.0)
    )
    findings = steps("findings").Findings("serving", tmp_path / "found.jsonl", limit=60)
    ways, load = serving.WAYS[:1] + serving.WAYS[2:], serving.Load(8, 32, 96)
    serving._compare(findings, {}, ways, [load], rehearse=False, share=1.0)
    second, selected = (
        found
        for found in map(json.loads, (tmp_path / "found.jsonl").read_text().splitlines())
        if "claim" in found
    )
    assert second["holds"] is None
    assert selected["holds"] is holds


@pytest.mark.parametrize(
    ("device", "words", "published"),
    [("a GPU", [], True), (None, [], False), ("a GPU", ["--output", "elsewhere"], False)],
    ids=["GPU", "no GPU", "elsewhere"],
)
def test_a_gpus_findings_are_published(
    steps: Callable[[str], Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    device: str | None,
    words: list[str],
    published: bool,
) -> None:
    """What a machine without one finds does not take their place."""
    steps("findings")
    spec = importlib.util.spec_from_file_location("gpu_check_main", CHECK / "__main__.py")
    assert spec is not None
    assert spec.loader is not None
    main = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(main)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(main, "WORKING", tmp_path / "build/gpu_check.jsonl")
    monkeypatch.setattr(main, "PUBLISHED", tmp_path / "published.jsonl")
    page = mock.Mock()
    monkeypatch.setattr(main.subprocess, "run", page)
    monkeypatch.setattr(main.signal, "signal", mock.Mock())

    def check(options: Any) -> int:
        options.output.parent.mkdir(exist_ok=True)
        found = {"step": "exactness", "claim": "exact", "holds": True, "figure": "0"}
        options.output.write_text(json.dumps(found | ({"device": device} if device else {})))
        raise KeyboardInterrupt

    monkeypatch.setattr(main, "check", check)
    with pytest.raises(KeyboardInterrupt):
        main.main(words)
    assert (tmp_path / "published.jsonl").exists() is published
    assert page.called is published


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
