"""The one entrance to the rotation: checks what it is given, then chooses how to run it."""

from __future__ import annotations

import torch
from torch import Tensor

from steering_kernels import reference
from steering_kernels.rows import ROW_WIDTH


def rotate(h: Tensor, bank: Tensor, rows: Tensor) -> Tensor:
    """Rotate activations [T, d] in planes [slots, 2, d], as rows [T, planes, 5] say.

    The plain torch form serves every device: traced into the model's graph it is fused by Inductor
    with the norm before it.

    Raises:
        ValueError: shapes or dtypes that do not fit together.
    """
    if h.dim() != 2:
        raise ValueError(f"h must be [T, d], got {list(h.shape)}")
    if bank.dim() != 3 or bank.shape[1] != 2 or bank.shape[2] != h.shape[1]:
        raise ValueError(f"bank must be [slots, 2, {h.shape[1]}], got {list(bank.shape)}")
    if rows.dim() != 3 or rows.shape[0] != h.shape[0] or rows.shape[2] != ROW_WIDTH:
        raise ValueError(
            f"rows must be [{h.shape[0]}, planes, {ROW_WIDTH}], got {list(rows.shape)}"
        )
    if bank.dtype != torch.float32 or rows.dtype != torch.float32:
        raise ValueError(f"bank and rows must be float32, got {bank.dtype} and {rows.dtype}")
    return reference.rotate(h, bank, rows)
