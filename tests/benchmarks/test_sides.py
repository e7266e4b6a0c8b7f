"""Benchmarks: the servers that are compared."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PARENT_AND_CHILD = "import os, time; os.fork(); time.sleep(60)"


@pytest.fixture
def sides(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    yield importlib.import_module("sides")
    sys.modules.pop("sides", None)


@pytest.fixture
def group() -> Iterator[int]:
    """A process in its own group, with a child."""
    process = subprocess.Popen([sys.executable, "-c", PARENT_AND_CHILD], start_new_session=True)
    while not psutil.Process(process.pid).children():
        assert process.poll() is None
    yield process.pid
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _wait_until_stopped(group: int, stopped: bool) -> None:
    """All processes of the group; a signal takes its time."""
    parent = psutil.Process(group)
    deadline = time.monotonic() + 10
    while {
        process.status() == psutil.STATUS_STOPPED for process in (parent, *parent.children())
    } != {stopped}:
        assert time.monotonic() < deadline


def test_a_paused_server_is_still_in_all_its_processes(sides: Any, group: int) -> None:
    server = sides.Server(port=1, group=group)
    _wait_until_stopped(group, False)
    server.pause()
    _wait_until_stopped(group, True)
    with server.awake() as port:
        assert port == 1
        _wait_until_stopped(group, False)
    _wait_until_stopped(group, True)


def test_a_paused_server_can_be_ended(sides: Any, tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    with sides.started(sides.Side(command), 1, tmp_path, subprocess.DEVNULL) as process:
        sides.Server(1, process.pid).pause()
    assert process.returncode == -signal.SIGTERM


def test_pages_are_huge_beside_what_a_side_sets(sides: Any) -> None:
    plain = sides.on_huge_pages(sides.SIDES["plain"])
    assert plain.environment == {
        "VLLM_PLUGINS": "",
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    }
    assert "GLIBC_TUNABLES" not in sides.SIDES["plain"].environment
