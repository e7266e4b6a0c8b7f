"""What steering costs a server: ours against plain vLLM, over several starts of each.

Two servers of the same kind differ by some percent for as long as they live, so one of each says
little however long it runs. Each round starts every server anew, in random order, all up at once;
they take each load in turns, in random order. Two plain servers are among them: their mean is what
the others are compared with, and one against the other must come out as no difference.
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
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console

import report
import sides
from estimate import estimate
from figures import FIGURES, Run, ratio
from loads import LOADS, Load, run
from sides import SIDES


@dataclass(frozen=True)
class Way:
    """A server, and the angles that a load asks of it (see :func:`loads.run`)."""

    name: str
    side: str
    angles: str = "none"


PLAIN = Way("plain vLLM", "plain")
SECOND = Way("plain vLLM, a second server", "second")
WAYS = {
    "idle": Way("plugin idle, no plane", "idle"),
    "unsteered": Way("planes loaded, unsteered", "selected"),
    "one": Way("selected sites, one angle", "selected", "one"),
    "each": Way("selected sites, an angle each", "selected", "each"),
    "mixed": Way("selected sites, operations mixed", "selected", "mixed"),
    "all": Way("all sites, an angle each", "all", "each"),
    "published": Way("published way: eager hooks, one matrix", "published"),
}
# A vLLM worker polls for a second after its last step: on few cores, whoever runs next is slowed.
PAUSE_SECONDS = 1.2
STARTS = 5

Turn = Mapping[Way, Run]
"""One run of every way, next to each other in time."""


def take_turns(
    ports: Mapping[str, int], load: Load, ways: Sequence[Way], rng: random.Random
) -> list[Turn]:
    """A load's runs in one round of starts, after one run each that is not counted."""
    for way in ways:
        time.sleep(PAUSE_SECONDS)
        warm_up = Load(min(load.concurrency, 8), 32, 2, 1)
        asyncio.run(run(ports[way.side], warm_up, way.angles, 0))
    turns = []
    for _ in range(load.runs):
        turn = {}
        for way in rng.sample(ways, len(ways)):
            time.sleep(PAUSE_SECONDS)
            turn[way] = asyncio.run(run(ports[way.side], load, way.angles, rng.getrandbits(32)))
        turns.append(turn)
    return turns


def compared(load: Load, way: Way, starts: Sequence[Sequence[Turn]]) -> dict[str, object]:
    """A way against plain vLLM at one load, as the results file holds it.

    Args:
        load: what was sent.
        way: :data:`SECOND` is compared with the other plain server, all others with both.
        starts: of each round of starts, its turns.
    """
    against = (PLAIN,) if way == SECOND else (PLAIN, SECOND)
    row: dict[str, object] = {
        "way": way.name,
        "load": str(load),
        "starts": len(starts),
        "runs": load.runs,
        "plain_throughput": statistics.median(
            turn[PLAIN].throughput for turns in starts for turn in turns
        ),
    }
    for figure in FIGURES:
        ratios = [
            [ratio(figure, turn[way], (turn[plain] for plain in against)) for turn in turns]
            for turns in starts
        ]
        row[figure] = {**asdict(estimate(ratios)), "ratios": ratios}
    return row


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--starts", type=int, default=STARTS, help="of each server")
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=list(WAYS))
    parser.add_argument("--output", type=Path, default=report.FOLDER / "end_to_end.json")
    options = parser.parse_args(arguments)
    console = Console(file=sys.stderr)
    ways = [PLAIN, SECOND, *(WAYS[name] for name in options.ways)]
    seen: dict[Load, list[list[Turn]]] = defaultdict(list)
    rng = random.Random(time.time_ns())
    for number in range(1, options.starts + 1):
        with contextlib.ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            names = list(dict.fromkeys(way.side for way in ways))
            ports = {}
            for name in rng.sample(names, len(names)):
                console.print(f"start {number} of {options.starts}: {name}")
                ports[name] = stack.enter_context(sides.serve(SIDES[name], folder))
            for load in rng.sample(LOADS, len(LOADS)):
                seen[load].append(take_turns(ports, load, ways, rng))
        if number > 1:
            # After each: a run that is cut short has said what it found.
            rows = [compared(load, way, seen[load]) for load in LOADS for way in ways[1:]]
            report.save(options.output, "end_to_end", rows)
            for row in rows:
                console.print(row["load"], row["way"], _short(row["throughput"]))
    report.write()
    return 0


def _short(figure: object) -> str:
    assert isinstance(figure, dict)
    return "{ratio:.3f} ({low:.3f} to {high:.3f})".format(**figure)


if __name__ == "__main__":
    sys.exit(main())
