"""Which KV connectors steering can share a KV cache through, by how each finds KV for a request.

A connector that finds it by the ids of a prompt's tokens takes two steerings of one prompt for the
same, and answers each from the other's activations. docs/how-it-works.md says which is which.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.config import KVTransferConfig

BY_HASH = "looks blocks up by vLLM's hashes, which cover the steering"
BY_REQUEST = "fetches what a request's own parameters name, and looks nothing up"
NEVER = "only writes out"

ALLOWED: Mapping[str, str] = {
    "OffloadingConnector": BY_HASH,
    "SimpleCPUOffloadConnector": BY_HASH,
    "MooncakeStoreConnector": BY_HASH,
    "HiSparseConnector": BY_HASH,
    "NixlConnector": BY_REQUEST,
    "NixlPullConnector": BY_REQUEST,
    "NixlPushConnector": BY_REQUEST,
    "MooncakeConnector": BY_REQUEST,
    "MoRIIOConnector": BY_REQUEST,
    "ExampleHiddenStatesConnector": NEVER,
}
"""vLLM's own connectors, by the name that they are registered under -> why they may be used."""

_BY_TOKENS = "it looks KV up by token ids, which are the same under every steering"
_UNKNOWN = "how it looks KV up is not known here"
REFUSED: Mapping[str, str] = {
    "ExampleConnector": _BY_TOKENS,
    "LMCacheConnectorV1": _BY_TOKENS,
    "LMCacheMPConnector": _BY_TOKENS,
    "HF3FSKVConnector": _BY_TOKENS,
    "FlexKVConnectorV1": _UNKNOWN,
    "DecodeBenchConnector": "it fills a prompt's KV with noise, whatever the steering",
}
"""The others of vLLM, likewise -> why not. One in neither table is refused as unknown."""


def refused(config: KVTransferConfig | None) -> Iterator[tuple[str, str]]:
    """Each connector in vLLM's configuration that would mix steerings up: its name, and why."""
    if config is not None and config.kv_connector is not None:
        yield from _refused(
            config.kv_connector, config.kv_connector_module_path, config.kv_connector_extra_config
        )


def _refused(name: str, module: str | None, extra: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if module:
        # It comes before vLLM's own of that name.
        yield f"{name} of {module}", _UNKNOWN
    elif name == "MultiConnector":
        for child in extra.get("connectors") or ():
            yield from _refused(
                child.get("kv_connector"),
                child.get("kv_connector_module_path"),
                child.get("kv_connector_extra_config") or {},
            )
    elif name not in ALLOWED:
        yield name, REFUSED.get(name, _UNKNOWN)
