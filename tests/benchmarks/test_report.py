"""Benchmarks: what is written about what was measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The benchmarks' modules, as their scripts import them."""
    import importlib

    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    names = ("report", "estimate", "loads", "end_to_end", "start_up")
    modules = {name: importlib.import_module(name) for name in names}
    yield type("Benchmarks", (), modules)
    for name in (*names, "sides"):
        sys.modules.pop(name, None)


def test_what_was_not_run_is_said_to_be_not_run(
    benchmarks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmarks.report, "FOLDER", tmp_path)
    monkeypatch.setattr(benchmarks.report, "RESULTS", tmp_path / "RESULTS.md")
    row = {"requests": 256, "planes": 1, "step_us": 91.2, "new_request_us": 9.8}
    benchmarks.report.save(tmp_path / "rows.json", "rows", [row])
    benchmarks.report.write()
    page = (tmp_path / "RESULTS.md").read_text()
    assert "| 256 | 1 | 91 | 10 |" in page
    assert page.count("Not run.") == 4
    assert page.count("Not run on a GPU.") == 1


def test_a_rehearsal_is_no_run_on_a_gpu(
    benchmarks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmarks.report, "FOLDER", tmp_path)
    verdict = {"step": "exactness", "claim": "exact", "holds": True, "figure": "0"}

    def says(*found: dict[str, Any]) -> str:
        lines = "".join(json.dumps(each) + "\n" for each in found)
        (tmp_path / "gpu_check.jsonl").write_text(lines)
        said: str = benchmarks.report._gpu_check()
        return said

    on = {"step": "exactness", "torch": "2.11"}
    assert "| exactness | exact | holds | 0 |" in says({**on, "device": "H100"}, verdict)
    assert says({**on, "device": "CPU, rehearsed"}, verdict) == "Not run on a GPU.\n"
    assert says(verdict) == "Not run on a GPU.\n"


def test_the_repositorys_page_is_that_of_its_files(
    benchmarks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    committed = benchmarks.report.RESULTS.read_text()
    monkeypatch.setattr(benchmarks.report, "RESULTS", tmp_path / "RESULTS.md")
    benchmarks.report.write()
    assert (tmp_path / "RESULTS.md").read_text() == committed


@pytest.mark.parametrize("shift", [1.0, 0.97])
def test_the_interval_holds_the_truth_nineteen_times_in_twenty(
    benchmarks: Any, monkeypatch: pytest.MonkeyPatch, shift: float
) -> None:
    """Starts that differ by as much as their runs scatter: what runs alone would not tell. Some are
    spoilt by what else the machine does."""
    monkeypatch.setattr(benchmarks.estimate, "RESAMPLES", 1000)
    rng = np.random.default_rng(0)
    held = []
    for _ in range(200):
        scale = np.where(rng.random(10) < 0.2, 0.05, 0.01)
        starts = [shift * np.exp(rng.normal(0, s) + rng.normal(0, s, 3)) for s in scale]
        found = benchmarks.estimate.estimate(starts)
        assert found.low <= found.ratio <= found.high
        assert found.resolution == pytest.approx((found.high - found.low) / 2)
        held.append(found.low <= shift <= found.high)
    assert sum(held) >= 190


def test_a_start_that_the_machine_spoilt_does_not_decide(benchmarks: Any) -> None:
    starts = [[1.0, 1.01, 0.99]] * 19
    found = benchmarks.estimate.estimate([*starts, [0.5, 0.6, 0.5]])
    assert found.ratio == pytest.approx(1.0)
    assert found.resolution < 0.01


def test_one_start_is_no_estimate(benchmarks: Any) -> None:
    with pytest.raises(ValueError, match="two starts, got 1"):
        benchmarks.estimate.estimate([[1.0, 1.01, 0.99]])


@pytest.mark.parametrize("add", [False, True])
def test_one_start_is_refused_before_it_is_made(
    benchmarks: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    add: bool,
) -> None:
    monkeypatch.setattr(benchmarks.end_to_end.sides, "end_with_this_process", lambda: None)
    file = tmp_path / "found.json"
    machine = benchmarks.report.machine()
    file.write_text(json.dumps({"machine": machine, "rows": []}))
    words = ["--starts", "1", "--ways", "each", "--output", str(file), *(["--add"] if add else [])]
    with pytest.raises(SystemExit):
        benchmarks.end_to_end.main(words)
    assert "--starts 1: an interval needs two" in capsys.readouterr().err


def test_each_way_is_compared_with_the_plain_servers_beside_it(benchmarks: Any) -> None:
    end_to_end, loads = benchmarks.end_to_end, benchmarks.loads
    each = end_to_end.WAYS["each"]

    def turn(plain: float, second: float, steered: float) -> Any:
        ways = (end_to_end.PLAIN, end_to_end.SECOND, each)
        runs = (loads.Run(t, 1.0, 0.1) for t in (plain, second, steered))
        return dict(zip(ways, runs, strict=True))

    # The machine slows down by half between rounds, and the servers with it.
    rounds = [[turn(100, 400, 198), turn(50, 200, 99)], [turn(100, 400, 202), turn(50, 200, 101)]]
    steered: Any = {}
    second: Any = {}
    for turns in rounds:
        end_to_end.add(steered, each, turns)
        end_to_end.add(second, end_to_end.SECOND, turns)
    assert np.allclose(steered["throughput"], [[0.99, 0.99], [1.01, 1.01]])
    assert np.allclose(second["throughput"], 4)
    row = end_to_end.compared("8 x (32 + 24)", each.name, steered)
    assert row["throughput"]["ratio"] == pytest.approx(1.0, abs=1e-3)
    assert (row["starts"], row["runs"]) == (2, 2)
    assert row["raw"]["plain vLLM"] == [[100, 50], [100, 50]]


def test_a_start_is_told_in_parts(benchmarks: Any) -> None:
    ends = {"import": 9.0, "processes": 19.0, "load": 20.0, "trace": 30.0, "compile": 70.0,
            "first run": 80.0}  # fmt: skip
    plain = benchmarks.start_up.parts(ends, 82.0)
    steered = benchmarks.start_up.parts({**ends, "proof": 84.0}, 86.0)
    assert plain["compile"] == 40.0
    assert (plain["proof"], plain["rest"], plain["whole"]) == (0.0, 2.0, 82.0)
    assert (steered["proof"], steered["rest"]) == (4.0, 2.0)
    row = benchmarks.start_up.compared("cold", [{"plain": plain, "selected": steered}])
    assert row["ratios"] == [86 / 82]
