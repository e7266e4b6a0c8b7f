"""Steering of activations in planes, one row of operations per token."""

from steering_kernels.ops import Choice, Kernels, add_rms_norm_steer, choose, steer
from steering_kernels.rows import CLASSES_WIDTH, ROW_WIDTH, Mode, encode_row, identity_row

__all__ = [
    "CLASSES_WIDTH",
    "ROW_WIDTH",
    "Choice",
    "Kernels",
    "Mode",
    "add_rms_norm_steer",
    "choose",
    "encode_row",
    "identity_row",
    "steer",
]
