"""On PYTHONPATH of an engine's processes: Triton kernels run on Triton's interpreter.

vLLM takes Triton to be absent unless some backend's driver is active, and it asks when it is
imported; so this comes before it. With TRITON_INTERPRET=1 no backend is ever asked to compile.
"""

import types

import triton.backends
from interpreter_as_compiler import mend


class _Driver:
    @staticmethod
    def is_active() -> bool:
        return True


triton.backends.backends["cpu"] = types.SimpleNamespace(driver=_Driver, compiler=None)
mend()
