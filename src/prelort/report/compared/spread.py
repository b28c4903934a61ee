"""Means over seeds with their spread, and paired differences with a bootstrap interval."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

RESAMPLES = 10_000
CONFIDENCE = 0.95
SEED = 0
"""Of the bootstrap's draws: the same numbers give the same interval."""

FEW = 5
"""With fewer pairs than this an interval deserves a warning."""


@dataclass(frozen=True, slots=True)
class Spread:
    """A mean, the sample standard deviation (n - 1; None for one value), and of how many."""

    mean: float
    deviation: float | None
    count: int


@dataclass(frozen=True, slots=True)
class Difference:
    """A mean paired difference with its interval; without one for fewer than two pairs."""

    mean: float
    low: float | None
    high: float | None
    pairs: int


def spread(values: Sequence[float]) -> Spread | None:
    """Mean and sample standard deviation; None of nothing."""
    if not values:
        return None
    if not all(map(math.isfinite, values)):
        return Spread(sum(values) / len(values), None, len(values))
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return Spread(statistics.fmean(values), deviation, len(values))


def difference(pairs: Sequence[float]) -> Difference | None:
    """The mean of paired differences and its percentile bootstrap interval (Efron 1979).

    Pairs are drawn with replacement. Of n pairs there are C(2n - 1, n) resamples that differ, and
    up to three pairs the interval reaches just from the lowest to the highest difference: it is
    narrower than its name says where pairs are few.
    """
    found = spread(pairs)
    if found is None:
        return None
    if len(pairs) < 2 or not math.isfinite(found.mean):
        return Difference(found.mean, None, None, len(pairs))
    return Difference(found.mean, *_interval(tuple(pairs)), len(pairs))


@lru_cache(maxsize=4096)  # the same numbers stand in tables, files and pictures
def _interval(pairs: tuple[float, ...]) -> tuple[float, float]:
    import numpy as np
    from scipy.stats import bootstrap  # not above: it takes a while to import

    interval = bootstrap(
        (np.asarray(pairs, dtype=float),),
        np.mean,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(SEED),
    ).confidence_interval
    return float(interval.low), float(interval.high)


def warning_of(pairs: int) -> str:
    """How far an interval over so many pairs can be trusted; empty where there are enough."""
    if pairs < 2:
        return "With fewer than two pairs there is no interval: more seeds are needed."
    if pairs >= FEW:
        return ""
    resamples = math.comb(2 * pairs - 1, pairs)
    text = f"{pairs} pairs make {resamples} different resamples, so the interval is too narrow"
    if pairs <= 3:
        text += ": it is just the lowest and the highest difference"
    return text + ". Take it for a range, and more seeds for a claim."
