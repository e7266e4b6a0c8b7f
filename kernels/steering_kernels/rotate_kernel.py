"""The rotation in place, for norms that no kernel of ours computes."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from steering_kernels.tuning import block_and_warps
from steering_kernels.turn import WIDTH, is_steered, turn


@triton.jit
def _rotate(
    h, bank, rows, h_stride, HIDDEN: tl.constexpr, PLANES: tl.constexpr, BLOCK: tl.constexpr
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
    turned, acted = turn(x.to(tl.float32), row, bank, columns, within, HIDDEN, PLANES)
    if acted:
        tl.store(at, turned.to(x.dtype), mask=within)


def rotate_(h: Tensor, bank: Tensor, rows: Tensor) -> None:
    """Rotate activations in their planes, in place; shapes as in :func:`steering_kernels.rotate`.

    One program a token. A token whose rows are off is neither read nor written.

    Args:
        h: [T, d], unit stride within a token.
        bank: [slots, 2, d] float32, contiguous.
        rows: [T, planes, 5] float32, contiguous.
    """
    tokens, hidden = h.shape
    if not tokens:
        return
    block, warps = block_and_warps(hidden)
    with torch.cuda.device_of(h):
        _rotate[(tokens,)](
            h,
            bank,
            rows,
            h.stride(0),
            HIDDEN=hidden,
            PLANES=rows.shape[1],
            BLOCK=block,
            num_warps=warps,
        )
