"""A body costs the API server what it costs plain vLLM, whoever sends it and wherever to."""

from __future__ import annotations

import contextlib
import statistics
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

import servers
from servers import Server

MIB = 1 << 20
SENT = 1024
KEY = {"authorization": "Bearer secret"}
LITTLE = 256
"""MiB of what is left of a body that still count as none."""
PATHS = ("/no/such/path", "/tokenize", "/v1/completions", "/v1/chat/completions/")


@contextlib.contextmanager
def growth(process: psutil.Process) -> Iterator[list[int]]:
    """By how many MiB a process grows within, at its highest."""
    before = process.memory_info().rss
    highest = [before]
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.02):
            highest[0] = max(highest[0], process.memory_info().rss)

    thread = threading.Thread(target=watch)
    thread.start()
    found: list[int] = []
    try:
        yield found
    finally:
        stop.set()
        thread.join()
        found.append((highest[0] - before) // MIB)


def ask(client: httpx.Client) -> None:
    """Something small."""
    client.post("/tokenize", json={"prompt": "Once"}, headers=KEY).raise_for_status()


def collect(server: Server, api: psutil.Process, before: int) -> None:
    """Have the body of an earlier request freed. A refused one lies in a cycle, with the error that
    quotes it, until the collector comes by, which it does as small requests allocate: later, it
    would be taken for the room of the next body.

    Args:
        server: whose API server it is.
        api: its process.
        before: its resident size before any large body, in bytes.
    """
    end = time.monotonic() + 120
    with servers.client(server.host, server.port) as client:
        while api.memory_info().rss > before + LITTLE * MIB:
            assert time.monotonic() < end, "what was sent before is never freed"
            ask(client)


def send(
    server: Server, api: psutil.Process, before: int, path: str, headers: dict[str, str]
) -> int:
    """The growth of the API server while 1 GiB is sent to it; see :func:`collect`."""
    collect(server, api, before)
    with (
        growth(api) as grown,
        servers.client(server.host, server.port) as client,
        contextlib.suppress(httpx.TransportError),  # A server may well hang up on it.
    ):
        client.post(
            path,
            content=(b"x" * MIB for _ in range(SENT)),
            headers={"content-type": "application/json", **headers},
        )
    time.sleep(0.5)
    return grown[0]


@pytest.mark.slow
def test_a_gibibyte_costs_what_it_costs_plain_vllm(
    smollm2: Path, planes: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("memory")
    grown: dict[str, dict[tuple[str, bool], float]] = {}
    for name, loaded, road in (
        ("plain", {}, servers.VLLM_SERVE),
        ("steered", {"sentiment": planes["sentiment"]}, ()),
    ):
        flags = ("--api-key", "secret")
        for server in servers.serve(smollm2, loaded, folder / f"{name}.log", *flags, road=road):
            api = psutil.Process(server.pid)
            # The first requests bring in what is loaded late.
            with servers.client(server.host, server.port) as client:
                ask(client)
            before = api.memory_info().rss
            for path in PATHS:
                send(server, api, before, path, KEY)
            # Equal sends differ by up to 20 MiB, in what the allocator has left.
            grown[name] = {
                (path, known): statistics.median(
                    send(server, api, before, path, KEY if known else {}) for _ in range(3)
                )
                for path in PATHS
                for known in (False, True)
            }
    assert grown["plain"]["/tokenize", True] > SENT  # It is measured at all.
    for case, plain in grown["plain"].items():
        assert grown["steered"][case] <= plain + 16, (case, grown)
