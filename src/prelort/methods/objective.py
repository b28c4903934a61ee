"""The prefix-nested objective: under which rank truncations a client trains its adapter.

For a client of rank r and the federation's rank levels, T = {levels <= r} (r is always one of
them). The objective is ``L = sum over rho in T of weight[rho] * L(f_rho)``, where f_rho uses the
first rho dimensions at scale s(rho) (our reading of PreLort, arXiv 2606.15963: the paper's abstract
says that each adapter is optimised under multiple rank truncations).

Every kind is an unbiased estimate of that sum; they differ in their cost:

=========  ==========================================================  ==================
kind       one optimiser step sees                                     forward passes
=========  ==========================================================  ==================
plain      the full rank only (ordinary LoRA; not nested)              1
mean       every truncation                                            number of levels
full+one   the full rank and one drawn truncation                      2 (1 without lower)
step       one drawn truncation                                        1
example    an independently drawn truncation for each example          1
=========  ==========================================================  ==================
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from prelort.config import MethodConfig
from prelort.errors import ConfigError

Kind = Literal["plain", "mean", "example", "step", "full+one"]


@dataclass(frozen=True, slots=True)
class Pass:
    """One forward and backward pass: the truncation of the batch or of each example, its weight.

    ``ranks`` is None (nothing cut), a rank for the whole batch, or an int64 tensor [batch].
    """

    ranks: int | Tensor | None
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class TailPenalty:
    """HetLoRA's regulariser and self-pruning (arXiv 2401.06432).

    ``weight * sum over layers of |B[:, q:]| |A[q:]|`` joins the loss, with q = floor(keep * r).
    Where training has made that product norm smaller the client prunes its adapter to rank q, but
    not below ``lowest``.
    """

    weight: float
    keep: float
    lowest: int

    def cut(self, rank: int) -> int:
        """Q of an adapter of this rank: at least 1, and below the rank where that is above 1."""
        return max(1, min(math.floor(self.keep * rank), rank - 1))


@dataclass(frozen=True, slots=True)
class Objective:
    """What one client optimises: truncations with weights that sum to 1, and how to sample them.

    The last of ``levels`` is the rank that the client trains at.
    """

    kind: Kind
    levels: tuple[int, ...]
    weights: tuple[float, ...]
    tail: TailPenalty | None = None

    def passes(self, batch_size: int, generator: torch.Generator) -> list[Pass]:
        """The passes of one batch; draws come from ``generator`` alone."""
        if self.kind == "plain" or len(self.levels) == 1:
            return [Pass(None)]
        if self.kind == "mean":
            weighted = zip(self.levels, self.weights, strict=True)
            return [Pass(level, weight) for level, weight in weighted if weight > 0]
        if self.kind == "step":
            return [Pass(self.levels[int(self._draw(self.weights, 1, generator))])]
        if self.kind == "example":
            indices = self._draw(self.weights, batch_size, generator)
            return [Pass(torch.tensor(self.levels)[indices])]
        full, below = self.weights[-1], sum(self.weights[:-1])
        if below == 0:
            return [Pass(None)]
        one = self.levels[int(self._draw(self.weights[:-1], 1, generator))]
        passes = [Pass(self.levels[-1], full), Pass(one, below)]
        return [p for p in passes if p.weight > 0]

    @property
    def passes_per_batch(self) -> int:
        """The number of `passes` of a batch, which does not depend on draws."""
        return len(self.passes(1, torch.Generator().manual_seed(0)))

    @staticmethod
    def _draw(weights: Sequence[float], count: int, generator: torch.Generator) -> Tensor:
        probabilities = torch.tensor(weights, dtype=torch.float64)
        return torch.multinomial(probabilities, count, replacement=True, generator=generator)


def plain(rank: int) -> Objective:
    """Ordinary LoRA training at the client's rank."""
    return Objective("plain", (rank,), (1.0,))


FULL_SHARE: Mapping[Kind, float | None] = {"example": 0.5, "step": 0.5, "full+one": 0.5}
"""Default weight of the client's own rank where truncations are sampled; `mean` weighs evenly."""


def configured(
    config: MethodConfig, rank: int, levels: Sequence[int], default: Kind = "plain"
) -> Objective:
    """The objective that ``config`` asks of a client of ``rank``.

    Raises `ConfigError` for a weight of a rank that is no level, or weights that sum to 0.
    """
    kind = config.objective or default
    levels = config.truncations or levels
    share = config.full_share if config.full_share is not None else FULL_SHARE.get(kind)
    weights: dict[int, float] | None = None
    if config.level_weights is not None:
        for key in config.level_weights:
            if not key.isdecimal() or int(key) not in levels:
                raise ConfigError(
                    f"method.level_weights: {key!r} is not a rank level: the levels are "
                    f"{', '.join(map(str, levels))}"
                )
        weights = {int(key): weight for key, weight in config.level_weights.items()}
    return nested(kind, rank, levels, full_share=share, level_weights=weights)


def nested(
    kind: Kind,
    rank: int,
    levels: Sequence[int],
    *,
    full_share: float | None = None,
    level_weights: Mapping[int, float] | None = None,
) -> Objective:
    """The prefix-nested objective of a client of ``rank`` over the levels up to its rank.

    Weights: ``level_weights`` (made to sum to 1 over T) if given; else the client's full rank has
    ``full_share`` and its prefixes share the rest evenly; else all levels are equal. Raises
    `ConfigError` if the weights leave nothing to train.
    """
    if kind == "plain":
        return plain(rank)
    truncations = tuple(sorted({level for level in levels if level < rank} | {rank}))
    if level_weights is not None:
        raw = [float(level_weights.get(level, 0.0)) for level in truncations]
    elif full_share is not None and len(truncations) > 1:
        raw = [(1.0 - full_share) / (len(truncations) - 1)] * (len(truncations) - 1) + [full_share]
    else:
        raw = [1.0] * len(truncations)
    total = sum(raw)
    if total <= 0:
        raise ConfigError(
            f"method.level_weights = {dict(level_weights or {})} leaves nothing to train for a "
            f"client of rank {rank}: give one of the levels {list(truncations)} a weight above 0"
        )
    return Objective(kind, truncations, tuple(weight / total for weight in raw))
