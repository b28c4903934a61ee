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
"""Of the bootstrap: the same numbers give the same interval."""

FEW = 5
"""An interval of fewer pairs comes with a warning."""


@dataclass(frozen=True, slots=True)
class Spread:
    """A mean, the sample standard deviation (n - 1; None for one value) and the number n."""

    mean: float
    deviation: float | None
    count: int


@dataclass(frozen=True, slots=True)
class Difference:
    """A mean paired difference and its interval; None for fewer than two pairs."""

    mean: float
    low: float | None
    high: float | None
    pairs: int


def spread(values: Sequence[float]) -> Spread | None:
    """Mean and sample standard deviation; None for no values."""
    if not values:
        return None
    if not all(map(math.isfinite, values)):
        return Spread(sum(values) / len(values), None, len(values))
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return Spread(statistics.fmean(values), deviation, len(values))


def difference(pairs: Sequence[float]) -> Difference | None:
    """The mean of paired differences and its percentile bootstrap interval (Efron 1979).

    Pairs are drawn with replacement. n pairs have C(2n - 1, n) distinct resamples, and the interval
    of up to three pairs is the range of the differences: it is too narrow for few pairs.
    """
    mean = spread(pairs)
    if mean is None:
        return None
    if len(pairs) < 2 or not math.isfinite(mean.mean):
        return Difference(mean.mean, None, None, len(pairs))
    return Difference(mean.mean, *_interval(tuple(pairs)), len(pairs))


@lru_cache(maxsize=4096)  # the same numbers are in tables, files and charts
def _interval(pairs: tuple[float, ...]) -> tuple[float, float]:
    import numpy as np
    from scipy.stats import bootstrap  # slow to import

    interval = bootstrap(
        (np.asarray(pairs, dtype=float),),
        np.mean,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(SEED),
    ).confidence_interval
    return float(interval.low), float(interval.high)


def warning(pairs: int) -> str:
    """How far an interval over this number of pairs can be trusted; empty for enough pairs."""
    if pairs < 2:
        return "With fewer than two pairs there is no interval: run more seeds."
    if pairs >= FEW:
        return ""
    resamples = math.comb(2 * pairs - 1, pairs)
    text = f"{pairs} pairs have {resamples} distinct resamples, so the interval is too narrow"
    if pairs <= 3:
        text += ": it is the range from the lowest to the highest difference"
    return text + ". Read it as a range, and run more seeds for a claim."
