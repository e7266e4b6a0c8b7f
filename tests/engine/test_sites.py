"""A norm that was steered returns what it did, operated on, whichever kernels do it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from steering_kernels import Mode, encode_row, identity_row, reference
from steering_planes import orthonormalise
from steering_server.engine.sites import is_fusable, wire

HIDDEN = 96
BANK = orthonormalise(torch.randn(2, HIDDEN, generator=torch.Generator().manual_seed(0)))[None]
CLASSES = torch.tensor([[1.0, 0.5, -1.0, 0.25, 2.5]])
ROWS = torch.tensor(
    [
        [
            encode_row(mode, 20.0 * i, 0, None, 0.5, mode > Mode.ROTATE_TO)
            if mode
            else identity_row()
        ]
        for i, mode in enumerate((*Mode, Mode.ADD, Mode.OFF))
    ]
)


@pytest.fixture(autouse=True)
def _vllm() -> Iterator[None]:
    """vLLM's norms ask for a configuration when they are made and when they run."""
    from vllm.config import VllmConfig, set_current_vllm_config

    with set_current_vllm_config(VllmConfig()):
        yield


def rms_norm(**options: Any) -> nn.Module:
    """vLLM's norm with an uneven gain."""
    from vllm.model_executor.layers.layernorm import RMSNorm

    return with_gain(RMSNorm(HIDDEN, eps=1e-5, **options))


def gemma_rms_norm() -> nn.Module:
    """vLLM's norm of Gemma, likewise."""
    from vllm.model_executor.layers.layernorm import GemmaRMSNorm

    return with_gain(GemmaRMSNorm(HIDDEN, eps=1e-5))


