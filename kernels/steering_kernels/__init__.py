"""Rotation of activations in planes, one row of angles per token."""

from steering_kernels.ops import rotate
from steering_kernels.rows import ROW_WIDTH, Mode, encode_row, identity_row

__all__ = ["ROW_WIDTH", "Mode", "encode_row", "identity_row", "rotate"]
