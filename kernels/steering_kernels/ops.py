"""The one entrance to the kernels: checks what it is given, then runs what was chosen."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from steering_kernels import reference
from steering_kernels.rows import CLASSES_WIDTH, ROW_WIDTH

Kernels = Literal["triton", "torch"]


@dataclass(frozen=True)
class Choice:
    """Which kernels run on a device, and why."""

    kernels: Kernels
    why: str


def choose(device: torch.device, wanted: Literal["auto", "triton", "torch"] = "auto") -> Choice:
    """The kernels for a device.

    ``torch`` is plain torch traced into the model's graph, which Inductor compiles; ``triton`` is
    ours. On a CPU Triton only has its interpreter.

    Raises:
        ValueError: Triton's kernels wanted where they cannot run.
    """
    if wanted == "torch":
        return Choice("torch", "asked for")
    if (reason := _no_triton(device)) is None:
        why = "asked for" if wanted == "triton" else f"the device is {device.type}"
        if wanted == "triton" or device.type != "cpu":
            return Choice("triton", why)
        return Choice("torch", "on a CPU, plain torch in the graph is faster")
    if wanted == "triton":
        raise ValueError(f"kernels = 'triton' on {device.type}: {reason}")
    return Choice("torch", reason)


def _no_triton(device: torch.device) -> str | None:
    """Why Triton's kernels cannot run on a device; None where they can."""
    try:
        import triton
    except ImportError:
        return "Triton is not installed"
    if device.type == "cpu" and not triton.knobs.runtime.interpret:
        return "Triton runs on a CPU only as its interpreter (TRITON_INTERPRET=1)"
    return None


