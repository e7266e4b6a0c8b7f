"""Each kernel on a GPU: against its floor, against the norm alone, and against norm and steering
apart.

The floor is the bytes a kernel must move over the bandwidth of a copy, measured in the same run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import triton.testing
from torch import Tensor

import report
from steering_kernels import (
    CLASSES_WIDTH,
    Mode,
    add_rms_norm_steer,
    encode_row,
    identity_row,
    steer,
)
from steering_planes import orthonormalise

TOKENS = (1, 4, 16, 64, 256, 1024, 2048, 4096, 8192, 16384)
WIDTHS = (2048, 4096, 8192)
SLOTS = 4
EPS = 1e-5
DTYPE = torch.bfloat16


def milliseconds(work: Callable[[], object]) -> float:
    """The median time of a call, captured into a CUDA graph as vLLM captures it."""
    with torch.cuda.stream(torch.cuda.Stream()):
        return float(triton.testing.do_bench_cudagraph(work, return_mode="median"))


def copy_bandwidth() -> float:
    """Bytes a millisecond that a copy of 1 GiB reads and writes."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / milliseconds(lambda: target.copy_(source))


def measure(tokens: int, width: int, bandwidth: float) -> dict[str, object]:
    """Times in microseconds of one shape, and the ratios that matter."""
    torch.manual_seed(0)
    x, residual = (torch.randn(tokens, width, device="cuda", dtype=DTYPE) for _ in range(2))
    weight = torch.ones(width, device="cuda", dtype=DTYPE)
    bank = torch.stack([orthonormalise(torch.randn(2, width)) for _ in range(SLOTS)]).cuda()
    classes = torch.zeros(SLOTS, CLASSES_WIDTH, device="cuda")
    on = torch.tensor([[encode_row(Mode.ROTATE_TO, 0.1 * i, i % SLOTS)] for i in range(tokens)])
    off = torch.tensor([[identity_row()]] * tokens)
    on, off = on.cuda(), off.cuda()

    def fused(rows: Tensor) -> object:
        return add_rms_norm_steer(x, residual, weight, EPS, bank, classes, rows, kernels="triton")

    def apart() -> object:
        out, total = add_rms_norm_steer(
            x, residual, weight, EPS, bank, classes, off, kernels="triton"
        )
        return steer(out, bank, classes, on, "triton"), total

    moved = x.element_size() * x.numel()
    fused_ms, norm_ms, apart_ms, rotate_ms = (
        milliseconds(work)
        for work in (
            lambda: fused(on),
            lambda: fused(off),
            apart,
            lambda: steer(x, bank, classes, on, "triton"),
        )
    )
    return {
        "tokens": tokens,
        "hidden": width,
        "fused_us": fused_ms * 1e3,
        "norm_alone_us": norm_ms * 1e3,
        "apart_us": apart_ms * 1e3,
        "rotate_us": rotate_ms * 1e3,
        "fused_over_norm": fused_ms / norm_ms,
        # Reads x and the residual, writes the normed and the sum; the rotation reads and writes h.
        "fused_of_copy_bandwidth": 4 * moved / bandwidth / fused_ms,
        "rotate_of_copy_bandwidth": 2 * moved / bandwidth / rotate_ms,
    }


def verdicts(rows: Sequence[dict[str, object]]) -> list[tuple[str, bool, str]]:
    """What a GPU must show: (claim, whether it holds, the figure)."""
    ratio = max(float(row["fused_over_norm"]) for row in rows)  # type: ignore[arg-type]
    large = [row for row in rows if int(row["tokens"]) >= 2048]  # type: ignore[call-overload]
    share = min(float(row["fused_of_copy_bandwidth"]) for row in large)  # type: ignore[arg-type]
    return [
        ("add_rms_norm_steer <= 1.05 x the norm alone, at every T", ratio <= 1.05, f"{ratio:.3f}"),
        (">= 85 % of the copy bandwidth from T = 2048", share >= 0.85, f"{share:.1%}"),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=report.FOLDER / "kernels.json")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("kernels: not run, there is no GPU here", file=sys.stderr)
        return 2
    bandwidth = copy_bandwidth()
    rows = [measure(tokens, width, bandwidth) for width in WIDTHS for tokens in TOKENS]
    report.save(options.output, "kernels", rows)
    report.write()
    judged = verdicts(rows)
    for claim, holds, figure in judged:
        print(f"{'PASS' if holds else 'FAIL'}  {claim}: {figure}")
    return 0 if all(holds for _, holds, _ in judged) else 1


if __name__ == "__main__":
    sys.exit(main())
