"""Residual add, RMS norm and steering in one pass over the activations.

The norm reads and writes every activation anyway; steering what it has in registers adds two dot
products and no pass over memory.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from steering_kernels.operation import OFF, WIDTH, act, mode_and_slot, operate
from steering_kernels.tuning import Layout, block_and_warps, layout


@triton.jit
def _sums(a, b, c, d, e, f):
    return a + d, b + e, c + f


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
    tokens,
    HIDDEN: tl.constexpr,
    PLANES: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
    BLOCK: tl.constexpr,
    FORM: tl.constexpr,
    TOKENS: tl.constexpr,
):
    columns = tl.arange(0, BLOCK)
    within = columns < HIDDEN
    gain = tl.load(weight + columns, mask=within, other=0.0)
    # The basis that is in registers, and its slot.
    held = tl.full([], -1, tl.int64)
    b1 = tl.zeros([BLOCK], tl.float32)
    b2 = tl.zeros([BLOCK], tl.float32)
    # 64 bits: T * d passes 2**31 in a long prefill of a wide model.
    first = tl.program_id(0).to(tl.int64) * TOKENS
    for token in range(first, tl.minimum(first + TOKENS, tokens)):
        row = rows + token * (PLANES * WIDTH)
        if FORM != "branch":
            # Not in a branch: the loads are on their way while the activation is normed.
            mode, slot = mode_and_slot(row)
            on = mode != OFF
            missing = on & (slot != held)
            basis = bank + slot * (2 * HIDDEN)
            fresh1 = tl.load(basis + columns, mask=within & missing, other=0.0)
            fresh2 = tl.load(basis + HIDDEN + columns, mask=within & missing, other=0.0)
            b1 = tl.where(missing, fresh1, b1)
            b2 = tl.where(missing, fresh2, b2)
            held = tl.where(missing, slot, held)
        value = tl.load(x + token * x_stride + columns, mask=within, other=0.0).to(tl.float32)
        if HAS_RESIDUAL:
            added = tl.load(residual + token * residual_stride + columns, mask=within, other=0.0)
            value += added.to(tl.float32)
            tl.store(
                residual_out + token * HIDDEN + columns,
                value.to(residual_out.dtype.element_ty),
                mask=within,
            )
        factor = gain.to(tl.float32) + 1.0 if UNIT_OFFSET else gain.to(tl.float32)
        if FORM == "joint":
            full = value * factor
            squares, c1, c2 = tl.reduce((value * value, full * b1, full * b2), 0, _sums)
        else:
            squares = tl.sum(value * value)
        scale = tl.rsqrt(squares / HIDDEN + eps)
        normed = value * scale
        if not UNIT_OFFSET:
            # As vLLM's norm: rounded to the gain's dtype before the product.
            normed = normed.to(gain.dtype).to(tl.float32)
        normed *= factor
        if FORM == "branch":
            normed, _ = operate(normed, row, bank, classes, columns, within, HIDDEN, PLANES)
        elif on:
            if FORM == "joint":
                # Unrounded too: coordinates and activation must be of one vector.
                steered, acts = act(
                    full * scale, b1, b2, c1 * scale, c2 * scale, row, mode, classes, slot
                )
                normed = tl.where(acts, steered, normed)
            else:
                c1 = tl.sum(normed * b1)
                c2 = tl.sum(normed * b2)
                normed, _ = act(normed, b1, b2, c1, c2, row, mode, classes, slot)
        tl.store(out + token * HIDDEN + columns, normed.to(out.dtype.element_ty), mask=within)


def add_rms_norm_steer(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    bank: Tensor,
    classes: Tensor,
    rows: Tensor,
    unit_offset: bool = False,
    laid_out: Layout | None = None,
) -> tuple[Tensor, Tensor | None]:
    """RMS norm of x + residual, steered; and the sum.

    A token whose rows are off is what the norm alone gives, to the bit.

    Args:
        x: [T, d], unit stride within a token.
        residual: as x, or None.
        weight: [d], the gain.
        eps: added to the mean square.
        bank: [slots, 2, d] float32, contiguous.
        classes: [slots, 5] float32, contiguous.
        rows: [T, planes, 7] float32, contiguous.
        unit_offset: the gain is 1 + weight (Gemma).
        laid_out: the launch; None is what :func:`steering_kernels.tuning.layout` chooses.

    Returns:
        [T, d] in x's dtype, and x + residual likewise (None without one).
    """
    tokens, hidden = x.shape
    out = torch.empty((tokens, hidden), dtype=x.dtype, device=x.device)
    total = None if residual is None else torch.empty_like(out)
    if not tokens:
        return out, total
    chosen = laid_out or layout(hidden, tokens)
    block, warps = block_and_warps(hidden, chosen.columns)
    planes = rows.shape[1]
    with torch.cuda.device_of(x):
        _add_rms_norm_steer[(triton.cdiv(tokens, chosen.tokens),)](
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
            tokens,
            HIDDEN=hidden,
            PLANES=planes,
            HAS_RESIDUAL=residual is not None,
            UNIT_OFFSET=unit_offset,
            BLOCK=block,
            FORM=chosen.form if planes == 1 else "branch",
            TOKENS=chosen.tokens,
            num_warps=warps,
        )
    return out, total
