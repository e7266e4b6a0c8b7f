"""A real server for tests: `steering serve`, or `vllm serve`, in a process group of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from engines import KV_CACHE

START_SECONDS = 240
VLLM_SERVE = (sys.executable, str(Path(__file__).parent / "vllm_serve.py"))
"""The road of a platform that has `vllm serve` and our plugin installed."""


@dataclass(frozen=True)
class Server:
    """Where it listens, and a client to it."""

    host: str
    port: int
    client: httpx.Client
    pid: int
    log: Path

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def chat(self, prompt: str = "Tell me about the ocean.", **fields: Any) -> httpx.Response:
        """A greedy chat completion of 16 tokens with further fields."""
        body = {
            "model": "smollm2",
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": 16,
            "temperature": 0,
            **fields,
        }
        return self.client.post("/v1/chat/completions", json=body)

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that carry these labels."""
        from prometheus_client.parser import text_string_to_metric_families

        text = self.client.get("/metrics").text
        return sum(
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )


def command(name: str) -> str:
    """A command of the environment that runs the tests."""
    return str(Path(sys.executable).parent / name)


def free_port() -> int:
    """A port that is free now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


def client(host: str, port: int) -> httpx.Client:
    """A client with connections of its own."""
    return httpx.Client(base_url=f"http://{host}:{port}", timeout=120)


def serve(
    model: Path,
    planes: Mapping[str, Path],
    log: Path,
    *arguments: str,
    road: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> Iterator[Server]:
    """A generator fixture's body: a server of ``model`` until the end.

    Args:
        model: the model's folder.
        planes: name -> artifact.
        log: where its output goes.
        arguments: further flags.
        road: the words before the model; `steering serve` if there are none.
        environment: further variables.
    """
    port = free_port()
    flags = [f for name, path in planes.items() for f in ("--steering-plane", f"{name}={path}")]
    words = [
        *(road or (command("steering"), "serve")), str(model),
        "--served-model-name", "smollm2", *flags,
        "--host", "127.0.0.1", "--port", str(port), "--enforce-eager", "--dtype", "float32",
        "--max-model-len", "1024", "--max-num-seqs", "32",
        "--kv-cache-memory-bytes", str(KV_CACHE), *arguments,
    ]  # fmt: skip
    variables = {**os.environ, "TRITON_INTERPRET": "0", **(environment or {})}
    with running(words, log, variables) as process, client("127.0.0.1", port) as connected:
        wait(connected, process, log, "/health")
        yield Server("127.0.0.1", port, connected, process.pid, log)


@contextlib.contextmanager
def running(
    words: Sequence[str], log: Path, environment: Mapping[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a group of its own, which is ended with it."""
    with log.open("w") as output:
        process = subprocess.Popen(
            words,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        finally:
            # vLLM's children can outlive it; the group has no one else in it.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def wait(client: httpx.Client, process: subprocess.Popen[bytes], log: Path, path: str) -> None:
    """Until the server answers on ``path``."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            if client.get(path).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.5)
    raise RuntimeError(f"no server; the end of its log:\n{log.read_text()[-4000:]}")
