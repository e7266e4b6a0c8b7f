"""What steering costs a server: ours against plain vLLM, run in pairs.

Two servers are up at a time, plain vLLM and one way of steering, and take the same load in turns.
Each run is compared with the runs of plain vLLM directly before and after it. A second plain vLLM
is one of the ways: what its ratio strays from 1 by is how two equal servers differ.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
from rich.console import Console

import report
import sides
from sides import SIDES

FIGURES = ("throughput", "ttft", "itl")


@dataclass(frozen=True)
class Way:
    """A server, and the angles that a load asks of it."""

    name: str
    side: str
    angles: str = "none"
    """``none``, ``one`` for all requests, ``each`` its own, or ``mixed``: each its own operation,
    angle, strength and tokens."""


PLAIN = Way("plain vLLM", "plain")
WAYS = (
    Way("plain vLLM, a second server", "plain"),
    Way("plugin idle, no plane", "idle"),
    Way("selected sites, one angle", "selected", "one"),
    Way("selected sites, an angle each", "selected", "each"),
    Way("selected sites, operations mixed", "selected", "mixed"),
    Way("planes loaded, unsteered", "selected"),
    Way("all sites, an angle each", "all", "each"),
    Way("published way: eager hooks, one matrix", "published"),
)


@dataclass(frozen=True)
class Load:
    """Requests sent at once, each of so many prompt and generated tokens."""

    concurrency: int
    prompt: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.concurrency} x ({self.prompt} + {self.tokens})"


LOADS = (
    Load(1, 32, 48),
    Load(8, 32, 64),
    Load(32, 32, 40),
    Load(64, 32, 20),
    Load(4, 400, 16),
)
# A vLLM worker polls for a second after its last step: on few cores, whoever runs next is slowed.
PAUSE_SECONDS = 1.2


@dataclass(frozen=True)
class Run:
    """Tokens a second, and medians over the requests in seconds."""

    throughput: float
    ttft: float
    itl: float


async def run(port: int, load: Load, angles: str, seed: int) -> Run:
    """Send a load, all at once, and wait for its end."""
    rng = random.Random(seed)
    prompts = [
        [rng.randrange(100, 40000) for _ in range(load.prompt)] for _ in range(load.concurrency)
    ]
    timeout = aiohttp.ClientTimeout(total=600)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(
        f"http://127.0.0.1:{port}", timeout=timeout, connector=connector
    ) as session:
        start = time.perf_counter()
        times = await asyncio.gather(
            *(
                _ask(session, prompt, load.tokens, _steering(angles, i))
                for i, prompt in enumerate(prompts)
            )
        )
        elapsed = time.perf_counter() - start
    return Run(
        throughput=load.concurrency * load.tokens / elapsed,
        ttft=statistics.median(first for first, _ in times),
        itl=statistics.median((last - first) / (load.tokens - 1) for first, last in times),
    )


OPERATIONS: tuple[dict[str, Any], ...] = (
    {"steering_mode": "rotate_by"},
    {"steering_mode": "rotate_to", "steering_tokens": "generated"},
    {"steering_mode": "add", "steering_strength": 0.3},
    {"steering_mode": "add", "steering_strength": -0.5, "steering_keep_norm": True},
    {"steering_mode": "ablate", "steering_keep_norm": True},
    {"steering_mode": "cap", "steering_strength": 0.5},
    {"steering_mode": "rotate_to", "steering_tokens": {"prompt": [-4, None], "generated": [0, 16]}},
    {"steering_mode": "rotate_by", "steering_angle": {"from": 180, "to": 0, "over": 32}},
)


def _steering(angles: str, index: int) -> dict[str, Any]:
    if angles == "none":
        return {}
    own = {"steering_angle": 30.0 if angles == "one" else 1.0 + 5.5 * index}
    return own | OPERATIONS[index % len(OPERATIONS)] if angles == "mixed" else own


async def _ask(
    session: aiohttp.ClientSession, prompt: list[int], tokens: int, steering: dict[str, Any]
) -> tuple[float, float]:
    """Seconds from sending to the first and to the last token."""
    body = {
        "model": sides.MODEL,
        "prompt": prompt,
        "max_tokens": tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        **steering,
    }
    start = time.perf_counter()
    first = last = 0.0
    async with session.post("/v1/completions", json=body) as response:
        response.raise_for_status()
        if bool(steering) != ("steering" in response.headers):
            raise RuntimeError(f"sent {steering}, and the answer's header says otherwise")
        async for line in response.content:
            if line.startswith(b"data: {"):
                last = time.perf_counter() - start
                first = first or last
    if not first:
        raise RuntimeError("an answer without a token")
    return first, last


def interval(ratios: Sequence[float]) -> tuple[float, float, float]:
    """The median, and the 95 % interval of it by bootstrap."""
    values = np.array(ratios)
    rng = np.random.default_rng(0)
    medians = np.median(rng.choice(values, (4000, len(values))), axis=1)
    low, high = np.quantile(medians, (0.025, 0.975))
    return float(np.median(values)), float(low), float(high)


ONE_ANGLE = next(way for way in WAYS if way.angles == "one")
EACH_ANGLE = next(way for way in WAYS if way.angles == "each")


def chain(ways: Sequence[Way], rounds: int) -> Iterator[Way]:
    """Ways at most two at a time between runs of plain vLLM, every second round backwards."""
    yield PLAIN
    for number in range(rounds):
        for start in range(0, len(ways), 2):
            group = ways[start : start + 2]
            yield from group if number % 2 == 0 else group[::-1]
            yield PLAIN


def beside(runs: Sequence[tuple[Way, Run]], way: Way, baseline: Way) -> list[tuple[Run, Run]]:
    """Each run of a way, after the mean of the baseline's runs directly before and after it."""
    pairs = []
    for index, (which, run) in enumerate(runs):
        neighbours = [other for name, other in runs[max(0, index - 1) : index + 2]
                      if name == baseline]  # fmt: skip
        if which == way and neighbours:
            means = (statistics.mean(getattr(n, figure) for n in neighbours) for figure in FIGURES)
            pairs.append((Run(*means), run))
    return pairs


