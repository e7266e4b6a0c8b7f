"""Which kernels run, and why."""

from __future__ import annotations

import pytest
import torch

from steering_kernels import choose

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
