"""What a GPU must show, as one command: `python benchmarks/gpu_check`, shortest steps first.

Needs no installation: torch and Triton for the first two steps, vLLM and transformers for the
others, on the path of the Python that runs it. `--rehearse` runs every step on a CPU, on Triton's
interpreter and at tiny shapes: it shows that the check itself works, and nothing of a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import tomllib
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from findings import Findings, read

ROOT = Path(__file__).parents[2]
SOURCES = ("steering_vectors", "kernels", "server", "tests/support", "benchmarks")
INTERPRETER = ROOT / "tests/support/interpreter"
KERNELS = ("exactness", "speed")
STEPS = {"exactness": 60, "speed": 90, "engine": 150, "serving": 400}
"""Step, a module beside this one -> the seconds that it may take."""
GRACE = 20
"""Seconds that a step may run over before it is ended."""
PASSED, FAILED, NOT_RUN = 0, 1, 2
WORKING = ROOT / "build/gpu_check.jsonl"
PUBLISHED = ROOT / "benchmarks/results/gpu_check.jsonl"


def check(options: argparse.Namespace) -> int:
    """Run the steps, each in a process of its own; the worst of their outcomes."""
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text("")
    outcomes = [PASSED]
    with tempfile.TemporaryDirectory() as folder:
        paths = _paths(Path(folder))
        for step in options.steps:
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
            if options.rehearse and step in KERNELS:
                environment["PYTHONPATH"] += f"{os.pathsep}{INTERPRETER}"
                environment["TRITON_INTERPRET"] = "1"
            limit = options.limit or STEPS[step]
            words = [sys.executable, str(Path(__file__).parent), "--only", step]
            words += ["--limit", str(limit), "--output", str(options.output.resolve())]
            words += ["--rehearse"] if options.rehearse else []
            words += ["--shapes", *map(str, options.shapes)] if options.shapes else []
            outcomes.append(_run(words, environment, Findings(step, options.output, 0), limit))
    return FAILED if FAILED in outcomes else max(outcomes)


def _run(words: list[str], environment: dict[str, str], findings: Findings, limit: int) -> int:
    """A step's outcome; whatever became of it is a verdict."""
    process = subprocess.Popen(words, env=environment, start_new_session=True)
    try:
        outcome = process.wait(limit + GRACE)
    except subprocess.TimeoutExpired:
        findings.verdict("the step ends in time", False, f"ended after {limit + GRACE} s")
        outcome = FAILED
    finally:
        # Engines can outlive the step; the group has no one else in it.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    if outcome not in (PASSED, FAILED, NOT_RUN):
        findings.verdict("the step runs to its end", False, f"exit status {outcome}")
        return FAILED
    return outcome


def _paths(folder: Path) -> list[str]:
    """PYTHONPATH's parts: this checkout, and what vLLM finds plugins by where none is installed."""
    paths = [str(ROOT / source) for source in SOURCES]
    try:
        importlib.metadata.distribution("steering-server")
    except importlib.metadata.PackageNotFoundError:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        metadata = folder / "steering_server-0.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(
            "Metadata-Version: 2.1\nName: steering-server\nVersion: 0\n"
        )
        (metadata / "entry_points.txt").write_text(
            "".join(
                f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in entries.items())
                for group, entries in project["entry-points"].items()
            )
        )
        paths.append(str(folder))
    return [*paths, *filter(None, [os.environ.get("PYTHONPATH")])]


def step(options: argparse.Namespace) -> int:
    """One step, in this process."""
    findings = Findings(options.only, options.output, options.limit)
    try:
        import torch

        if options.rehearse and options.only in KERNELS:
            # Before Triton is imported.
            from interpreter_as_compiler import mend

            mend()
        if not options.rehearse and not torch.cuda.is_available():
            findings.verdict("a GPU is there", None, "torch sees none")
            return NOT_RUN
        device = "CPU, rehearsed" if options.rehearse else torch.cuda.get_device_name()
        findings.tell(device=device, torch=torch.__version__)
        importlib.import_module(options.only).run(findings, options.rehearse, options.shapes)
    except ModuleNotFoundError as error:
        findings.verdict("the packages that it needs are there", None, f"no {error.name}")
        return FAILED if findings.failed else NOT_RUN
    # The other steps may say more.
    except Exception as error:  # noqa: BLE001
        traceback.print_exc()
        findings.verdict("the step runs to its end", False, f"{type(error).__name__}: {error}")
    if findings.failed:
        return FAILED
    # A rehearsal's times are no verdicts: a step that has only those has shown that it runs.
    return PASSED if findings.held or options.rehearse else NOT_RUN


def publish(options: argparse.Namespace, found: Sequence[Mapping[str, Any]]) -> None:
    """A GPU's findings, to the page of results."""
    if options.output == WORKING and any("device" in each for each in found):
        shutil.copy(WORKING, PUBLISHED)
        subprocess.run([sys.executable, str(ROOT / "benchmarks/report.py")], check=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu_check", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--shapes", nargs="+", type=int, help="hidden sizes of the first two steps")
    parser.add_argument("--limit", type=int, help="seconds of each step, in place of its own")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, at tiny shapes")
    parser.add_argument(
        "--output", type=Path, help="takes what is found, as it comes; by default a GPU's findings "
        "are published in benchmarks/RESULTS.md"
    )  # fmt: skip
    parser.add_argument("--only", choices=STEPS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.only:
        return step(options)
    if options.output is None:
        options.output = WORKING.with_stem("gpu_check_rehearsed") if options.rehearse else WORKING
    # By default they would end this process alone and leave its engines.
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, signal.default_int_handler)
    try:
        return check(options)
    finally:
        found = read(options.output)
        holds = [each["holds"] for each in found if "claim" in each]
        print(
            f"{holds.count(True)} hold, {holds.count(False)} fail, {holds.count(None)} were not "
            f"put to the test: {options.output}"
        )
        publish(options, found)


if __name__ == "__main__":
    sys.exit(main())
