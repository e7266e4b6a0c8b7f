"""The servers that are compared: plain vLLM, ours, and the published way."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO

import psutil
import torch

from steering_planes import ClassMeans, Extraction, Plane, PlaneConfig, Site, orthonormalise
from steering_server.bundled_model import ensure

MODEL = "smollm2"
BUNDLED = Path(__file__).parents[1] / "steering_vectors/smollm2-135m-instruct/sentiment"
START_SECONDS = 600
# After a pause every timer is due at once.
SETTLE_SECONDS = 0.1
# A server that takes longer to end is killed.
END_SECONDS = 30
# All servers are up at once, and each would take nearly all memory. It holds 10000 tokens.
KV_CACHE = ["--kv-cache-memory-bytes", "256M"]
if torch.cuda.is_available():
    KV_CACHE += ["--gpu-memory-utilization", "0.1"]
# A CPU that cannot multiply bfloat16 takes several times as long for it, and would hide all else.
_BFLOAT16 = torch.cuda.is_available() or torch.ops.mkldnn._is_mkldnn_bf16_supported()
DTYPE = [] if _BFLOAT16 else ["--dtype", "float32"]

_OURS = [str(Path(sys.executable).parent / "steering"), "serve"]
_PLAIN = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model"]


@dataclass(frozen=True)
class Side:
    """One server: its command up to the model, and more flags and environment."""

    command: list[str]
    flags: Callable[[Path], list[str]] = lambda folder: []
    environment: dict[str, str] = field(default_factory=dict)


def all_sites(folder: Path) -> list[str]:
    """A plane of random bases and class means at every site of the model."""
    bundled = Plane.load(BUNDLED).config
    sites = tuple(
        Site(layer, role) for layer in range(bundled.num_layers) for role in ("attn_in", "mlp_in")
    )
    generator = torch.Generator().manual_seed(0)
    config = PlaneConfig(
        **{
            **bundled.model_dump(
                exclude={"format_version", "sites", "statistics", "extraction", "name"}
            ),
            "name": "all",
            "sites": sites,
            "extraction": Extraction(method="random", data="none", n=1, seed=0),
        }
    )
    bases = {
        site: orthonormalise(torch.randn(2, bundled.hidden_size, generator=generator))
        for site in sites
    }
    means = {site: _random_means(generator) for site in sites}
    Plane(config, bases, means).save(folder / "all")
    return ["--steering-plane", f"all={folder / 'all'}"]


def _random_means(generator: torch.Generator) -> ClassMeans:
    p1, p2, n1, n2 = torch.randn(4, generator=generator).tolist()
    return ClassMeans((p1, p2), (n1, n2), rho=1.0)


_WITHOUT_PLUGINS = {"VLLM_PLUGINS": ""}
SIDES = {
    "plain": Side(_PLAIN, environment=_WITHOUT_PLUGINS),
    "second": Side(_PLAIN, environment=_WITHOUT_PLUGINS),
    "idle": Side(_OURS),
    "selected": Side(_OURS, lambda folder: ["--steering-plane", f"sentiment={BUNDLED}"]),
    "all": Side(_OURS, all_sites),
    "published": Side(
        _PLAIN,
        lambda folder: ["--enforce-eager", "--worker-cls", "published_way.HookedWorker"],
        {
            **_WITHOUT_PLUGINS,
            "PUBLISHED_WAY_PLANE": str(BUNDLED),
            "PUBLISHED_WAY_DEGREES": "30",
            "PYTHONPATH": str(Path(__file__).parent),
        },
    ),
}


def on_huge_pages(side: Side) -> Side:
    """The side with its memory in pages of 2 MiB, where the C library can (glibc 2.35).

    In small pages it is chance which of the machine's a server gets, and makes one some percent
    faster than its like for as long as both live; the first to start was the slowest.
    """
    tunables = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    return replace(side, environment={**side.environment, **tunables})


@dataclass(frozen=True)
class Server:
    """A running server: its port, and the process group that it alone is in."""

    port: int
    group: int

    def pause(self) -> None:
        """Stop all its processes where they are.

        An idle vLLM is not still: on a CPU a worker's dozen communication threads wake a hundred
        times a second each, on the model's core, and the worker itself polls for a second after its
        last step. Beside a server that is measured that is noise, and it differs between servers.
        """
        os.killpg(self.group, signal.SIGSTOP)

    @contextlib.contextmanager
    def awake(self) -> Iterator[int]:
        """Let a paused server run, and pause it again; gives its port."""
        os.killpg(self.group, signal.SIGCONT)
        time.sleep(SETTLE_SECONDS)
        try:
            yield self.port
        finally:
            self.pause()


@contextlib.contextmanager
def serve(side: Side, folder: Path) -> Iterator[Server]:
    """A running server."""
    port = free_port()
    log = folder / f"{port}.log"
    with log.open("w") as output, started(side, port, folder, output) as process:
        deadline = time.monotonic() + START_SECONDS
        while not answers(port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"no server; the end of its log:\n{log.read_text()[-3000:]}")
            time.sleep(1)
        yield Server(port, process.pid)


@contextlib.contextmanager
def started(
    side: Side, port: int, folder: Path, output: int | IO[str]
) -> Iterator[subprocess.Popen[str]]:
    """A server that may not answer yet; ``output`` takes what it says."""
    words = [
        *side.command, str(ensure()), "--served-model-name", MODEL, "--host", "127.0.0.1",
        "--port", str(port), "--max-model-len", "1024", "--max-num-seqs", "64",
        "--no-enable-prefix-caching", *KV_CACHE, *DTYPE, *side.flags(folder),
    ]  # fmt: skip
    process = subprocess.Popen(
        words,
        stdout=output,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **side.environment},
        start_new_session=True,
    )
    try:
        yield process
    finally:
        # vLLM's children can outlive it; the group has no one else in it.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
            # A paused process takes it when it goes on.
            os.killpg(process.pid, signal.SIGCONT)
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(END_SECONDS)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def end_with_this_process() -> None:
    """Have what ends this process end its servers too: by default they would stay, some paused."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, signal.default_int_handler)


@contextlib.contextmanager
def models_alone() -> Iterator[None]:
    """Keep this process and its servers off the cores on which models run.

    On a CPU vLLM binds a model's threads to cores and lets all others float; now and then one lands
    beside the model's, which is noise.
    """
    everywhere = os.sched_getaffinity(0)
    cores = {}
    for process in psutil.Process().children(recursive=True):
        for thread in process.threads():
            # It may have ended.
            with contextlib.suppress(ProcessLookupError):
                cores[thread.id] = os.sched_getaffinity(thread.id)
    floating = [thread for thread, own in cores.items() if own == everywhere]
    others = everywhere.difference(*(own for own in cores.values() if own != everywhere))
    for thread in (0, *floating) if others else ():
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(thread, others)
    try:
        yield
    finally:
        os.sched_setaffinity(0, everywhere)


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def answers(port: int) -> bool:
    """Whether a server takes requests there."""
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/health").close()
    except OSError:
        return False
    return True
