"""What a server is asked."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from dataclasses import dataclass
from typing import Any

import aiohttp

import sides
from figures import Run


@dataclass(frozen=True)
class Load:
    """Requests sent at once, each of so many prompt and generated tokens.

    ``runs`` is how often each start takes it: short ones scatter more.
    """

    concurrency: int
    prompt: int
    tokens: int
    runs: int

    def __str__(self) -> str:
        return f"{self.concurrency} x ({self.prompt} + {self.tokens})"


LOADS = (
    Load(1, 32, 32, runs=8),
    Load(8, 32, 24, runs=6),
    Load(32, 32, 16, runs=3),
    Load(64, 32, 12, runs=3),
    Load(1, 256, 8, runs=8),
    Load(8, 256, 8, runs=4),
    Load(32, 128, 4, runs=2),
    Load(64, 128, 4, runs=2),
)


async def run(port: int, load: Load, angles: str, seed: int) -> Run:
    """Send a load, all at once, and wait for its end.

    Args:
        port: the server's.
        load: what is sent.
        angles: ``none``, ``one`` for all requests, ``each`` its own, or ``mixed``: each its own
            operation, angle, strength and tokens.
        seed: of the prompts.
    """
    rng = random.Random(seed)
    prompts = [
        [rng.randrange(100, 40000) for _ in range(load.prompt)] for _ in range(load.concurrency)
    ]
    timeout = aiohttp.ClientTimeout(total=1200)
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
