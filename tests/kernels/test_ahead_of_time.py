"""The kernels compiled for GPUs that need not be here: what the machine code does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from steering_kernels.tuning import LAYOUTS, layout

ROTATIONS_ALONE = {
    ("_add_rms_norm_steer", "bf16", 576, 1): (64, 64, 74),
    ("_add_rms_norm_steer", "bf16", 576, 2): (64, 70, 76),
    ("_add_rms_norm_steer", "bf16", 8192, 1): (64, 64, 74),
    ("_add_rms_norm_steer", "bf16", 8192, 2): (74, 74, 81),
    ("_add_rms_norm_steer", "fp32", 576, 1): (56, 54, 60),
    ("_add_rms_norm_steer", "fp32", 576, 2): (56, 63, 64),
    ("_add_rms_norm_steer", "fp32", 8192, 1): (64, 64, 74),
    ("_add_rms_norm_steer", "fp32", 8192, 2): (74, 78, 78),
    ("_steer", "bf16", 576, 1): (64, 64, 70),
    ("_steer", "bf16", 576, 2): (72, 70, 78),
    ("_steer", "bf16", 8192, 1): (70, 70, 72),
    ("_steer", "bf16", 8192, 2): (77, 76, 83),
    ("_steer", "fp32", 576, 1): (56, 55, 56),
    ("_steer", "fp32", 576, 2): (56, 64, 64),
    ("_steer", "fp32", 8192, 1): (73, 73, 76),
    ("_steer", "fp32", 8192, 2): (80, 80, 82),
}
"""Registers on sm_80, 90 and 100 of kernels that could only rotate (Triton 3.9)."""
IN_USE = str(layout(8192, 1))
MORE = 16
"""Registers that the other operations, strengths and kept norms may take beside."""

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
        (kernel, sm) for kernel in ("_steer", "_add_rms_norm_steer") for sm in (80, 90, 100)
    }
    return reports


def test_nothing_spills(builds: list[dict[str, Any]]) -> None:
    for build in builds:
        assert build["spills"] == build["local"] == build["stack"] == 0, build


def test_aligned_rows_move_sixteen_bytes_at_a_time(builds: list[dict[str, Any]]) -> None:
    """All but the row's own numbers and the class means', which are scalars."""
    for build in builds:
        assert set(build["stores"]) == {16}, build
        assert set(build["loads"]) == {4, 16}, build
        # Each plane's row of seven and the class means' five; the mode once more to leave early.
        scalars = 13 if build["kernel"] == "_steer" else 12
        # With two planes, the mode that both lead to is looked at once more.
        again = build["kernel"] == "_steer" and build["planes"] > 1
        assert build["loads"].count(4) == scalars * build["planes"] + again, build


def test_every_layout_can_be_launched(builds: list[dict[str, Any]]) -> None:
    """Those that are prepared for a device to choose from."""
    laid_out = {build["layout"]: build for build in builds if "layout" in build}
    assert set(laid_out) == set(map(str, LAYOUTS))
    for build in laid_out.values():
        assert build["registers"] * 32 * build["warps"] <= 65536, build


def test_registers_leave_room(builds: list[dict[str, Any]], record_property: Any) -> None:
    """A block of 16 warps must fit a multiprocessor's 65536 registers; below 86, so do three of
    8 warps."""
    for build in builds:
        if build.get("layout", IN_USE) != IN_USE:
            continue
        key = (build["kernel"], build["dtype"], build["hidden"], build["planes"])
        before = ROTATIONS_ALONE[key][(80, 90, 100).index(build["sm"])]
        name = ".".join(map(str, (*key, f"sm_{build['sm']}")))
        record_property(f"{name}.registers", f"{build['registers']} ({before} to rotate)")
        assert build["registers"] * 32 * build["warps"] <= 65536, build
        assert build["registers"] <= before + MORE, build
        if build["warps"] <= 8:
            assert build["registers"] <= 85, build