def measure(
    ports: dict[str, int], load: Load, ways: Sequence[Way], rounds: int
) -> list[dict[str, object]]:
    """The rows of one load: each way against plain vLLM, and many angles against one."""
    for way in (PLAIN, *ways):
        asyncio.run(run(ports[way.name], load, way.angles, 0))
    runs = []
    for number, way in enumerate(chain(ways, rounds)):
        seed = time.time_ns() + number
        time.sleep(PAUSE_SECONDS)
        runs.append((way, asyncio.run(run(ports[way.name], load, way.angles, seed))))
    rows = [compared(load, way, PLAIN, beside(runs, way, PLAIN)) for way in ways]
    if ONE_ANGLE in ways:
        rows.append(compared(load, EACH_ANGLE, ONE_ANGLE, beside(runs, EACH_ANGLE, ONE_ANGLE)))
    return rows


def compared(
    load: Load, way: Way, baseline: Way, pairs: Sequence[tuple[Run, Run]]
) -> dict[str, object]:
    """The ratios within pairs of (baseline, way), as the results file holds them."""
    row: dict[str, object] = {
        "way": way.name,
        "against": baseline.name,
        "load": str(load),
        "concurrency": load.concurrency,
        "pairs": len(pairs),
        "baseline_throughput": statistics.median(b.throughput for b, _ in pairs),
    }
    for figure in FIGURES:
        ratios = [getattr(w, figure) / getattr(b, figure) for b, w in pairs]
        row[figure] = dict(zip(("median", "low", "high"), interval(ratios), strict=True))
    return row


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--output", type=Path, default=report.FOLDER / "end_to_end.json")
    parser.add_argument("--sides", nargs="*", default=list(sides.SIDES))
    options = parser.parse_args(arguments)
    console = Console(file=sys.stderr)
    rows: list[dict[str, object]] = []
    loads = [str(load) for load in LOADS]
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        plain = stack.enter_context(sides.serve(SIDES["plain"], folder))
        for side in options.sides:
            ways = [way for way in WAYS if way.side == side]
            console.print(f"starting {side}")
            with sides.serve(SIDES[side], folder) as port:
                ports = {PLAIN.name: plain, **{way.name: port for way in ways}}
                for load in LOADS:
                    new = measure(ports, load, ways, options.pairs)
                    for row in new:
                        console.print(load, row["way"], "/", row["against"], row["throughput"])
                    # After each load: a run that is cut short has said what it found.
                    rows = sorted([*rows, *new], key=lambda row: loads.index(str(row["load"])))
                    report.save(options.output, "end_to_end", rows)
    report.write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
