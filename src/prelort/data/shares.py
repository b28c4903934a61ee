"""Apportionment: whole numbers in given proportions."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction


def apportion(total: int, weights: Sequence[Fraction | int], at_least_one: bool) -> list[int]:
    """Split ``total`` in proportion to the weights by largest remainders.

    Each count is its exact share rounded down or up, and equal remainders go to the first listed.
    With ``at_least_one`` no count is 0 as long as ``total`` suffices for that: what is missing is
    taken, one by one, from where the count is furthest above its share.
    """
    whole = sum(weights)
    exact = [Fraction(total) * weight / whole for weight in weights]
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i], i))
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    if at_least_one and total >= len(counts):
        while 0 in counts:
            above = [i for i in range(len(counts)) if counts[i] > 1]
            counts[max(above, key=lambda i: (counts[i] - exact[i], counts[i]))] -= 1
            counts[counts.index(0)] += 1
    return counts
