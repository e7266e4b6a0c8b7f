"""How long a server takes to answer, part by part: plain vLLM and ours, cold and warm, in pairs.

Cold is with an empty compile cache, warm with the one that the cold start left.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

import report
import sides
from sides import SIDES

ENDS = {
    "import": "Initializing a V1 LLM engine",
    "processes": "Starting to load model",
    "load": "Warming up model for the compilation",
    "trace": "Step 2: calling compiler function",
    "compile": "saved AOT compiled function",
    "first run": "Warming up done",
    "proof": "Steering proved",
}
"""Part -> what the log says at its end. What comes after the last is ``rest``."""
TEMPERATURES = ("cold", "warm")


def start(name: str, cache: Path, folder: Path) -> dict[str, float]:
    """Seconds of each part of one start, and of the whole."""
    side = SIDES[name]
    # Dynamo tells where tracing ends.
    more = {"VLLM_CACHE_ROOT": str(cache), "TORCH_LOGS": "dynamo"}
    side = dataclasses.replace(side, environment={**side.environment, **more})
    port, ends = sides.free_port(), dict[str, float]()
    began = time.perf_counter()
    with sides.started(side, port, folder, subprocess.PIPE) as process:
        said: list[str] = []

        def read() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                said.append(line)
                for part, mark in ENDS.items():
                    if mark in line:
                        ends.setdefault(part, time.perf_counter() - began)

        threading.Thread(target=read, daemon=True).start()
        while not sides.answers(port):
            if process.poll() is not None or time.perf_counter() - began > sides.START_SECONDS:
                raise RuntimeError(f"no server; the end of its log:\n{''.join(said)[-3000:]}")
            time.sleep(0.1)
        whole = time.perf_counter() - began
    return parts(ends, whole)


def parts(ends: Mapping[str, float], whole: float) -> dict[str, float]:
    """How long each part took, from when each ended; one that did not come took no time."""
    taken, last = {}, 0.0
    for part in ENDS:
        end = ends.get(part, last)
        taken[part], last = end - last, end
    return {**taken, "rest": whole - last, "whole": whole}


def compared(
    temperature: str, pairs: Sequence[Mapping[str, Mapping[str, float]]]
) -> dict[str, object]:
    """Medians of the parts, and the ratios of the wholes within pairs."""
    return {
        "temperature": temperature,
        "pairs": len(pairs),
        **{
            side: {
                part: statistics.median(pair[side][part] for pair in pairs)
                for part in (*ENDS, "rest", "whole")
            }
            for side in ("plain", "selected")
        },
        "ratios": [pair["selected"]["whole"] / pair["plain"]["whole"] for pair in pairs],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--output", type=Path, default=report.FOLDER / "start_up.json")
    options = parser.parse_args(arguments)
    sides.end_with_this_process()
    console = Console(file=sys.stderr)
    seen: dict[str, list[dict[str, dict[str, float]]]] = {kind: [] for kind in TEMPERATURES}
    for number in range(1, options.pairs + 1):
        with tempfile.TemporaryDirectory() as folder:
            caches = {side: Path(folder) / side for side in ("plain", "selected")}
            for temperature in TEMPERATURES:
                pair = {}
                for side in random.sample(list(caches), 2):
                    console.print(f"pair {number} of {options.pairs}: {side}, {temperature}")
                    pair[side] = start(side, caches[side], Path(folder))
                    console.print(pair[side])
                seen[temperature].append(pair)
        report.save(
            options.output, "start_up", [compared(kind, pairs) for kind, pairs in seen.items()]
        )
    report.write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
