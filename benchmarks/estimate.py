"""A ratio from several starts of each side, with the interval that starts and runs leave open."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.95
RESAMPLES = 10_000
CUT = 0.2
"""Of the starts, at either end."""


@dataclass(frozen=True)
class Estimate:
    """A ratio and its 95 % interval; ``resolution`` is the smallest difference from 1 that these
    data could have told from none: half the interval's width."""

    ratio: float
    low: float
    high: float
    resolution: float


def estimate(starts: Sequence[Sequence[float]]) -> Estimate:
    """The ratio that independent starts of two sides agree on, by a hierarchical bootstrap.

    Two processes of the same kind differ for as long as they live, so runs within a start do not
    count as so many observations: starts are drawn first, then each one's runs. A start says the
    median of its runs, and the estimate is the geometric mean of the starts without the fifth that
    is highest and the fifth that is lowest: what else a machine does spoils a start now and then.
    Few starts make the percentile interval too narrow; it is widened to what Student's t gives for
    as many (the "expanded percentile interval" of Hesterberg, arXiv 1411.5279, section 5.3).
    Redrawing runs adds to the spread that they already give the starts, so the interval errs on the
    wide side.

    Args:
        starts: for each start, the ratio of each of its runs; at least two starts.
    """
    if len(starts) < 2:
        raise ValueError(f"an interval needs two starts, got {len(starts)}")
    rng = np.random.default_rng(0)
    logs = [np.log(np.asarray(runs, float)) for runs in starts]
    count = len(logs)
    drawn = rng.integers(count, size=(RESAMPLES, count))
    medians = np.empty(drawn.shape)
    for start, runs in enumerate(logs):
        places = drawn == start
        again = rng.choice(runs, (int(places.sum()), len(runs)))
        medians[places] = np.median(again, axis=1)
    means = stats.trim_mean(medians, CUT, axis=1)
    tail = stats.norm.cdf(math.sqrt(count / (count - 1)) * stats.t.ppf((1 - LEVEL) / 2, count - 1))
    middle = float(stats.trim_mean([np.median(runs) for runs in logs], CUT))
    low, high = (float(edge) for edge in np.exp(np.quantile(means, (tail, 1 - tail))))
    return Estimate(math.exp(middle), low, high, (high - low) / 2)
