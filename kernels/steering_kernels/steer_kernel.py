"""Steering in place, for norms that no kernel of ours computes."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from steering_kernels.operation import WIDTH, is_steered, operate
from steering_kernels.tuning import block_and_warps


@triton.jit
def _steer(
    h,
    bank,
    classes,
    rows,
    h_stride,
    HIDDEN: tl.constexpr,
    PLANES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # 64 bits: T * d passes 2**31 in a long prefill of a wide model.
    token = tl.program_id(0).to(tl.int64)
    row = rows + token * (PLANES * WIDTH)
    if not is_steered(row, PLANES):
        return
    columns = tl.arange(0, BLOCK)
    within = columns < HIDDEN
    at = h + token * h_stride + columns
    x = tl.load(at, mask=within, other=0.0)
    value = x.to(tl.float32)
    steered, acted = operate(value, row, bank, classes, columns, within, HIDDEN, PLANES)
    if acted:
        tl.store(at, steered.to(x.dtype), mask=within)


def steer_(h: Tensor, bank: Tensor, classes: Tensor, rows: Tensor) -> None:
    """Steer activations in place, as :func:`steering_kernels.steer` says.

    One program a token. A token whose rows are off is neither read nor written.

    Args:
        h: [T, d], unit stride within a token.
        bank: [slots, 2, d] float32, contiguous.
        classes: [slots, 5] float32, contiguous.
        rows: [T, planes, 7] float32, contiguous.
    """
    tokens, hidden = h.shape
    if not tokens:
        return
    block, warps = block_and_warps(hidden)
    with torch.cuda.device_of(h):
        _steer[(tokens,)](
            h,
            bank,
            classes,
            rows,
            h.stride(0),
            HIDDEN=hidden,
            PLANES=rows.shape[1],
            BLOCK=block,
            num_warps=warps,
        )
