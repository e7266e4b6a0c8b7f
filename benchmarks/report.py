"""Results as JSON, one file a benchmark, and all of them as tables in RESULTS.md."""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "results"
RESULTS = Path(__file__).parent / "RESULTS.md"

NOT_RUN = "Not run on a GPU."


def machine() -> dict[str, object]:
    """What ran, and on what."""
    import torch
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
        "Written by `make bench` and `make gpu-check` from the files in `results/`.\n",
    ]
    for name, title, table in (
        ("end_to_end", "Steering against plain vLLM", _end_to_end),
        ("start_up", "Start-up", _start_up),
        ("rows", "Host time of a step's rows", _rows),
        ("calibration", "Calibration", _calibration),
        ("kernels", "Kernels that could only rotate", _kernels),
    ):
        parts.append(f"## {title}\n")
        file = FOLDER / f"{name}.json"
        if not file.exists():
            parts.append("Not run.\n")
            continue
        content = json.loads(file.read_text())
        parts += [_says(content["machine"])]
        if note := content.get("note"):
            parts.append(f"{note}\n")
        parts.append(table(content["rows"]))
    parts += ["## What a GPU must show\n", _gpu_check()]
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
        return "{ratio:.3f} ({low:.3f} to {high:.3f})".format(**figure)

    says = (
        "Ratios to plain vLLM (two servers of it, and their mean is what the others are compared "
        "with), over many starts of every server but for the highest and the lowest fifth, with "
        "the 95 % interval of a hierarchical bootstrap (`estimate.py`). A server is paused while "
        "another is measured; all take their memory in pages of 2 MiB; and on a CPU nothing else "
        "runs on the cores to which vLLM binds models (`sides.py` says why). Below 1 is slower for "
        "throughput, above 1 is slower for times. The resolution, half the interval's width, is "
        "the smallest difference that the starts and runs could have told from none. A burst's "
        "first requests are computed while the others arrive: how many share the first step moves "
        "time between TTFT and inter-token latency. By `benchmarks/end_to_end.py`; a way that the "
        "table lacks was not run.\n"
    )
    head = ["way", "requests x (prompt + generated)", "starts x runs", "throughput", "resolution",
            "TTFT", "inter-token latency"]  # fmt: skip
    lines = [
        [r["way"], r["load"], f"{r['starts']} x {r['runs']}", ratio(r["throughput"]),
         f"{r['throughput']['resolution']:.1%}", ratio(r["ttft"]), ratio(r["itl"])]
        for r in rows
    ]  # fmt: skip
    return says + "\n" + _table(head, lines)


def _start_up(rows: Sequence[dict[str, Any]]) -> str:
    says = (
        "Seconds until the server answers, medians; cold is with an empty compile cache. The ratio "
        "is of the wholes within a pair: median, least and greatest. By `benchmarks/start_up.py`, "
        "both sides under `TORCH_LOGS=dynamo`, which tells where tracing ends.\n"
    )
    parts = [part for part in rows[0]["plain"] if part != "whole"]
    lines = []
    for r in rows:
        for side, name in (("plain", "plain vLLM"), ("selected", "selected sites")):
            ratios = r["ratios"]
            ratio = f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
            lines.append(
                [f"{name}, {r['temperature']}", str(r["pairs"])]
                + [f"{r[side][part]:.1f}" for part in (*parts, "whole")]
                + [ratio if side == "selected" else ""]
            )
    return says + "\n" + _table(["", "pairs", *parts, "whole", "ratio"], lines)


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


def _gpu_check() -> str:
    """Every verdict of `make gpu-check`, with its figure."""
    file = FOLDER / "gpu_check.jsonl"
    if not file.exists():
        return f"{NOT_RUN}\n"
    found = [json.loads(line) for line in file.read_text().splitlines()]
    on = sorted({f"{f['device']}, torch {f['torch']}" for f in found if "device" in f})
    if not on or any("rehearsed" in device for device in on):
        return f"{NOT_RUN}\n"
    words = {True: "holds", False: "FAILS", None: "not put to the test"}
    lines = [[f["step"], f["claim"], words[f["holds"]], f["figure"]] for f in found if "claim" in f]
    return "; ".join(on) + ".\n\n" + _table(["step", "claim", "verdict", "figure"], lines)


if __name__ == "__main__":
    write()
