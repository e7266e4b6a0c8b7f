"""On PYTHONPATH of an engine's processes: Triton kernels run on Triton's interpreter.

vLLM takes Triton to be absent unless some backend's driver is active, and it asks when it is
imported; so this comes before it. With TRITON_INTERPRET=1 no backend is ever asked to compile.
"""

import types

import triton.backends


class _Driver:
    @staticmethod
    def is_active() -> bool:
        return True


triton.backends.backends["cpu"] = types.SimpleNamespace(driver=_Driver, compiler=None)


def _boolean_masks() -> None:
    """Let the interpreter take the masks that the compiler takes.

    `a & b` of two comparisons, one of them a scalar, is an i1 to the compiler and an integer to
    the interpreter's NumPy, which then refuses it ("mask has unsupported dtype"): vLLM's own
    n-gram kernel is written so.
    """
    from triton.runtime.interpreter import InterpreterBuilder

    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def masked_load(self, ptrs, mask, *rest):  # type: ignore[no-untyped-def]
        mask.data = mask.data.astype(bool)
        return load(self, ptrs, mask, *rest)

    def masked_store(self, ptrs, value, mask, *rest):  # type: ignore[no-untyped-def]
        mask.data = mask.data.astype(bool)
        return store(self, ptrs, value, mask, *rest)

    InterpreterBuilder.create_masked_load = masked_load
    InterpreterBuilder.create_masked_store = masked_store


_boolean_masks()
