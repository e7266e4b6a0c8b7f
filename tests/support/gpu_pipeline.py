"""vLLM's compilation as a GPU has it, on a CPU: graphs split at attention, saved and found again.

Left alone, a CPU has Inductor compile the whole model, and vLLM 0.32 fails to load there what it
saved ("'function' object has no attribute 'finalize_loading'").
"""

from __future__ import annotations

import importlib
import inspect
import re
from typing import Any

import torch


def use() -> None:
    """Let this process's engines compile so. Called before the first of them."""
    from vllm.config import CompilationMode
    from vllm.platforms.cpu import CpuPlatform

    original = CpuPlatform.check_and_update_config.__func__

    def check_and_update_config(cls: Any, config: Any) -> None:
        original(cls, config)
        compilation = config.compilation_config
        compilation.mode = CompilationMode.VLLM_COMPILE
        compilation.backend = "inductor"
        compilation.ir_enable_torch_wrap = True
        compilation.compile_sizes = []
        compilation.custom_ops = ["none"]

    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)
    _declare_cuda_ops()


def _declare_cuda_ops() -> None:
    """A pass looks for ops of the CUDA build; none is in these graphs, but each must exist."""
    importlib.import_module("vllm._custom_ops")  # which gives those that there are
    from vllm.compilation.passes.utility import fix_functionalization

    source = inspect.getsource(fix_functionalization)
    library = torch.library.Library("_C", "FRAGMENT")
    for name in sorted(set(re.findall(r"torch\.ops\._C\.([a-z_0-9]+)", source))):
        if not hasattr(torch.ops._C, name):
            library.define(f"{name}(Tensor(a!) x) -> ()")
    _KEPT.append(library)


_KEPT: list[Any] = []
"""An op lives as long as its library."""
