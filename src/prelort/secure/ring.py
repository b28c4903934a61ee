"""Fixed-point numbers in the ring of integers modulo 2^64.

A value x of weight w becomes ``round(w x 2^f)`` as two's complement. Sums modulo 2^64 are the exact
sums of these integers while they stay within the ring, which `fraction_bits` provides for.
"""

from __future__ import annotations

import math
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from prelort.errors import ConfigError

Words: TypeAlias = NDArray[np.uint64]
"""Elements of the ring, of shape [n]."""
Values: TypeAlias = NDArray[np.float64]

SUM_BITS = 62
"""A sum is below 2^62 in magnitude: half of the signed range is never used, so that an element that
is still masked is recognised in half of all cases, and a vector of them practically always."""
MIN_FRACTION_BITS = 8


def fraction_bits(total_weight: float, bound: float) -> int:
    """The largest f for which sums of weighted values stay within the ring.

    Args:
        total_weight: of all clients together, above 0.
        bound: the largest magnitude of a single value, above 0.

    Raises `ConfigError` where fewer than `MIN_FRACTION_BITS` are left.
    """
    bits = SUM_BITS - 1 - math.ceil(math.log2(total_weight * bound))
    if bits < MIN_FRACTION_BITS:
        raise ConfigError(
            f"secure aggregation has no room for values up to {bound:g} with a total weight of "
            f"{total_weight:g}: lower federation.max_abs_value"
        )
    return bits


def error_bound(clients: int, bits: int) -> float:
    """The largest error of a weighted sum over so many clients: half a step for each."""
    return clients * 2.0 ** -(bits + 1)


def quantise(values: Values, weight: float, bits: int) -> Words:
    """``round(weight * values * 2^bits)`` in the ring: off by half a step at most."""
    scaled: Values = np.rint(np.ldexp(values * weight, bits))
    return scaled.astype(np.int64).view(np.uint64)


def dequantise(words: Words, bits: int) -> Values:
    """The real numbers that the elements stand for."""
    return np.ldexp(words.view(np.int64).astype(np.float64), -bits)
