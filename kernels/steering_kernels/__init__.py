"""Rotation of activations in planes, one row of angles per token."""

from steering_kernels.ops import Choice, Kernels, add_rms_norm_rotate, choose, rotate
from steering_kernels.rows import ROW_WIDTH, Mode, encode_row, identity_row

__all__ = [
    "ROW_WIDTH",
    "Choice",
    "Kernels",
    "Mode",
    "add_rms_norm_rotate",
    "choose",
    "encode_row",
    "identity_row",
    "rotate",
]
