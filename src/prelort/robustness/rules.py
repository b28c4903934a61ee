"""Robust rules on the changes of one part of the adapter, in float64.

The h clients that hold the part have changed it by the vectors c_1 .. c_h, of which up to f are an
attacker's. Krum, Multi-Krum and the geometric median need only the squared distances |c_i - c_j|^2
and answer with weights on the clients, so that no vector is kept twice; the median and the trimmed
mean work on each coordinate.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Rule = Literal["clip", "median", "trimmed-mean", "krum", "multi-krum", "geometric-median"]

ITERATIONS = 100
"""Of Weiszfeld's algorithm, at most."""


def needed(rule: Rule, attackers: int) -> int:
    """How many clients must hold a part so that ``attackers`` of them do not decide about it.

    Krum's guarantee is for h >= 2 f + 3 (Blanchard et al. 2017, proposition 4.2); the others need
    an honest majority.
    """
    return 2 * attackers + (3 if rule in ("krum", "multi-krum") else 1)


def clipping(norms: Tensor, bound: Tensor | float | None = None) -> Tensor:
    """Factors that shorten changes to ``bound``, by default to their median norm.

    Args:
        norms: the changes' norms, float64 [h].
        bound: the largest norm that is left as it is.
    """
    limit = norms.median() if bound is None else bound
    return (limit / norms.clamp_min(1e-300)).clamp_max(1.0)


def trimmed_mean(changes: Tensor, trim: int) -> Tensor:
    """The mean of each coordinate without its ``trim`` smallest and largest values.

    Yin et al. 2018 (arXiv 1803.01498), definition 2. ``changes``: [h, ...], h > 2 trim.
    """
    return changes.sort(dim=0).values[trim : len(changes) - trim].mean(dim=0)


def median(changes: Tensor) -> Tensor:
    """Each coordinate's median over the clients (Yin et al. 2018, definition 1): [h, ...]."""
    return trimmed_mean(changes, (len(changes) - 1) // 2)


def krum(squares: Tensor, attackers: int, chosen: int = 1) -> Tensor:
    """Weights of the ``chosen`` clients whose nearest neighbours are nearest, float64 [h].

    A client's score is the sum of its squared distances to its h - f - 2 nearest neighbours
    (Blanchard et al. 2017, "Machine Learning with Adversaries", section 4); one chosen client is
    Krum, several are Multi-Krum. ``squares``: squared distances, float64 [h, h].
    """
    count = len(squares)
    neighbours = max(1, count - attackers - 2)
    # The distance to itself is 0, the smallest.
    scores = squares.sort(dim=1).values[:, 1 : neighbours + 1].sum(dim=1)
    best = scores.argsort(stable=True)[:chosen]
    return torch.zeros(count, dtype=squares.dtype).index_fill_(0, best, 1 / chosen)


def geometric_median(squares: Tensor) -> Tensor:
    """Weights whose mean is the point with the smallest sum of distances, float64 [h].

    Smoothed Weiszfeld (Pillutla et al., arXiv 1912.13445, algorithm 2). For weights w that sum to 1
    and m = sum_i w_i c_i, |c_i - m|^2 = (D w)_i - w' D w / 2, D the squared distances.
    """
    weights = torch.full((len(squares),), 1 / len(squares), dtype=squares.dtype)
    floor = 1e-6 * squares.max().sqrt().clamp_min(1e-300)
    for _ in range(ITERATIONS):
        spread = squares @ weights
        distances = (spread - weights @ spread / 2).clamp_min(0).sqrt()
        new = 1 / distances.clamp_min(floor)
        new /= new.sum()
        if torch.allclose(new, weights, rtol=0, atol=1e-9):
            break
        weights = new
    return weights
