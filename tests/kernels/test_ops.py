"""Which kernels run, and why."""

from __future__ import annotations

import pytest
import torch

from steering_kernels import choose, ops

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_a_gpu_runs_triton() -> None:
    choice = choose(CUDA)
    assert (choice.kernels, choice.why) == ("triton", "the device is cuda")
    assert choose(CUDA, "torch").kernels == "torch"


def test_a_cpu_runs_plain_torch_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose(CPU).kernels == "torch"
    assert "faster" in choose(CPU).why
    assert choose(CPU, "triton").kernels == "triton"


def test_what_cannot_run_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert choose(CPU).why.startswith("Triton runs on a CPU only as its interpreter")
    with pytest.raises(ValueError, match=r"kernels = 'triton' on cpu: .*TRITON_INTERPRET"):
        choose(CPU, "triton")


@pytest.mark.parametrize("name", ["steer_", "rms_norm_steer", "add_rms_norm_steer"])
def test_a_call_costs_the_host_a_dispatch_and_no_more(name: str) -> None:
    """Registered on a library, as vLLM does: a ``torch.library.custom_op`` costs four times it."""
    assert f"steering::{name}" not in torch._library.custom_ops.OPDEFS
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    assert has(f"steering::{name}", "CompositeExplicitAutograd")
    assert not has(f"steering::{name}", "Autograd")


def test_a_number_of_tokens_that_does_not_fit_is_said() -> None:
    bank, classes, rows = torch.zeros(1, 2, 8), torch.zeros(1, 5), torch.zeros(3, 1, 7)
    with pytest.raises(ValueError, match=r"rows must be \[2, planes, 7\], got \[3, 1, 7\]"):
        ops.steer(torch.zeros(2, 8), bank, classes, rows)
    with pytest.raises(ValueError, match=r"residual must be \[3, 8\], got \[2, 8\]"):
        ops.add_rms_norm_steer(
            torch.zeros(3, 8), torch.zeros(2, 8), torch.ones(8), 1e-5, bank, classes, rows
        )
