"""What steering costs a server: ours against plain vLLM, run in pairs.

Each way of steering has a server of its own, all of them up at once and one of them busy at a time.
A pair is one load on plain vLLM and the same load on another server, next to each other in time and
in turns first; what counts is the ratio within a pair.
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

import aiohttp
import numpy as np
from rich.console import Console

import report
import sides
from sides import Side

FIGURES = ("throughput", "ttft", "itl")


@dataclass(frozen=True)
class Way:
    """A server, and the angles that a load asks of it."""

    name: str
    side: str
    angles: str = "none"
    """``none``, ``one`` for all requests, or ``each`` its own."""


WAYS = (
    Way("plugin idle, no plane", "idle"),
    Way("planes loaded, unsteered", "selected"),
    Way("selected sites, one angle", "selected", "one"),
    Way("selected sites, an angle each", "selected", "each"),
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
    Load(8, 32, 24),
    Load(32, 32, 16),
    Load(64, 32, 12),
    Load(8, 400, 8),
)


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


def _steering(angles: str, index: int) -> dict[str, float]:
    if angles == "none":
        return {}
    return {"steering_angle": 30.0 if angles == "one" else 1.0 + 5.5 * index}


async def _ask(
    session: aiohttp.ClientSession, prompt: list[int], tokens: int, steering: dict[str, float]
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


def pairs(
    ports: dict[str, int], load: Load, way: Way, baseline: Way, count: int
) -> Iterator[tuple[Run, Run]]:
    """``count`` pairs of (baseline, way) under one load."""
    for number in range(count):
        seed = time.time_ns()
        order = (baseline, way) if number % 2 == 0 else (way, baseline)
        runs = {w.name: asyncio.run(run(ports[w.side], load, w.angles, seed)) for w in order}
        yield runs[baseline.name], runs[way.name]


def compare(
    ports: dict[str, int], load: Load, way: Way, baseline: Way, count: int
) -> dict[str, object]:
    """The ratios of a way to its baseline, as the results file holds them."""
    measured = list(pairs(ports, load, way, baseline, count))
    row: dict[str, object] = {
        "way": way.name,
        "against": baseline.name,
        "load": str(load),
        "concurrency": load.concurrency,
        "pairs": count,
        "baseline_throughput": statistics.median(b.throughput for b, _ in measured),
    }
    for figure in FIGURES:
        ratios = [getattr(w, figure) / getattr(b, figure) for b, w in measured]
        row[figure] = dict(zip(("median", "low", "high"), interval(ratios), strict=True))
    return row


PLAIN = Way("plain vLLM", "plain")
ONE_ANGLE = next(way for way in WAYS if way.angles == "one")
EACH_ANGLE = next(way for way in WAYS if way.angles == "each")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--output", type=Path, default=report.FOLDER / "end_to_end.json")
    parser.add_argument("--sides", nargs="*", default=[s for s in sides.SIDES if s != "plain"])
    options = parser.parse_args(arguments)
    console = Console(file=sys.stderr)
    ways = [way for way in WAYS if way.side in options.sides]
    rows = []
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        ports = {}
        for name in ("plain", *options.sides):
            side: Side = sides.SIDES[name]
            console.print(f"starting {name}")
            ports[name] = stack.enter_context(sides.serve(side, Path(folder)))
        comparisons = [(load, way, PLAIN) for load in LOADS for way in ways]
        if "selected" in options.sides:
            comparisons += [(load, EACH_ANGLE, ONE_ANGLE) for load in LOADS]
        for load, way, baseline in comparisons:
            for warm in (baseline, way):
                asyncio.run(run(ports[warm.side], load, warm.angles, 0))
            row = compare(ports, load, way, baseline, options.pairs)
            rows.append(row)
            console.print(f"{load}: {way.name} / {baseline.name}: {row['throughput']}")
            # After each: a run that is cut short has said what it found.
            report.save(options.output, "end_to_end", rows)
    report.write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
