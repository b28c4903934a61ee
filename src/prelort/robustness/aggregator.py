"""A robust rule before a method's own aggregator.

With x_k what client k was sent and c_k its change, the method gets x_k + c'_k in place of
x_k + c_k. The adapter is cut into parts that have the same holders: the modules to save, and the
rank segments between the round's ranks. In each part by itself, c'_k is c_k shortened to the median
norm ("clip"), or one robust centre of the holders' changes for all of them: whatever the method
does with equal replies then keeps the centre.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from prelort.adapters import Factors, LoraAdapter
from prelort.errors import QuorumError
from prelort.methods.interface import Method, ServerState, Update
from prelort.robustness import rules

EXAMPLES_CAP = 2.0
"""How many times the round's median number of examples a client may weigh."""

Correct = Callable[[Tensor], Tensor]
"""From the holders' changes of a tensor, float64 [h, ...], to the corrected ones."""


class RobustAggregator:
    """Keeps a round's updates, and passes them corrected to the method's aggregator.

    Args:
        rule: of `rules`.
        method: broadcasts prefixes of one adapter (`coverage.check`).
        state: before the round.
        attackers: how many of the round's clients may be malicious, at any rank.
        clip_uncovered: for rank segments with too few holders for the rule: shorten changes to the
            norm that is usual for the segment below; False: freeze them.
    """

    def __init__(
        self,
        rule: rules.Rule,
        method: Method,
        state: ServerState,
        attackers: int,
        clip_uncovered: bool,
    ) -> None:
        self.rule = rule
        self.method = method
        self.state = state
        self.attackers = attackers
        self.clip_uncovered = clip_uncovered
        self.updates: list[Update] = []

    def add(self, update: Update) -> None:
        """Keep a reply."""
        self.updates.append(update)

    def result(self) -> ServerState:
        """The state after the round. Raises `QuorumError` for too few replies for the rule."""
        needed = rules.needed(self.rule, self.attackers)
        if len(self.updates) < needed:
            raise QuorumError(
                f"robustness.rule = {self.rule!r} needs {needed} replies where {self.attackers} "
                f"may be malicious, but there are {len(self.updates)}"
            )
        inner = self.method.aggregator(self.state)
        cap = EXAMPLES_CAP * statistics.median(update.examples for update in self.updates)
        for update, adapter in zip(self.updates, self._corrected(), strict=True):
            examples = int(min(update.examples, cap))
            inner.add(replace(update, adapter=adapter, examples=examples))
        return inner.result()

    def _corrected(self) -> list[LoraAdapter]:
        """The updates' adapters with corrected changes."""
        highest = max(self.updates, key=lambda update: update.adapter.rank)
        sent = self.method.broadcast(self.state, highest.client).trainable
        corrected = [copied(update.adapter) for update in self.updates]
        usual = 0.0
        for part in parts([update.adapter.rank for update in self.updates]):
            before = part.of(sent)
            if not before:
                continue
            after = [part.of(corrected[holder]) for holder in part.holders]
            changes = Changes(before, after)
            if len(part.holders) >= rules.needed(self.rule, self.attackers):
                correct = self._correction(changes)
                usual = float(changes.norms().median()) / changes.size**0.5
            else:
                bound = usual * changes.size**0.5 if self.clip_uncovered else 0.0
                correct = _scaling(rules.clipping(changes.norms(), bound))
            changes.replace(correct)
        return corrected

    def _correction(self, changes: Changes) -> Correct:
        """What the rule does to a part, given the changes of all its tensors."""
        attackers = self.attackers
        match self.rule:
            case "clip":
                return _scaling(rules.clipping(changes.norms()))
            case "median":
                return _centre(rules.median)
            case "trimmed-mean":
                return _centre(lambda change: rules.trimmed_mean(change, attackers))
            case "krum":
                return _mean(rules.krum(changes.squared_distances(), attackers))
            case "multi-krum":
                kept = len(changes) - attackers
                return _mean(rules.krum(changes.squared_distances(), attackers, kept))
            case "geometric-median":
                return _mean(rules.geometric_median(changes.squared_distances()))


@dataclass(frozen=True, slots=True)
class Part:
    """The rank dimensions low < j <= high; high = 0: the modules to save."""

    low: int
    high: int
    holders: Sequence[int]
    """The places of those that hold it."""

    def of(self, adapter: LoraAdapter) -> list[Tensor]:
        """The part's tensors, as views, in the order of the layers' names."""
        if self.high == 0:
            return [tensor for _, tensor in sorted(adapter.modules_to_save.items())]
        tensors: list[Tensor] = []
        for _, factors in sorted(adapter.layers.items()):
            if factors.rank > self.low:
                tensors += [factors.A[self.low : self.high], factors.B[:, self.low : self.high]]
        return tensors


def parts(ranks: Sequence[int]) -> Iterator[Part]:
    """The parts of a round whose replies have these ranks."""
    for low, high in [(0, 0), *itertools.pairwise([0, *sorted(set(ranks))])]:
        yield Part(low, high, [place for place, rank in enumerate(ranks) if rank >= high])


class Changes:
    """The holders' changes of a part, computed tensor by tensor: never all in float64 at once."""

    def __init__(self, before: Sequence[Tensor], after: Sequence[Sequence[Tensor]]) -> None:
        self.before = before
        self.after = after
        self.size = sum(tensor.numel() for tensor in before)

    def __len__(self) -> int:
        return len(self.after)

    def __iter__(self) -> Iterator[Tensor]:
        """Of each tensor, float64 [h, ...]."""
        for sent, *trained in zip(self.before, *self.after, strict=True):
            yield torch.stack([tensor.double() - sent.double() for tensor in trained])

    def norms(self) -> Tensor:
        """The norm of each holder's change of the part, float64 [h]."""
        squares = [change.flatten(1).square().sum(dim=1) for change in self]
        return torch.stack(squares).sum(dim=0).sqrt()

    def squared_distances(self) -> Tensor:
        """Between the holders' changes of the part, float64 [h, h], from differences."""
        total = torch.zeros(len(self), len(self), dtype=torch.float64)
        for change in self:
            # Not |x|^2 + |y|^2 - 2 x y, whose cancellation hides small distances.
            flat = change.flatten(1)
            mode = "donot_use_mm_for_euclid_dist"
            total += torch.cdist(flat, flat, compute_mode=mode).square()
        return total

    def replace(self, correct: Correct) -> None:
        """Put what was sent plus the corrected change into the holders' tensors."""
        for change, sent, *targets in zip(self, self.before, *self.after, strict=True):
            for target, new in zip(targets, correct(change), strict=True):
                target.copy_(sent.double() + new)


def _scaling(factors: Tensor) -> Correct:
    return lambda change: change * factors.view(-1, *[1] * (change.ndim - 1))


def _centre(centre: Correct) -> Correct:
    return lambda change: centre(change).expand_as(change)


def _mean(weights: Tensor) -> Correct:
    def mean(change: Tensor) -> Tensor:
        kept = weights > 0  # zero times a huge change may not be zero
        mean: Tensor = torch.tensordot(weights[kept], change[kept], dims=1)
        return mean

    return _centre(mean)


def copied(adapter: LoraAdapter) -> LoraAdapter:
    """The adapter in tensors of its own."""
    layers = {name: Factors(f.A.clone(), f.B.clone()) for name, f in adapter.layers.items()}
    modules = {name: tensor.clone() for name, tensor in adapter.modules_to_save.items()}
    return LoraAdapter(layers, adapter.scale, modules)
