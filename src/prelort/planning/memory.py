"""The memory of a client's training round at each rank, and the largest rank that fits.

Estimates come from the model's configuration alone: see `planning.rehearsal`.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from prelort.config import Config
from prelort.errors import ConfigError
from prelort.models import base
from prelort.planning.rehearsal import Rehearsal, Rehearser
from prelort.planning.sizes import show


@dataclass(frozen=True, slots=True)
class Estimate:
    """The peak memory of a round at one rank, and the size of its messages, in bytes.

    ``adapter`` includes factors that a method folds into the base and modules trained in full.
    ``activations`` are everything else: saved for the backward pass, logits, temporaries, and the
    gradients that exist at the peak (often none: they appear while activations are freed).
    """

    rank: int
    weights: int
    adapter: int
    optimiser: int
    activations: int
    down: int
    up: int

    @property
    def total(self) -> int:
        """The peak."""
        return self.weights + self.adapter + self.optimiser + self.activations

    @property
    def sent(self) -> int:
        """The bytes of the tensors of both messages."""
        return self.down + self.up


class Planner:
    """Estimates at any rank for one configuration, from few rehearsed ranks."""

    def __init__(self, config: Config, labels: int = 2) -> None:
        """``labels``: the number of classes, for a classifier's head."""
        self.config = config
        self._rehearser = Rehearser(config, labels)
        self._rehearsed: dict[int, Rehearsal] = {}

    @property
    def max_rank(self) -> int:
        """The largest useful rank: the smaller dimension of the widest layer."""
        return self._rehearser.max_rank

    def exact(self, rank: int) -> Estimate:
        """The estimate from a round rehearsed at this rank."""
        if rank < 1:
            raise ConfigError(f"rank {rank} is not allowed: use 1 or more")
        return _estimate(self._at(rank))

    def estimate(self, rank: int, max_rank: int) -> Estimate:
        """The same as `exact` for ranks up to ``max_rank``, from the rehearsed ranks around it."""
        ends = sorted({2, max_rank} | {k for k in self._rehearser.kinks if 2 < k < max_rank})
        if rank not in ends:
            for low, high in pairwise(ends):
                if low < rank < high and rank not in self._rehearsed:
                    between = self._at(low).between(self._at(high), rank)
                    return self.exact(rank) if between is None else _estimate(between)
        return self.exact(rank)

    def largest(self, budget: int, max_rank: int) -> Estimate:
        """The estimate of the largest rank from 1 to ``max_rank`` that fits ``budget`` bytes.

        Raises `ConfigError` with the bytes needed and what would help if not even rank 1 fits.
        """
        for rank in (max_rank, min(2, max_rank), 1):  # the last one only if 2 does not fit
            fits = self.estimate(rank, max_rank)
            if fits.total <= budget:
                break
        else:
            raise ConfigError(
                f"not even rank 1 fits: it needs {show(fits.total)}, and there are "
                f"{show(budget)}; what would help: {', '.join(self._remedies())}"
            )
        too_large = max_rank if fits.rank > 1 else 2
        while too_large - fits.rank > 1:
            middle = self.estimate((fits.rank + too_large) // 2, max_rank)
            if middle.total <= budget:
                fits = middle
            else:
                too_large = middle.rank
        return fits

    def _at(self, rank: int) -> Rehearsal:
        if rank not in self._rehearsed:
            self._rehearsed[rank] = self._rehearser.rehearse(rank)
        return self._rehearsed[rank]

    def _remedies(self) -> list[str]:
        """Settings that would reduce the memory."""
        model, training = self.config.model, self.config.training
        remedies: list[str] = []
        if training.batch_size > 1:
            remedies.append(f"training.batch_size below {training.batch_size}")
        if not training.gradient_checkpointing:
            remedies.append("training.gradient_checkpointing = true")
        if model.quantization != "4bit" and base.can_quantise(model):
            remedies.append("model.quantization = '4bit'")
        if training.precision == "float32":
            remedies.append("training.precision = 'bfloat16'")
        if model.dtype == "float32":
            remedies.append("model.dtype = 'bfloat16'")
        return [*remedies, f"data.max_length below {self.config.data.max_length}"]


def largest_rank(config: Config, budget_bytes: int, max_rank: int) -> int:
    """The largest rank from 1 to ``max_rank`` whose training fits into ``budget_bytes``.

    Raises `ConfigError` with one sentence if not even rank 1 fits.
    """
    if max_rank < 1:
        raise ConfigError(f"the largest rank to consider is {max_rank}: it must be 1 or more")
    return Planner(config).largest(budget_bytes, max_rank).rank


def _estimate(rehearsal: Rehearsal) -> Estimate:
    fixed = (rehearsal.weights, rehearsal.adapter, rehearsal.optimiser)
    activations = rehearsal.live.max() - sum(fixed)
    sizes = (rehearsal.rank, *fixed, activations, rehearsal.down, rehearsal.up)
    return Estimate(*map(round, sizes))
