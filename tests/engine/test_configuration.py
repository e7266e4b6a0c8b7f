"""What steering cannot work under stops the start, by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from steering_server.engine.configuration import refuse_unsupported
from steering_server.engine.settings import SettingsError

REFUSED = {
    "--enable-dbo": {"enable_dbo": True},
    "--ubatch-size": {"ubatch_size": 2},
    "--prefill-context-parallel-size": {"prefill_context_parallel_size": 2},
    "--enable-expert-parallel": {
        "enable_expert_parallel": True,
        "tensor_parallel_size": 2,
        "data_parallel_size": 2,
    },
}


@pytest.fixture
def config(smollm2: Path) -> Any:
    """vLLM's own configuration, of a model that it runs."""
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(model=str(smollm2), enforce_eager=True).create_engine_config()


@pytest.mark.parametrize("flag", REFUSED)
def test_what_deals_tokens_out_otherwise_stops_the_start(config: Any, flag: str) -> None:
    refuse_unsupported(config)
    # Set afterwards: this machine's vLLM refuses some of them before steering is asked.
    for name, value in REFUSED[flag].items():
        setattr(config.parallel_config, name, value)
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
