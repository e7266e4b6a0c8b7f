"""Residual add, RMS norm and steering in one pass over the activations.

The norm reads and writes every activation anyway; steering what it has in registers adds two dot
products and no pass over memory.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from steering_kernels.operation import WIDTH, operate
from steering_kernels.tuning import block_and_warps


@triton.jit
def _add_rms_norm_steer(
    x,
    residual,
    weight,
    bank,
    classes,
    rows,
    out,
    residual_out,
    x_stride,
    residual_stride,
    eps,
    HIDDEN: tl.constexpr,
    PLANES: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # 64 bits: T * d passes 2**31 in a long prefill of a wide model.
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    within = columns < HIDDEN
    value = tl.load(x + token * x_stride + columns, mask=within, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        added = tl.load(residual + token * residual_stride + columns, mask=within, other=0.0)
        value += added.to(tl.float32)
        tl.store(
            residual_out + token * HIDDEN + columns,
            value.to(residual_out.dtype.element_ty),
            mask=within,
        )
    normed = value * tl.rsqrt(tl.sum(value * value) / HIDDEN + eps)
    gain = tl.load(weight + columns, mask=within, other=0.0)
    if UNIT_OFFSET:
        normed = normed * (gain.to(tl.float32) + 1.0)
    else:
        # As vLLM's norm: rounded to the gain's dtype before the product.
        normed = normed.to(gain.dtype).to(tl.float32) * gain.to(tl.float32)
    row = rows + token * (PLANES * WIDTH)
    steered, _ = operate(normed, row, bank, classes, columns, within, HIDDEN, PLANES)
    tl.store(out + token * HIDDEN + columns, steered.to(out.dtype.element_ty), mask=within)


def add_rms_norm_steer(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    bank: Tensor,
    classes: Tensor,
    rows: Tensor,
    unit_offset: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """RMS norm of x + residual, steered; and the sum.

    One program a token. A token whose rows are off is what the norm alone gives, to the bit.

    Args:
        x: [T, d], unit stride within a token.
        residual: as x, or None.
        weight: [d], the gain.
        eps: added to the mean square.
        bank: [slots, 2, d] float32, contiguous.
        classes: [slots, 5] float32, contiguous.
        rows: [T, planes, 7] float32, contiguous.
        unit_offset: the gain is 1 + weight (Gemma).

    Returns:
        [T, d] in x's dtype, and x + residual likewise (None without one).
    """
    tokens, hidden = x.shape
    out = torch.empty((tokens, hidden), dtype=x.dtype, device=x.device)
    total = None if residual is None else torch.empty_like(out)
    if not tokens:
        return out, total
    block, warps = block_and_warps(hidden)
    with torch.cuda.device_of(x):
        _add_rms_norm_steer[(tokens,)](
            x,
            x if residual is None else residual,
            weight,
            bank,
            classes,
            rows,
            out,
            out if total is None else total,
            x.stride(0),
            0 if residual is None else residual.stride(0),
            eps,
            HIDDEN=hidden,
            PLANES=rows.shape[1],
            HAS_RESIDUAL=residual is not None,
            UNIT_OFFSET=unit_offset,
            BLOCK=block,
            num_warps=warps,
        )
    return out, total
