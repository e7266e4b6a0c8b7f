"""What steering cannot work under stops the start, by name."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from planes import random_plane
from steering_server.engine import kv_connectors
from steering_server.engine.configuration import refuse_unsupported
from steering_server.engine.settings import SettingsError

# Flag -> the part of vLLM's configuration that it sets, and how.
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "--enable-dbo": ("parallel_config", {"enable_dbo": True}),
    "--ubatch-size": ("parallel_config", {"ubatch_size": 2}),
    "--prefill-context-parallel-size": ("parallel_config", {"prefill_context_parallel_size": 2}),
    "--enable-expert-parallel": (
        "parallel_config",
        {"enable_expert_parallel": True, "tensor_parallel_size": 2, "data_parallel_size": 2},
    ),
    "--kv-sharing-fast-prefill": ("cache_config", {"kv_sharing_fast_prefill": True}),
    "enable_adaptive_verification": ("speculative_config", {"enable_adaptive_verification": True}),
    "--runner pooling": ("model_config", {"runner_type": "pooling"}),
}


@pytest.fixture
def config(smollm2: Path) -> Any:
    """vLLM's own configuration, of a model that it runs."""
    return configure(smollm2)


def configure(model: Path, **options: Any) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(model=str(model), enforce_eager=True, **options).create_engine_config()


@pytest.mark.parametrize("flag", REFUSED)
def test_what_deals_tokens_out_otherwise_stops_the_start(config: Any, flag: str) -> None:
    refuse_unsupported(config)
    part, values = REFUSED[flag]
    if getattr(config, part) is None:
        setattr(config, part, SimpleNamespace())
    # Set afterwards: this machine's vLLM refuses some of them before steering is asked.
    for name, value in values.items():
        setattr(getattr(config, part), name, value)
    with pytest.raises(SettingsError, match=f"steering cannot work with .*{flag}"):
        refuse_unsupported(config)


def test_every_reason_is_named_at_once(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    config.parallel_config.enable_dbo = True
    with pytest.raises(SettingsError, match=r"VLLM_USE_RUST_FRONTEND=1 .*--enable-dbo"):
        refuse_unsupported(config)


def test_parallelism_that_keeps_tokens_together_is_fine(config: Any) -> None:
    for name in ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"):
        setattr(config.parallel_config, name, 2)
        refuse_unsupported(config)


def test_without_planes_nothing_is_refused(smollm2: Path, tmp_path: Path) -> None:
    plane = random_plane(tmp_path / "mood", ["1.attn_in"])
    options = {"kv_sharing_fast_prefill": True, "kv_transfer_config": connector("ExampleConnector")}
    assert configure(smollm2, **options).cache_config.kv_sharing_fast_prefill
    steering = {"steering": {"planes": {"mood": str(plane)}}}
    with pytest.raises(SettingsError, match=r"--kv-sharing-fast-prefill .*ExampleConnector \(it"):
        configure(smollm2, **options, additional_config=steering)


# -- KV connectors ---------------------------------------------------------------------------------


def connector(name: str, module: str | None = None, **extra: Any) -> Any:
    from vllm.config import KVTransferConfig

    return KVTransferConfig(
        kv_connector=name,
        kv_role="kv_both",
        kv_connector_module_path=module,
        kv_connector_extra_config=extra,
    )


def several(*children: dict[str, Any]) -> Any:
    return connector("MultiConnector", connectors=[{"kv_role": "kv_both", **c} for c in children])


def test_every_connector_of_vllm_is_judged() -> None:
    """A connector that a new vLLM brings is refused until someone has read how it looks KV up."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    judged = {*kv_connectors.ALLOWED, *kv_connectors.REFUSED}
    assert set(KVConnectorFactory._registry) - {"MultiConnector"} == judged
    assert not set(kv_connectors.ALLOWED) & set(kv_connectors.REFUSED)


def test_the_docs_say_of_each_connector_what_the_code_does() -> None:
    page = (Path(__file__).parents[2] / "docs/how-it-works.md").read_text()
    rows = [line.split("|")[1:-1] for line in page.splitlines() if "Connector" in line]
    said = {
        name: verdict.split(";")[0].split(":")[0].strip()
        for *_, names, verdict in (row for row in rows if len(row) == 3)
        for name in re.findall(r"`(\w+)`", names)
    }
    assert said == {
        **dict.fromkeys(kv_connectors.ALLOWED, "allowed"),
        **dict.fromkeys(kv_connectors.REFUSED, "refused"),
    }


@pytest.mark.parametrize("name", kv_connectors.ALLOWED)
def test_a_connector_that_keeps_steerings_apart_is_fine(config: Any, name: str) -> None:
    config.kv_transfer_config = connector(name)
    refuse_unsupported(config)


@pytest.mark.parametrize("name", [*kv_connectors.REFUSED, "Unheard"])
def test_a_connector_that_does_not_stops_the_start(config: Any, name: str) -> None:
    config.kv_transfer_config = connector(name)
    with pytest.raises(SettingsError, match=rf"KV connector {name} \(.*without planes"):
        refuse_unsupported(config)


def test_a_module_of_ones_own_is_not_vllms_connector_of_that_name(config: Any) -> None:
    config.kv_transfer_config = connector("NixlConnector", "mine.connectors")
    with pytest.raises(SettingsError, match=r"NixlConnector of mine\.connectors \(how it looks"):
        refuse_unsupported(config)


def test_each_of_several_connectors_is_judged(config: Any) -> None:
    hashed = {"kv_connector": "OffloadingConnector"}
    own = {"kv_connector": "Own", "kv_connector_module_path": "mine"}
    inner = {
        "kv_connector": "MultiConnector",
        "kv_connector_extra_config": {"connectors": [hashed, own]},
    }
    config.kv_transfer_config = several(hashed, {"kv_connector": "NixlConnector"})
    refuse_unsupported(config)
    config.kv_transfer_config = several(hashed, {"kv_connector": "LMCacheConnectorV1"}, inner)
    with pytest.raises(SettingsError, match=r"LMCacheConnectorV1 \(it .*Own of mine \(how") as at:
        refuse_unsupported(config)
    assert "OffloadingConnector" not in str(at.value)