def _region(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of which a graph holds one copy for all calls that differ in tensors alone."""
    region: Any = torch.compiler.nested_compile_region
    # PyTorch takes more than eight copies for a fault. An older one, which has no such bound, does
    # not know its name either.
    known = inspect.signature(region).parameters
    bound = {"max_reuse_entries": sys.maxsize} if "max_reuse_entries" in known else {}
    marked: Callable[..., Any] = region(function, **bound)
    return marked


# Traced and compiled once, and called from every site of the graph. vLLM compiles a model for the
# CPU as one graph, to which a site would otherwise add as much as half a layer. For other devices
# it cuts the graph in pieces, and compiles equal ones once.
_steer_region = _region(reference.steer)
_norm_region = _region(reference.add_rms_norm_steer)


def steer(
    h: Tensor, bank: Tensor, classes: Tensor, rows: Tensor, kernels: Kernels = "torch"
) -> Tensor:
    """Operate on activations [T, d] in planes [slots, 2, d], as rows [T, planes, 7] say.

    Args:
        h: [T, d]; Triton's kernel changes it in place.
        bank: [slots, 2, d] float32.
        classes: [slots, 5] float32.
        rows: [T, planes, 7] float32.
        kernels: what :func:`choose` said.

    Returns:
        [T, d], see :func:`steering_kernels.reference.steer`.

    Raises:
        ValueError: shapes or dtypes that do not fit together.
    """
    check(h, bank, classes, rows)
    if kernels == "torch":
        on_cpu = h.device.type == "cpu"
        return (_steer_region if on_cpu else reference.steer)(h, bank, classes, rows)
    h = _side_by_side(h)
    _steer_op(h, bank, classes, rows)
    return h


def add_rms_norm_steer(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    bank: Tensor,
    classes: Tensor,
    rows: Tensor,
    unit_offset: bool = False,
    kernels: Kernels = "torch",
) -> tuple[Tensor, Tensor | None]:
    """RMS norm of x + residual [T, d], steered; and the sum.

    See :func:`steering_kernels.reference.add_rms_norm_steer`.

    Raises:
        ValueError: shapes or dtypes that do not fit together.
    """
    check(x, bank, classes, rows)
    if residual is not None and (residual.shape[1:] != x.shape[1:] or not _as_many(residual, x)):
        raise ValueError(f"residual must be {list(x.shape)}, got {list(residual.shape)}")
    if weight.shape != x.shape[1:]:
        raise ValueError(f"weight must be [{x.shape[1]}], got {list(weight.shape)}")
    if kernels == "torch":
        # A region cannot be given one tensor twice.
        once = x.device.type == "cpu" and residual is not x
        norm = _norm_region if once else reference.add_rms_norm_steer
        return norm(x, residual, weight, eps, bank, classes, rows, unit_offset)
    x = _side_by_side(x)
    if residual is None:
        return _norm_op(x, weight, eps, bank, classes, rows, unit_offset), None
    both: tuple[Tensor, Tensor] = _add_norm_op(
        x, _side_by_side(residual), weight, eps, bank, classes, rows, unit_offset
    )
    return both


def check(h: Tensor, bank: Tensor, classes: Tensor, rows: Tensor) -> None:
    """What every op requires of its activations, bank, classes and rows.

    Raises:
        ValueError: naming what does not fit, what it must be and what it is.
    """
    if h.dim() != 2:
        raise ValueError(f"h must be [T, d], got {list(h.shape)}")
    if bank.dim() != 3 or bank.shape[1] != 2 or bank.shape[2] != h.shape[1]:
        raise ValueError(f"bank must be [slots, 2, {h.shape[1]}], got {list(bank.shape)}")
    if classes.shape != (bank.shape[0], CLASSES_WIDTH):
        wanted = f"[{bank.shape[0]}, {CLASSES_WIDTH}]"
        raise ValueError(f"classes must be {wanted}, got {list(classes.shape)}")
    if rows.dim() != 3 or not _as_many(rows, h) or rows.shape[2] != ROW_WIDTH:
        raise ValueError(
            f"rows must be [{h.shape[0]}, planes, {ROW_WIDTH}], got {list(rows.shape)}"
        )
    dtypes = [tensor.dtype for tensor in (bank, classes, rows)]
    if any(dtype != torch.float32 for dtype in dtypes):
        raise ValueError(f"bank, classes and rows must be float32, got {dtypes}")


def _as_many(one: Tensor, other: Tensor) -> bool:
    """Whether they have as many tokens. Not asked while a graph is traced: it would be a guard on
    a number that vLLM may have declared unknown (dynamic shapes "unbacked")."""
    return torch.compiler.is_compiling() or one.shape[0] == other.shape[0]


def _side_by_side(h: Tensor) -> Tensor:
    """A kernel reads a token's activations as one run; every norm of vLLM's has them so."""
    return h if h.stride(-1) == 1 else h.contiguous()


# Triton's kernels, opaque to the compiler but for their shapes. They are imported when first run:
# without Triton the rest of the package works.
#
# Registered as vLLM registers its own, on a library: torch.library.custom_op puts autograd and a
# check for aliases around every call (17 us against 4 us on the host, once a site and step).

_LIBRARY = torch.library.Library("steering", "FRAGMENT")  # type: ignore[no-untyped-call]


def _register(name: str, op: Callable[..., Any], fake: Callable[..., Any], *mutated: str) -> Any:
    """``op`` as ``torch.ops.steering.NAME``, on every device.

    Args:
        name: the op's name in the library.
        op: what runs; its annotations give the schema.
        fake: what the compiler runs instead: shapes and dtypes alone.
        mutated: the arguments that ``op`` writes to.
    """
    schema = torch.library.infer_schema(op, mutates_args=mutated)
    _LIBRARY.define(name + schema)  # type: ignore[no-untyped-call]
    _LIBRARY.impl(name, op, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"steering::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.steering, name).default


def _steer(h: Tensor, bank: Tensor, classes: Tensor, rows: Tensor) -> None:
    from steering_kernels.steer_kernel import steer_

    steer_(h, bank, classes, rows)


def _steer_fake(h: Tensor, bank: Tensor, classes: Tensor, rows: Tensor) -> None:
    return None


def _norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    bank: Tensor,
    classes: Tensor,
    rows: Tensor,
    unit_offset: bool,
) -> Tensor:
    from steering_kernels import norm_kernel

    return norm_kernel.add_rms_norm_steer(x, None, weight, eps, bank, classes, rows, unit_offset)[0]


def _norm_fake(
    x: Tensor,
    weight: Tensor,
    eps: float,
    bank: Tensor,
    classes: Tensor,
    rows: Tensor,
    unit_offset: bool,
) -> Tensor:
    return x.new_empty(x.shape)


def _add_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    bank: Tensor,
    classes: Tensor,
    rows: Tensor,
    unit_offset: bool,
) -> tuple[Tensor, Tensor]:
    from steering_kernels import norm_kernel

    out, total = norm_kernel.add_rms_norm_steer(
        x, residual, weight, eps, bank, classes, rows, unit_offset
    )
    assert total is not None
    return out, total


def _add_norm_fake(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    bank: Tensor,
    classes: Tensor,
    rows: Tensor,
    unit_offset: bool,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


_steer_op = _register("steer_", _steer, _steer_fake, "h")
_norm_op = _register("rms_norm_steer", _norm, _norm_fake)
_add_norm_op = _register("add_rms_norm_steer", _add_norm, _add_norm_fake)
