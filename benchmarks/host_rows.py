"""Host time of a step's rows: what steering adds to vLLM's scheduler loop."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

import report
import sides
from steering_planes import Plane
from steering_server.engine.bank import Bank
from steering_server.engine.rows import Rows
from steering_server.request.operation import Operation
from steering_server.request.window import NAMED

BATCHES = (1, 8, 32, 64, 128, 256, 512, 1024)
STEPS = 300


def measure(plane: Plane, batch: int, planes: int, device: torch.device) -> dict[str, object]:
    """Medians in microseconds: a decoding step's rows, and taking up one new request."""
    bank = Bank([plane], plane.sites[:1], device)
    rows = Rows(batch, 8192, planes, bank, device)
    operations = [
        tuple(
            Operation(plane.name, plane.digest, (0.37 * i + k) % 360, "rotate_to", NAMED[tokens])
            for k in range(planes)
        )
        for i, tokens in enumerate(("all", "generated") * (batch // 2 + 1))
    ]

    def timed(step: int) -> tuple[float, float]:
        start = time.perf_counter()
        rows.put(step % batch, operations[step % batch], 20)
        put = time.perf_counter()
        rows.write(places, scheduled, computed)
        return put - start, time.perf_counter() - put

    for place in range(batch):
        rows.put(place, operations[place], 20)
    places = np.arange(batch)
    scheduled, computed = np.ones(batch, np.int32), np.full(batch, 30, np.int32)
    times = [timed(step) for step in range(STEPS)]
    return {
        "requests": batch,
        "planes": planes,
        "step_us": statistics.median(write for _, write in times) * 1e6,
        "new_request_us": statistics.median(put for put, _ in times) * 1e6,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=report.FOLDER / "rows.json")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    plane = Plane.load(sides.BUNDLED)
    measured = [measure(plane, batch, planes, device) for planes in (1, 4) for batch in BATCHES]
    report.save(options.output, "rows", measured)
    report.write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