def with_gain(norm: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    for parameter in norm.parameters():
        parameter.data = torch.rand(parameter.shape) + 0.5
    return norm.requires_grad_(False)


NORMS: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "RMSNorm": (rms_norm, True),
    "GemmaRMSNorm": (gemma_rms_norm, True),
    "LayerNorm": (lambda: with_gain(nn.LayerNorm(HIDDEN)), False),
    "of a part": (lambda: rms_norm(var_hidden_size=HIDDEN // 2), False),
    "no gain": (lambda: rms_norm(has_weight=False), False),
}


WAYS: Any = pytest.mark.parametrize(
    ("kernels", "fuse"), list(itertools.product(["torch", "triton"], [True, False])), ids=str
)


def expected(out: Tensor) -> Tensor:
    return reference.steer(out, BANK, CLASSES, ROWS[: len(out)])


@WAYS
@pytest.mark.parametrize("name", NORMS)
def test_a_steered_norm_is_the_norm_operated_on(name: str, kernels: Any, fuse: bool) -> None:
    make, fusable = NORMS[name]
    norm, plain = make(), make()
    assert is_fusable(norm) == fusable
    wire(norm, BANK, CLASSES, ROWS, kernels, fuse)
    assert isinstance(norm, type(plain))
    fused = "FusedNorm" in type(norm).forward.__qualname__
    assert fused == (fusable and fuse)
    x, residual = torch.randn(6, HIDDEN), torch.randn(6, HIDDEN)
    assert torch.allclose(norm(x.clone()), expected(plain(x.clone())), atol=2e-6)
    if name == "LayerNorm":
        return
    out, total = norm(x.clone(), residual.clone())
    plain_out, plain_total = plain(x.clone(), residual.clone())
    assert torch.allclose(out, expected(plain_out), atol=2e-6)
    assert torch.equal(total, plain_total)


@WAYS
def test_the_shape_of_transformers_is_kept(kernels: Any, fuse: bool) -> None:
    """[1, T, d], where vLLM runs transformers' own modules."""
    norm, plain = rms_norm(), rms_norm()
    wire(norm, BANK, CLASSES, ROWS, kernels, fuse)
    x = torch.randn(1, 6, HIDDEN)
    out = norm(x.clone())
    assert out.shape == x.shape
    assert torch.allclose(out[0], expected(plain(x.clone())[0]), atol=2e-6)


@WAYS
@pytest.mark.parametrize("name", ["RMSNorm", "LayerNorm"])
def test_nothing_is_asked_of_the_number_of_tokens(name: str, kernels: Any, fuse: bool) -> None:
    """One graph for any, traced without knowing it, as under vLLM's dynamic shapes "unbacked"."""
    make, _ = NORMS[name]
    norm, plain = make(), make()
    wire(norm, BANK, CLASSES, ROWS, kernels, fuse)

    def step(norm: nn.Module, x: Tensor) -> Tensor:
        out: Tensor = norm(x + 1)
        return out if name == "LayerNorm" else norm(out, x)[0]

    graph = torch.compile(step, fullgraph=True, backend="aot_eager")
    with torch.inference_mode():
        for tokens in (6, 3, 1):
            x = torch.randn(tokens, HIDDEN)
            torch._dynamo.decorators.mark_unbacked(x, 0)
            want = expected(plain(x + 1))
            want = want if name == "LayerNorm" else expected(plain(want, x.clone())[0])
            assert torch.allclose(graph(norm, x), want, atol=5e-6)


@pytest.mark.parametrize("make", [rms_norm, gemma_rms_norm])
def test_a_kept_norm_is_for_vllm_to_fuse_and_its_output_is_not_copied(
    make: Callable[[], nn.Module],
) -> None:
    """vLLM's passes find it in the compiler's graph, as they do without steering; what steers it
    writes where it wrote."""
    import vllm.ir
    from torch._dynamo.utils import ReinplaceCounters
    from torch._inductor import config
    from vllm.config import CompilationConfig, VllmConfig, set_current_vllm_config

    # As where vLLM compiles a model.
    with set_current_vllm_config(
        VllmConfig(compilation_config=CompilationConfig(custom_ops=["none"]))
    ):
        norm = make()
    wire(norm, BANK, CLASSES, ROWS, "triton", fuse=False)
    seen: list[str] = []

    def look(graph: torch.fx.Graph) -> None:
        # Where vLLM's fusions are made. An op that writes to its arguments is called by another.
        seen.extend(f"{node.target} {node.args[:1]}" for node in graph.nodes)

    def layer(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        normed, total = norm(x @ x.T @ x, residual)
        return normed @ normed.T, total

    ReinplaceCounters.clear()
    x, residual = torch.randn(6, HIDDEN), torch.randn(6, HIDDEN)
    with (
        vllm.ir.enable_torch_wrap(True),
        config.patch(post_grad_custom_post_pass=look, enable_auto_functionalized_v2=False),
        torch.inference_mode(),
    ):
        torch.compile(layer, fullgraph=True)(x, residual)
    assert sum("vllm_ir.fused_add_rms_norm" in node for node in seen) == 1
    assert sum("steering.steer_" in node for node in seen) == 1
    assert ReinplaceCounters.get_total_missed() == 0
    assert ReinplaceCounters.get_total_missed_bytes() == 0


@pytest.mark.parametrize("first", [True, False])
def test_a_norm_of_the_sum_of_a_tensor_and_itself_compiles(first: bool) -> None:
    """Beside others, whose graph it must not be given."""
    norms = [rms_norm(), rms_norm()]
    plain = rms_norm()
    for norm in norms:
        wire(norm, BANK, CLASSES, ROWS, "torch", fuse=True)

    def step(x: Tensor, residual: Tensor) -> list[Tensor]:
        pairs = [(x, x), (x, residual)]
        pairs = pairs if first else pairs[::-1]
        return [norm(*pair)[0] for norm, pair in zip(norms, pairs, strict=True)]

    x, residual = torch.randn(6, HIDDEN), torch.randn(6, HIDDEN)
    out = torch.compile(step, fullgraph=True)(x, residual)
    for got, other in zip(out if first else out[::-1], (x, residual), strict=True):
        assert torch.allclose(got, expected(plain(x.clone(), other.clone())[0]), atol=5e-6)


def test_norms_that_differ_in_a_number_are_each_computed_with_their_own() -> None:
    """A graph holds one copy of what is equal, and any number of what is not."""
    epsilons = [2.0**-i for i in range(10)]
    norms, plain = [rms_norm() for _ in epsilons], rms_norm()
    for norm, eps in zip(norms, epsilons, strict=True):
        norm.variance_epsilon = eps  # type: ignore[assignment]
        wire(norm, BANK, CLASSES, ROWS, "torch", fuse=True)

    def step(x: Tensor) -> list[Tensor]:
        return [norm(x) for norm in (*norms, *norms)]

    x = torch.randn(6, HIDDEN)
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(x)
    for out, eps in zip(got, (*epsilons, *epsilons), strict=True):
        plain.variance_epsilon = eps  # type: ignore[assignment]
        assert torch.allclose(out, expected(plain(x.clone())), atol=5e-6)


def test_a_subclass_is_not_taken_for_what_it_derives_from() -> None:
    from vllm.model_executor.layers.layernorm import RMSNorm

    class Other(RMSNorm):
        pass

    assert not is_fusable(Other(HIDDEN))


def test_a_batch_invariant_norm_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    assert not is_fusable(rms_norm())


def test_its_names_in_the_module_tree_stay() -> None:
    """Weight loading and LoRA see what they know; sleep mode sees the buffers."""
    norm = rms_norm()
    before = {name for name, _ in norm.named_parameters()}, set(norm.state_dict())
    wire(norm, BANK, CLASSES, ROWS, "torch", fuse=False)
    assert ({name for name, _ in norm.named_parameters()}, set(norm.state_dict())) == before
    assert {"steering_bank", "steering_classes", "steering_rows"} <= {
        name for name, _ in norm.named_buffers()
    }


def test_twice_is_refused() -> None:
    norm = rms_norm()
    wire(norm, BANK, CLASSES, ROWS, "torch", fuse=False)
    with pytest.raises(RuntimeError, match="retyped"):
        wire(norm, BANK, CLASSES, ROWS, "torch", fuse=False)
