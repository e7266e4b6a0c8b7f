"""Compiles the kernels for GPUs that are not here, and says what came out, as JSON.

Run in a process of its own with TRITON_INTERPRET=0: the interpreter compiles nothing.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from steering_kernels import norm_kernel, steer_kernel, tuning
from steering_kernels.tuning import LAYOUTS, Layout, block_and_warps

ARCHITECTURES = (80, 90, 100)
HIDDEN = (576, 8192)
DTYPES = ("bf16", "fp32")
PLANES = (1, 2)

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def compile_steer(arch: int, dtype: str, hidden: int, planes: int) -> dict[str, Any]:
    """`_steer` for aligned rows."""
    pointers = {"h": f"*{dtype}", "bank": "*fp32", "classes": "*fp32", "rows": "*fp32"}
    constants = {"HIDDEN": hidden, "PLANES": planes}
    return report(steer_kernel._steer, arch, hidden, pointers, {"h_stride": "i32"}, constants)


def compile_norm(
    arch: int, dtype: str, hidden: int, planes: int, layout: Layout | None = None
) -> dict[str, Any]:
    """`_add_rms_norm_steer` with a residual, for aligned rows, in a layout (that of one token)."""
    layout = layout or tuning.layout(hidden, 1)
    activations = ("x", "residual", "weight", "out", "residual_out")
    pointers = dict.fromkeys(activations, f"*{dtype}") | {
        "bank": "*fp32",
        "classes": "*fp32",
        "rows": "*fp32",
    }
    strides = {"x_stride": "i32", "residual_stride": "i32"}
    constants = {
        "HIDDEN": hidden,
        "PLANES": planes,
        "HAS_RESIDUAL": True,
        "UNIT_OFFSET": False,
        "FORM": layout.form if planes == 1 else "branch",
        "TOKENS": layout.tokens,
    }
    kernel = norm_kernel._add_rms_norm_steer
    others = {"eps": "fp32", "tokens": "i32"}
    built = report(kernel, arch, hidden, pointers, strides, constants, others, layout.columns)
    return {**built, "layout": str(layout)}


def report(
    kernel: Any,
    arch: int,
    hidden: int,
    pointers: dict[str, str],
    strides: dict[str, str],
    constants: dict[str, Any],
    others: dict[str, str] | None = None,
    columns: int = 512,
) -> dict[str, Any]:
    """Compile a kernel; what its PTX and its machine code say.

    Pointers and strides are declared divisible by 16, as the launcher finds them for a model's
    aligned activations.
    """
    block, warps = block_and_warps(hidden, columns)
    constants = {**constants, "BLOCK": block}
    types = {**pointers, **strides, **(others or {})}
    names = kernel.arg_names
    aligned = {(names.index(n),): [["tt.divisibility", 16]] for n in (*pointers, *strides)}
    source = ASTSource(
        kernel,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs=aligned,
    )
    compiled = triton.compile(
        source, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps}
    )
    ptx = compiled.asm["ptx"]
    accesses = re.findall(r"\b(ld|st)\.global[.\w:]*?(?:\.(v[24]))?\.b(\d+)\b", ptx)
    widths = [(kind, int((vector or "v1")[1:]) * int(bits) // 8) for kind, vector, bits in accesses]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    resources = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return {
        "kernel": kernel.fn.__name__,
        "sm": arch,
        "hidden": hidden,
        "warps": warps,
        "registers": resources["REG"],
        "stack": resources["STACK"],
        "local": resources["LOCAL"],
        "spills": len(re.findall(r"\b(?:ld|st)\.local\b", ptx)),
        "loads": sorted(width for kind, width in widths if kind == "ld"),
        "stores": sorted(width for kind, width in widths if kind == "st"),
    }


def main() -> None:
    results = [
        {"dtype": dtype, "planes": planes, **build(arch, dtype, hidden, planes)}
        for arch in ARCHITECTURES
        for build in (compile_steer, compile_norm)
        for dtype in DTYPES
        for hidden in HIDDEN
        for planes in PLANES
    ]
    # What `make gpu-check` may find to be faster.
    results += [
        {"dtype": "bf16", "planes": 1, **compile_norm(90, "bf16", 8192, 1, layout)}
        for layout in LAYOUTS
    ]
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
