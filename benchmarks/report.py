"""Results as JSON, one file a benchmark, and all of them as tables in RESULTS.md."""

from __future__ import annotations

import datetime
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent / "results"
RESULTS = Path(__file__).parent / "RESULTS.md"

NOT_RUN = "Not run on a GPU."


def machine() -> dict[str, object]:
    """What ran, and on what."""
    import vllm

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "gpu": gpu,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "vllm": vllm.__version__,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def save(path: Path, benchmark: str, rows: Sequence[dict[str, object]]) -> None:
    """Write a benchmark's rows with the machine that gave them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"benchmark": benchmark, "machine": machine(), "rows": rows}
    path.write_text(json.dumps(content, indent=1) + "\n")


def write() -> None:
    """RESULTS.md, from every JSON file there is."""
    parts = [
        "# Results\n",
        "Written by `make bench` and `make gpu-check` from the files in `results/`. Ratios are "
        "medians over pairs of runs next to each other in time, with the 95 % interval of the "
        "median by bootstrap; below 1 is slower for throughput, above 1 is slower for times. The "
        "intervals are of runs, not of servers: each way is one process, all compared with the "
        "same plain one, and two processes of the same kind differ by some percent (the second "
        "plain vLLM's rows are one such pair). Differences of that size, either way, say nothing."
        "\n",
    ]
    for name, title, table in (
        ("end_to_end", "Steering against plain vLLM", _end_to_end),
        ("rows", "Host time of a step's rows", _rows),
        ("calibration", "Calibration", _calibration),
        ("kernels", "Kernels", _kernels),
    ):
        parts.append(f"## {title}\n")
        file = FOLDER / f"{name}.json"
        if not file.exists():
            parts.append(f"{NOT_RUN if name == 'kernels' else 'Not run.'}\n")
            continue
        content = json.loads(file.read_text())
        parts += [_says(content["machine"])]
        if note := content.get("note"):
            parts.append(f"{note}\n")
        parts.append(table(content["rows"]))
    RESULTS.write_text("\n".join(parts))


def _says(machine: dict[str, Any]) -> str:
    gpu = f"{machine['gpu']}, " if machine["gpu"] else ""
    return (
        f"{gpu}{machine['cpu']}, {machine['cores']} cores; vLLM {machine['vllm']}, torch "
        f"{machine['torch']}, Python {machine['python']}; {machine['date']}.\n"
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _end_to_end(rows: Sequence[dict[str, Any]]) -> str:
    def ratio(figure: dict[str, float]) -> str:
        return f"{figure['median']:.3f} ({figure['low']:.3f} to {figure['high']:.3f})"

    head = ["way", "against", "requests x (prompt + generated)", "pairs", "throughput", "TTFT",
            "inter-token latency"]  # fmt: skip
    return _table(
        head,
        [
            [r["way"], r["against"], r["load"], str(r["pairs"])]
            + [ratio(r[figure]) for figure in ("throughput", "ttft", "itl")]
            for r in rows
        ],
    )


def _rows(rows: Sequence[dict[str, Any]]) -> str:
    return _table(
        ["requests", "planes a request", "a step, us", "a new request, us"],
        [
            [str(r["requests"]), str(r["planes"]), f"{r['step_us']:.0f}",
             f"{r['new_request_us']:.0f}"]
            for r in rows
        ],
    )  # fmt: skip


def _calibration(rows: Sequence[dict[str, Any]]) -> str:
    return _table(
        ["prompts", "after loading, s", "peak memory, GiB", "the same of serving, GiB", "ratio"],
        [
            [str(r["prompts"]), f"{r['seconds']:.1f}", f"{r['calibrating_bytes'] / 2**30:.2f}",
             f"{r['serving_bytes'] / 2**30:.2f}",
             f"{r['calibrating_bytes'] / r['serving_bytes']:.3f}"]
            for r in rows
        ],
    )  # fmt: skip


def _kernels(rows: Sequence[dict[str, Any]]) -> str:
    keys = ("fused_us", "norm_alone_us", "apart_us", "rotate_us")
    shares = ("fused_over_norm", "fused_of_copy_bandwidth", "rotate_of_copy_bandwidth")
    return _table(
        ["tokens", "hidden", "fused, us", "norm alone, us", "norm and rotate, us", "rotate, us",
         "fused / norm", "fused, of copy bandwidth", "rotate, of copy bandwidth"],
        [
            [str(r["tokens"]), str(r["hidden"])]
            + [f"{r[key]:.1f}" for key in keys] + [f"{r[key]:.2f}" for key in shares]
            for r in rows
        ],
    )  # fmt: skip
