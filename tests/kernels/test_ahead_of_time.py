"""The kernels compiled for GPUs that need not be here: what the machine code does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "support/ahead_of_time.py"


@pytest.fixture(scope="module")
def builds() -> list[dict[str, Any]]:
    """One report for each kernel, architecture, dtype, width and number of planes."""
    run = subprocess.run(
        [sys.executable, SCRIPT],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    reports: list[dict[str, Any]] = json.loads(run.stdout)
    assert {(r["kernel"], r["sm"]) for r in reports} == {
        (kernel, sm) for kernel in ("_rotate", "_add_rms_norm_rotate") for sm in (80, 90, 100)
    }
    return reports


def test_nothing_spills(builds: list[dict[str, Any]]) -> None:
    for build in builds:
        assert build["spills"] == build["local"] == build["stack"] == 0, build


def test_aligned_rows_move_sixteen_bytes_at_a_time(builds: list[dict[str, Any]]) -> None:
    """All but the row's own five numbers, which are scalars."""
    for build in builds:
        assert set(build["stores"]) == {16}, build
        assert set(build["loads"]) == {4, 16}, build
        # Each plane's mode, slot, gate, cosine and sine; the mode once more to leave early.
        scalars = 6 if build["kernel"] == "_rotate" else 5
        assert build["loads"].count(4) == scalars * build["planes"], build


def test_registers_leave_room(builds: list[dict[str, Any]], record_property: Any) -> None:
    """A block of 16 warps must fit a multiprocessor's 65536 registers; below 86, so do three of
    8 warps."""
    for build in builds:
        name = f"{build['kernel']}.sm_{build['sm']}.{build['dtype']}.{build['hidden']}"
        record_property(f"{name}.{build['planes']}.registers", build["registers"])
        assert build["registers"] * 32 * build["warps"] <= 65536, build
        assert build["registers"] <= 85, build
