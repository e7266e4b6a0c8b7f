"""The kernels against double precision, and against their twins in plain torch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import torch
from findings import Findings
from torch import Tensor

from cases import EPS, Case, error
from steering_kernels import Mode, add_rms_norm_steer, norm_kernel, reference, steer
from steering_kernels.rows import MODE
from steering_kernels.tuning import LAYOUTS, Layout

WIDTHS = (4096, 3584, 576, 8192, 896, 2304, 507, 64)
DTYPES = (torch.bfloat16, torch.float32, torch.float16)
TOKENS = 97
SPARE_SECONDS = 5
MORE = 1e-6
"""What a kernel's error may exceed its twin's by, relative to the longest token."""


def run(findings: Findings, rehearse: bool, widths: Sequence[int] | None) -> None:
    """Random operations in every combination of width, dtype and number of planes, while there is
    time; each layout of the norm's kernel where one plane is applied."""
    widths = widths or ((64, 507) if rehearse else WIDTHS)
    combinations = list(itertools.product(widths, DTYPES, (1, 2)))
    worst, inexact, done = -1.0, 0, 0
    for seed, (width, dtype, planes) in enumerate(combinations):
        if findings.left() < SPARE_SECONDS:
            break
        case = Case(
            seed, hidden=width, dtype=dtype, planes=planes, tokens=6 if rehearse else TOKENS,
            unit_offset=seed // 2 % 2 == 1,
        )  # fmt: skip
        for name, excess, bits in compared(case, rehearse):
            findings.tell(
                hidden=width, dtype=str(dtype), planes=planes, kernel=name, excess=excess, bits=bits
            )
            worst, inexact = max(worst, excess), inexact + bits
        done += 1
    findings.verdict(
        f"every width, dtype and number of planes ({len(combinations)}) was compared",
        True if done == len(combinations) else None,
        done,
    )
    findings.verdict(
        "kernels are as exact as plain torch, within 1e-6",
        worst <= MORE if done else None,
        f"{worst:.1e}",
    )
    findings.verdict(
        "unsteered tokens, and the sums of the residual, are bit-exact",
        not inexact if done else None,
        f"{inexact} differ",
    )


def compared(case: Case, rehearse: bool) -> Iterator[tuple[str, float, int]]:
    """Each kernel's name, by how much its error exceeds its twin's, and how many tokens that must
    be bit-exact are not."""
    x, residual, weight, bank, classes, rows = case.on(
        "x", "residual", "weight", "bank", "classes", "rows"
    )
    truth = case.truth(case.x)
    plain = reference.steer(x, bank, classes, rows)
    fast = steer(x.clone(), bank, classes, rows, "triton")
    idle = (rows[..., MODE] == Mode.OFF).all(-1)  # no plane is on
    yield "steer", _excess(fast, plain, truth), _differ(fast[idle], x[idle])

    offset = case.unit_offset
    plain, plain_sum = add_rms_norm_steer(x, residual, weight, EPS, bank, classes, rows, offset)
    normed, _ = case.norm_truth(case.residual)
    truth = case.truth(normed)
    off = rows.clone()
    off[..., MODE] = Mode.OFF
    layouts = LAYOUTS if case.planes == 1 else (Layout(),)
    if rehearse:
        layouts = tuple(layout for layout in layouts if layout.columns == 1024)
    for layout in layouts:

        def normed_and_steered(
            which: Tensor, layout: Layout = layout
        ) -> tuple[Tensor, Tensor | None]:
            return norm_kernel.add_rms_norm_steer(
                x, residual, weight, EPS, bank, classes, which, offset, layout
            )

        fast, total = normed_and_steered(rows)
        unsteered, _ = normed_and_steered(off)
        assert total is not None
        assert plain_sum is not None
        bits = _differ(fast[idle], unsteered[idle]) + _differ(total, plain_sum)
        yield f"add_rms_norm_steer: {layout}", _excess(fast, plain, truth), bits


def _excess(fast: Tensor, plain: Tensor, truth: Tensor) -> float:
    """By how much a kernel's error exceeds its twin's."""
    if not fast.isfinite().all():
        return math.inf
    return error(fast, truth) - error(plain, truth)


def _differ(got: Tensor, wanted: Tensor) -> int:
    """How many tokens differ in any bit."""
    kind = torch.int32 if got.dtype == torch.float32 else torch.int16
    return int((got.contiguous().view(kind) != wanted.contiguous().view(kind)).any(-1).sum())
