"""Auditing differential privacy in one run, with canaries (Steinke et al., arXiv 2305.08846)."""

from __future__ import annotations

import numpy as np
from scipy.stats import binom


def audited_epsilon(scores: np.ndarray, took_part: np.ndarray, guesses: int) -> float:
    """A lower bound of epsilon at 99.9 % confidence (theorem 5.2 without delta).

    Each canary took part with probability 1/2. By its score one guesses the lowest ``guesses`` / 2
    out and as many of the highest in: at most Binomial(guesses, e^eps / (1 + e^eps)) are right.
    """
    order = np.argsort(scores)
    out, into = order[: guesses // 2], order[-guesses // 2 :]
    right = int((~took_part[out]).sum() + took_part[into].sum())
    candidates = np.linspace(0.0, 10.0, 1001)
    tails = binom.sf(right - 1, guesses, 1 / (1 + np.exp(-candidates)))
    return float(candidates[tails <= 1e-3].max(initial=0.0))
