"""Where Triton's interpreter does otherwise than its compiler: mended, where it is used."""

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def mend() -> None:
    """Let the interpreter compare, take masks and round as the compiler does."""
    _boolean_comparisons()
    _boolean_masks()
    _round_to_nearest_even()


def _boolean_comparisons() -> None:
    # A comparison's result is an i1 to the compiler; to the interpreter it is of the type that was
    # compared, as soon as it is broadcast.
    apply = InterpreterBuilder.binary_op

    def binary_op(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
        result = apply(self, lhs, rhs, op)
        return TensorHandle(result.data, tl.int1) if result.data.dtype == bool else result

    InterpreterBuilder.binary_op = binary_op


def _boolean_masks() -> None:
    # `a & b` of two comparisons, one of them a scalar, is an i1 to the compiler and an integer to
    # the interpreter's NumPy, which then refuses it ("mask has unsupported dtype"): vLLM's own
    # n-gram kernel is written so.
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def masked_load(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        mask.data = mask.data.astype(bool)
        return load(self, ptrs, mask, *rest)

    def masked_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        mask.data = mask.data.astype(bool)
        return store(self, ptrs, value, mask, *rest)

    InterpreterBuilder.create_masked_load = masked_load
    InterpreterBuilder.create_masked_store = masked_store


def _round_to_nearest_even() -> None:
    # The compiler rounds float32 to bfloat16 to the nearest even; the interpreter cuts bits off.
    cast = InterpreterBuilder.cast_impl

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            rounded = torch.from_numpy(np.array(src.data, dtype=np.float32)).bfloat16()
            bits = rounded.view(torch.int16).numpy().view(np.uint16)
            return TensorHandle(bits.reshape(src.data.shape), dst_type.scalar)
        return cast(self, src, dst_type)

    InterpreterBuilder.cast_impl = cast_impl
