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


def test_a_server_that_does_not_end_is_killed(
    sides: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sides, "END_SECONDS", 0.5)
    code = "import signal, time; signal.signal(15, signal.SIG_IGN); print('up'); time.sleep(60)"
    side = sides.Side([sys.executable, "-u", "-c", code])
    with sides.started(side, 1, tmp_path, subprocess.PIPE) as process:
        assert process.stdout.readline() == "up\n"
    assert process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_what_ends_a_benchmark_ends_its_servers(number: signal.Signals, tmp_path: Path) -> None:
    code = (
        "import signal, subprocess, sys, time; from pathlib import Path; import sides\n"
        # Whoever runs the tests under nohup has it ignored, and children inherit that.
        f"signal.signal({number.value}, signal.SIG_DFL)\n"
        "sides.end_with_this_process()\n"
        "side = sides.Side([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "with sides.started(side, 1, Path(), subprocess.DEVNULL) as process:\n"
        "    sides.Server(1, process.pid).pause()\n"
        "    print(process.pid, flush=True)\n"
        "    time.sleep(60)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS)}
    words = [sys.executable, "-c", code]
    with subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True) as benchmark:
        assert benchmark.stdout is not None
        server = psutil.Process(int(benchmark.stdout.readline()))
        benchmark.send_signal(number)
        benchmark.wait(20)
    assert not server.is_running()


def test_pages_are_huge_beside_what_a_side_sets(sides: Any) -> None:
    plain = sides.on_huge_pages(sides.SIDES["plain"])
    assert plain.environment == {
        "VLLM_PLUGINS": "",
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    }
    assert "GLIBC_TUNABLES" not in sides.SIDES["plain"].environment
