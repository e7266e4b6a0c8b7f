"""What steering costs a server: ours against plain vLLM, over several starts of each.

Two servers of the same kind differ by some percent for as long as they live, so one of each says
little however long it runs. Each round starts every server anew, in random order, all up at once;
they take each load in turns, in random order. Two plain servers are among them: their mean is what
the others are compared with, and one against the other must come out as no difference. What servers
differ by is much of the noise, so many starts of few runs tell more than few of many.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console

import report
import sides
from estimate import estimate
from figures import FIGURES, Run, ratio
from loads import LOADS, Load, run
from sides import SIDES, Server


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
STARTS = 20

Turn = Mapping[Way, Run]
"""One run of every way, next to each other in time."""

Starts = dict[str, list[list[float]]]
"""Of each figure, and of plain vLLM's throughput under its name: for each start, what each of its
runs gave; of :data:`FIGURES` the ratios to plain vLLM's."""


def warm_up(servers: Mapping[str, Server]) -> None:
    """One run of each server that is not counted."""
    for server in servers.values():
        with server.awake() as port:
            asyncio.run(run(port, Load(64, 32, 2, 1), "none", 0))


def take_turns(
    servers: Mapping[str, Server], load: Load, ways: Sequence[Way], rng: random.Random
) -> list[Turn]:
    """A load's runs in one round of starts."""
    turns = []
    for _ in range(load.runs):
        turn = {}
        for way in rng.sample(ways, len(ways)):
            with servers[way.side].awake() as port:
                turn[way] = asyncio.run(run(port, load, way.angles, rng.getrandbits(32)))
        turns.append(turn)
    return turns


def add(starts: Starts, way: Way, turns: Sequence[Turn]) -> None:
    """A round's turns of one load, to what a way gave before.

    Args:
        starts: changed.
        way: :data:`SECOND` is compared with the other plain server, all others with both.
        turns: with both plain servers in each.
    """
    against = (PLAIN,) if way == SECOND else (PLAIN, SECOND)
    starts.setdefault(PLAIN.name, []).append([turn[PLAIN].throughput for turn in turns])
    for figure in FIGURES:
        starts.setdefault(figure, []).append(
            [ratio(figure, turn[way], (turn[plain] for plain in against)) for turn in turns]
        )


def compared(load: str, way: str, starts: Starts) -> dict[str, object]:
    """A way against plain vLLM at one load, as the results file holds it."""
    return {
        "way": way,
        "load": load,
        "starts": len(starts[PLAIN.name]),
        "runs": max(map(len, starts[PLAIN.name])),
        "raw": starts,
        **{figure: asdict(estimate(starts[figure])) for figure in FIGURES},
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--starts", type=int, default=STARTS, help="of each server")
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=list(WAYS))
    parser.add_argument("--output", type=Path, default=report.FOLDER / "end_to_end.json")
    parser.add_argument("--add", action="store_true", help="to the starts that the output holds")
    options = parser.parse_args(arguments)
    sides.end_with_this_process()
    console = Console(file=sys.stderr)
    ways = [PLAIN, SECOND, *(WAYS[name] for name in options.ways)]
    found: dict[tuple[str, str], Starts] = {}
    if options.add:
        held = json.loads(options.output.read_text())
        here = report.machine() | {"date": held["machine"]["date"]}
        if held["machine"] != here:
            parser.error(f"{options.output} is of {held['machine']}, and this is {here}")
        found = {(r["load"], r["way"]): r["raw"] for r in held["rows"]}
    new = {way.name for way in ways[1:]} - {way for _, way in found}
    if new and options.starts < 2:
        parser.error(f"--starts {options.starts}: an interval needs two of {sorted(new)}")
    order = [(str(load), way.name) for load in LOADS for way in (SECOND, *WAYS.values())]
    if others := found.keys() - order:
        parser.error(f"{options.output} holds what is not compared any more: {sorted(others)}")
    rng = random.Random(time.time_ns())
    for number in range(1, options.starts + 1):
        with contextlib.ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            names = list(dict.fromkeys(way.side for way in ways))
            servers = {}
            for name in rng.sample(names, len(names)):
                console.print(f"start {number} of {options.starts}: {name}")
                side = sides.on_huge_pages(SIDES[name])
                servers[name] = stack.enter_context(sides.serve(side, folder))
                servers[name].pause()
            with sides.models_alone():
                warm_up(servers)
                for load in rng.sample(LOADS, len(LOADS)):
                    turns = take_turns(servers, load, ways, rng)
                    for way in ways[1:]:
                        add(found.setdefault((str(load), way.name), {}), way, turns)
        if number > 1 or not new:
            # After each: a run that is cut short has said what it found.
            rows = [compared(*key, found[key]) for key in order if key in found]
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
