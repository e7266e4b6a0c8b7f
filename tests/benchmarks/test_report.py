"""Benchmarks: what is written about what was measured."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The modules `report`, `end_to_end` and `gpu_kernels`, as their scripts import them."""
    import importlib

    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    names = ("report", "end_to_end", "gpu_kernels")
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
    assert page.count("Not run.") == 2
    assert page.count("Not run on a GPU.") == 1


def test_the_repositorys_page_is_that_of_its_files(
    benchmarks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    committed = benchmarks.report.RESULTS.read_text()
    monkeypatch.setattr(benchmarks.report, "RESULTS", tmp_path / "RESULTS.md")
    benchmarks.report.write()
    assert (tmp_path / "RESULTS.md").read_text() == committed


def test_an_interval_holds_the_median(benchmarks: Any) -> None:
    median, low, high = benchmarks.end_to_end.interval([0.9, 1.0, 1.1, 1.0, 0.95])
    assert low <= median == 1.0 <= high


def test_a_run_is_compared_with_the_plain_ones_around_it(benchmarks: Any) -> None:
    end_to_end = benchmarks.end_to_end
    ways = [w for w in end_to_end.WAYS if w.side == "selected"]
    order = list(end_to_end.chain(ways, 2))
    steered = [way.angles for way in order if way.side == "selected"]
    assert steered == ["one", "each", "mixed", "none", "each", "one", "none", "mixed"]
    runs = [(way, end_to_end.Run(10.0 + i, 1.0, 1.0)) for i, way in enumerate(order)]

    def throughputs(way: Any, baseline: Any) -> list[tuple[float, float]]:
        pairs = end_to_end.beside(runs, way, baseline)
        return [(before.throughput, run.throughput) for before, run in pairs]

    one, each, mixed, none = ways
    assert throughputs(one, end_to_end.PLAIN) == [(10, 11), (19, 18)]
    assert throughputs(each, end_to_end.PLAIN) == [(13, 12), (16, 17)]
    assert throughputs(mixed, end_to_end.PLAIN) == [(13, 14), (22, 21)]
    assert throughputs(none, end_to_end.PLAIN) == [(16, 15), (19, 20)]
    assert throughputs(each, one) == [(11, 12), (18, 17)]


def test_the_verdict_is_of_the_worst_shape(benchmarks: Any) -> None:
    def row(tokens: int, ratio: float, share: float) -> dict[str, float]:
        return {"tokens": tokens, "fused_over_norm": ratio, "fused_of_copy_bandwidth": share}

    good = [row(1, 1.04, 0.1), row(2048, 1.01, 0.9)]
    assert [holds for _, holds, _ in benchmarks.gpu_kernels.verdicts(good)] == [True, True]
    bad = [row(1, 1.06, 0.1), row(4096, 1.0, 0.84)]
    assert [holds for _, holds, _ in benchmarks.gpu_kernels.verdicts(bad)] == [False, False]
