"""What a load of requests took, and how two sides compare. Needs no package."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass

FIGURES = ("throughput", "ttft", "itl")


@dataclass(frozen=True)
class Run:
    """Tokens a second, and medians over the requests in seconds."""

    throughput: float
    ttft: float
    itl: float


def ratio(figure: str, mine: Run, plain: Iterable[Run]) -> float:
    """One of :data:`FIGURES` over that of plain vLLM's runs beside it."""
    beside = statistics.geometric_mean(getattr(run, figure) for run in plain)
    return float(getattr(mine, figure) / beside)
