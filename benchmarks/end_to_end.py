"""What steering costs a server: ours against plain vLLM, run in pairs.

Each way of steering has a server of its own, all of them up at once and one of them busy at a time.
A pair is one load on plain vLLM and the same load on another server, directly before or after it in
turns; what counts is the ratio within a pair.
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
    Load(8, 32, 64),
    Load(32, 32, 40),
    Load(64, 32, 24),
    Load(8, 400, 16),
)
WAKE = Load(1, 8, 3)


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


PLAIN = Way("plain vLLM", "plain")
ONE_ANGLE = next(way for way in WAYS if way.angles == "one")
EACH_ANGLE = next(way for way in WAYS if way.angles == "each")


def orders(ways: Sequence[Way], number: int) -> Iterator[tuple[Way, ...]]:
    """A round: every way directly beside a run of plain vLLM, every second round backwards."""
    for i in range(0, len(ways), 2):
        order = (ways[i], PLAIN, *ways[i + 1 : i + 2])
        yield order if number % 2 == 0 else order[::-1]


def measure(
    ports: dict[str, int], load: Load, ways: Sequence[Way], rounds: int
) -> dict[str, list[tuple[Run, Run]]]:
    """For each way its pairs: plain vLLM's run, and its own."""
    pairs: dict[str, list[tuple[Run, Run]]] = {way.name: [] for way in ways}
    for number in range(rounds):
        for order in orders(ways, number):
            seed = time.time_ns()
            runs = {way.name: _once(ports[way.side], load, way.angles, seed) for way in order}
            plain = runs.pop(PLAIN.name)
            for name, mine in runs.items():
                pairs[name].append((plain, mine))
    return pairs


def _once(port: int, load: Load, angles: str, seed: int) -> Run:
    # A server that has just idled answers its first request late, whoever's it is.
    asyncio.run(run(port, WAKE, angles, seed))
    return asyncio.run(run(port, load, angles, seed))


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
        for load in LOADS:
            for way in (PLAIN, *ways):
                asyncio.run(run(ports[way.side], load, way.angles, 0))
            pairs = measure(ports, load, ways, options.pairs)
            new = [compared(load, way, PLAIN, pairs[way.name]) for way in ways]
            if ONE_ANGLE in ways and EACH_ANGLE in ways:
                both = zip(pairs[ONE_ANGLE.name], pairs[EACH_ANGLE.name], strict=True)
                angles = [(one, each) for (_, one), (_, each) in both]
                new.append(compared(load, EACH_ANGLE, ONE_ANGLE, angles))
            for row in new:
                console.print(f"{load}: {row['way']} / {row['against']}: {row['throughput']}")
            rows += new
            # After each load: a run that is cut short has said what it found.
            report.save(options.output, "end_to_end", rows)
    report.write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
