"""The ledger: what is applied is what it says, on a vLLM that is as it says."""

from __future__ import annotations

import dataclasses
import inspect

import pytest
import torch
from torch._inductor import config

from steering_server.engine import patches, plugin
from steering_server.engine.patches import (
    COMPILER,
    FRONT_END,
    OVERRIDES,
    PATCHES,
    Override,
    Patch,
    PatchError,
)
from steering_server.engine.retype import retype


def marked(patch: Patch) -> object:
    """The patch that its target carries now."""
    _, _, attribute = patches._resolve(patch.target)
    return getattr(patches._plain(attribute), "_steering_patch", None)


def test_what_is_applied_is_the_ledger() -> None:
    ledger = (*PATCHES, *FRONT_END)

    def apply() -> list[object]:
        plugin.register()
        patches.apply_front_end()
        return [patches._resolve(patch.target)[2] for patch in ledger]

    before = apply()
    assert [marked(patch) for patch in ledger] == list(ledger)
    assert apply() == before


@pytest.mark.parametrize(
    "entry", [*PATCHES, *FRONT_END, *COMPILER, *OVERRIDES], ids=lambda e: e.target
)
def test_every_entry_says_why_and_fits_this_vllm(entry: Patch | Override) -> None:
    assert len(entry.why) > 20
    assert entry.parameters
    patches.check(entry)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"target": "vllm.v1.worker.gpu_worker:Worker.load_the_model"}, "does not exist"),
        ({"target": "vllm.v1.worker.gpu_worker:Labourer.load_model"}, "does not exist"),
        ({"parameters": ("self", "model_name")}, r"lacks \['model_name'\]"),
    ],
)
def test_a_vllm_that_is_not_as_the_ledger_says_is_refused(
    change: dict[str, object], named: str
) -> None:
    entry = next(p for p in PATCHES if p.target.endswith("Worker.load_model"))
    with pytest.raises(PatchError, match=named):
        patches.check(dataclasses.replace(entry, **change))  # type: ignore[arg-type]


def test_no_shape_of_a_graph_is_taken_anew_for_a_region(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the patch all that follows a region is; then this fails, and the patch can go, when
    PyTorch is mended."""
    from torch._inductor import fx_utils

    update = fx_utils.FakeTensorUpdater.incremental_update
    updated: list[int] = []

    def counted(self: fx_utils.FakeTensorUpdater) -> int:
        updated.append(update(self))
        return updated[-1]

    monkeypatch.setattr(fx_utils.FakeTensorUpdater, "incremental_update", counted)
    region = torch.compiler.nested_compile_region(lambda x: x.sin() + 1)

    def layers(x: torch.Tensor) -> torch.Tensor:
        for _ in range(3):
            x = region(x @ x)
        return x

    original = inspect.unwrap(fx_utils._is_fake_tensor_same)
    monkeypatch.setattr(fx_utils, "_is_fake_tensor_same", original)
    counts = []
    for mend in (lambda: None, patches.apply_compiler):
        mend()
        updated.clear()
        torch.compiler.reset()
        with config.patch(force_disable_caches=True), torch.inference_mode():
            torch.compile(layers, fullgraph=True)(torch.rand(4, 4))
        counts.append(sum(updated))
    assert counts[0] > counts[1] == 0


def test_a_compiler_that_is_not_as_the_ledger_says_is_left_as_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target = "torch._inductor.fx_utils:_are_the_same"
    monkeypatch.setattr(patches, "COMPILER", (dataclasses.replace(COMPILER[0], target=target),))
    patches.apply_compiler()


def test_a_target_has_one_patch() -> None:
    plugin.register()
    other = dataclasses.replace(PATCHES[0], why="something else altogether")
    with pytest.raises(PatchError, match="already patched"):
        patches._wrap(other)


@pytest.mark.parametrize("version", ["0.31.2", "0.34.0", "1.0"])
def test_another_version_of_vllm_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    import vllm

    monkeypatch.setattr(vllm, "__version__", version)
    with pytest.raises(plugin.UnsupportedVersionError, match=version):
        plugin.register()


def test_a_build_of_a_supported_version_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm

    monkeypatch.setattr(vllm, "__version__", "0.33.0rc1+cu130")
    plugin.register()


def test_an_object_is_retyped_once() -> None:
    def louder(cls: type) -> type:
        class Louder(cls):  # type: ignore[misc]
            def say(self) -> str:
                return str(super().say().upper())

        return Louder

    class Voice:
        def say(self) -> str:
            return "hello"

    voice, other = Voice(), Voice()
    retype(voice, louder)
    assert voice.say() == "HELLO"
    assert other.say() == "hello"
    assert isinstance(voice, Voice)
    with pytest.raises(RuntimeError, match="retyped"):
        retype(voice, louder)
