"""Each layout of the norm's kernel: against its floor, the norm alone, and vLLM's own norm.

The floor is the bytes that must be moved over the bandwidth of a copy, measured in the same run.
"""

from __future__ import annotations

import contextlib
import importlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from findings import Findings
from torch import Tensor

from steering_kernels import CLASSES_WIDTH, Mode, encode_row, identity_row, norm_kernel, steer
from steering_kernels.tuning import LAYOUTS, Layout, layout
from steering_planes import orthonormalise

WIDTHS = (4096, 8192, 2048)
TOKENS = (1, 16, 64, 256, 1024, 2048, 8192, 16384)
SLOTS = 4
EPS = 1e-5
DTYPE = torch.bfloat16
SPARE_SECONDS = 5


@dataclass(frozen=True)
class Shape:
    """Activations [tokens, hidden], and what steers them."""

    tokens: int
    hidden: int
    device: str

    @cached_property
    def activations(self) -> tuple[Tensor, Tensor, Tensor]:
        """x and residual, [T, d], and the gain, [d]."""
        torch.manual_seed(0)
        x, residual = (
            torch.randn(self.tokens, self.hidden, device=self.device, dtype=DTYPE) for _ in range(2)
        )
        return x, residual, torch.ones(self.hidden, device=self.device, dtype=DTYPE)

    @cached_property
    def bank(self) -> tuple[Tensor, Tensor]:
        """Bases and class means of the slots."""
        bases = torch.stack([orthonormalise(torch.randn(2, self.hidden)) for _ in range(SLOTS)])
        return bases.to(self.device), torch.zeros(SLOTS, CLASSES_WIDTH, device=self.device)

    def rows(self, kind: str) -> Tensor:
        """[T, 1, 7]: ``off``; ``apart``, each token's slot another than the one's before it; or
        ``alike``, a request's many tokens."""
        rows = {
            "off": lambda i: identity_row(),
            "apart": lambda i: encode_row(Mode.ROTATE_TO, 0.1 * i, i % SLOTS),
            "alike": lambda i: encode_row(Mode.ROTATE_TO, 0.1 * (i // 512), i // 512 % SLOTS),
        }[kind]
        return torch.tensor([[rows(i)] for i in range(self.tokens)]).to(self.device)

    @property
    def bytes(self) -> int:
        """Of x, residual, the normed and the sum."""
        return 4 * self.tokens * self.hidden * DTYPE.itemsize


def run(findings: Findings, rehearse: bool, widths: Sequence[int] | None) -> None:
    """The layout in use first, at every shape; then what might replace it."""
    device = "cpu" if rehearse else "cuda"
    shapes = [
        Shape(tokens, hidden, device)
        for hidden in widths or ((64,) if rehearse else WIDTHS)
        for tokens in ((1, 8) if rehearse else TOKENS)
    ]
    timed = _once if rehearse else microseconds
    bandwidth = copy_bandwidth(device, timed)
    findings.tell(copy_bandwidth_gb_s=bandwidth / 1e3)
    in_use = {shape: layout(shape.hidden, shape.tokens) for shape in shapes}
    times: dict[Shape, dict[str, float]] = {shape: {} for shape in shapes}

    def measure(name: str, shape: Shape, work: Callable[[], object]) -> None:
        times[shape][name] = timed(work)
        findings.tell(
            tokens=shape.tokens, hidden=shape.hidden, what=name, us=times[shape][name],
            of_copy_bandwidth=shape.bytes / bandwidth / times[shape][name],
        )  # fmt: skip

    for shape in shapes:
        for kind in ("off", "apart", "alike"):
            measure(kind, shape, fused(shape, in_use[shape], shape.rows(kind)))
    judge(findings, times, bandwidth, rehearse)
    for hidden in dict.fromkeys(shape.hidden for shape in shapes):
        others = vllm_norms(rehearse)
        for shape in (shape for shape in shapes if shape.hidden == hidden):
            for name, norm in others.items():
                measure(name, shape, alone(shape, norm))
                measure(f"{name}, then in place", shape, then_in_place(shape, norm))
            if findings.left() < SPARE_SECONDS:
                up_to = f"no time left after {shape.tokens} x {hidden}"
                findings.verdict("vLLM's norms, and every layout, were timed", None, up_to)
                return
    _beside_vllm(findings, times)
    candidates = [c for c in LAYOUTS if c.columns == 1024] if rehearse else LAYOUTS
    for candidate in candidates:
        for shape in shapes:
            if findings.left() < SPARE_SECONDS:
                findings.verdict("every layout was timed", None, f"up to {candidate}")
                return
            for kind in ("apart", "alike"):
                rows = shape.rows(kind)
                measure(f"{kind}: {candidate}", shape, fused(shape, candidate, rows))
    for shape in shapes:
        # Whichever is the slower: decoding requests of several planes, or a long prompt of one.
        slower = {c: max(times[shape][f"{k}: {c}"] for k in ("apart", "alike")) for c in candidates}
        best = min(slower, key=slower.__getitem__)
        mine = max(times[shape]["apart"], times[shape]["alike"])
        findings.verdict(
            f"the layout for {shape.tokens} x {shape.hidden} is within 3 % of the fastest",
            None if rehearse else mine <= 1.03 * slower[best],
            f"{mine:.2f} us ({in_use[shape]}), {slower[best]:.2f} us ({best})",
        )


def fused(shape: Shape, laid_out: Layout, rows: Tensor) -> Callable[[], object]:
    """Norm and steering in one kernel."""
    (x, residual, weight), (bank, classes) = shape.activations, shape.bank
    return lambda: norm_kernel.add_rms_norm_steer(
        x, residual, weight, EPS, bank, classes, rows, laid_out=laid_out
    )


Norm = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def alone(shape: Shape, norm: Norm) -> Callable[[], object]:
    """A norm that is not ours."""
    return lambda: norm(*shape.activations)


def then_in_place(shape: Shape, norm: Norm) -> Callable[[], object]:
    """A norm that is not ours, and its output steered in place."""
    bank, classes = shape.bank
    rows = shape.rows("apart")

    def work() -> object:
        normed, total = norm(*shape.activations)
        return steer(normed, bank, classes, rows, "triton"), total

    return work


def vllm_norms(rehearse: bool) -> dict[str, Norm]:
    """What our kernel replaces: vLLM's CUDA op, where it is built, and Inductor's own kernel."""
    norms: dict[str, Norm] = {}

    def native(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        value = x.float() + residual.float()
        normed = value * torch.rsqrt(value.square().mean(-1, keepdim=True) + EPS)
        return normed.to(x.dtype) * weight, value.to(x.dtype)

    if rehearse:
        return {"Inductor's norm": native}
    norms["Inductor's norm"] = torch.compile(native, dynamic=True)
    # Where vLLM's builds have it; without vLLM there is none.
    for library in ("vllm._C_stable_libtorch", "vllm._C"):
        with contextlib.suppress(ImportError):
            importlib.import_module(library)

    def op(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        # In place: the time is what is asked for, whatever the values become.
        torch.ops._C.fused_add_rms_norm(x, residual, weight, EPS)
        return x, residual

    if hasattr(torch.ops._C, "fused_add_rms_norm"):
        norms["vLLM's CUDA norm"] = op
    return norms


def judge(
    findings: Findings,
    times: Mapping[Shape, Mapping[str, float]],
    bandwidth: float,
    rehearse: bool,
) -> None:
    """What is asked of the layout in use; times of the interpreter say nothing."""
    ratios = {s: max(t["apart"], t["alike"]) / t["off"] for s, t in times.items()}
    worst = max(ratios, key=ratios.__getitem__)
    findings.verdict(
        "norm and steering <= 1.05 x the norm alone, at every T",
        None if rehearse else ratios[worst] <= 1.05,
        f"{ratios[worst]:.3f} at {worst.tokens} x {worst.hidden}",
    )
    long = {s: s.bytes / bandwidth / t["apart"] for s, t in times.items() if s.tokens >= 2048}
    if long:
        least = min(long, key=long.__getitem__)
        findings.verdict(
            ">= 85 % of the copy bandwidth from T = 2048",
            None if rehearse else long[least] >= 0.85,
            f"{long[least]:.1%} at {least.tokens} x {least.hidden}",
        )


def _beside_vllm(findings: Findings, times: Mapping[Shape, Mapping[str, float]]) -> None:
    """The fused kernel against what it replaces, and against the second way."""
    for name in ("Inductor's norm", "vLLM's CUDA norm"):
        known = {s: t for s, t in times.items() if name in t}
        if not known:
            continue
        for what, of in (
            ("fused, unsteered", "off"),
            ("fused", "apart"),
            ("steered in place", f"{name}, then in place"),
        ):
            ratios = [t[of] / t[name] for t in known.values()]
            findings.verdict(f"{what} / {name}", None, f"{min(ratios):.2f} to {max(ratios):.2f}")


def copy_bandwidth(device: str, timed: Callable[[Callable[[], object]], float]) -> float:
    """Bytes a microsecond that a copy reads and writes: of 1 GiB, beyond every cache."""
    size = 2**20 if device == "cpu" else 2**30
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / timed(lambda: target.copy_(source))


def microseconds(work: Callable[[], object]) -> float:
    """The median time of a call, captured into a CUDA graph as vLLM captures it."""
    import triton.testing

    with torch.cuda.stream(torch.cuda.Stream()):
        # 4 ms a sample, ten samples.
        return 1e3 * float(triton.testing.do_bench_cudagraph(work, rep=4, return_mode="median"))


def _once(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return 1e6 * (time.perf_counter() - start)
