"""The weights of clients, and the aggregator of the methods that average factors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

from torch import Tensor

from prelort.adapters import LoraAdapter
from prelort.aggregation.products import ProductSum, SegmentSums
from prelort.aggregation.rankwise_mean import RankwiseMean
from prelort.methods.interface import Aggregator, Client, ServerState, Update

Weighting = Callable[[Update], float]
DimensionsOf = Callable[[Client], Mapping[str, Tensor]]
Finish = Callable[[RankwiseMean, LoraAdapter], LoraAdapter]
"""Makes the mean of a round the new adapter, given the old one."""

Sums = TypeVar("Sums", ProductSum, SegmentSums)


def by_examples(update: Update | Client) -> float:
    """A client's weight is its number of examples."""
    return float(update.examples)


def uniformly(update: Update | Client) -> float:
    """Every client weighs the same."""
    return 1.0


def weighting(name: str) -> Callable[[Update | Client], float]:
    """The weighting that `MethodConfig.weights` names."""
    return by_examples if name == "examples" else uniformly


class Averaging:
    """The aggregator of the methods that average rank dimensions.

    Args:
        state: before the round.
        weight: of a reply.
        finish: where the methods differ.
        dimensions_of: the rank dimensions that a client trains (layer -> int64 [rank]), where
            these are not the first ones.

    What each client trains must be a part of the state's adapter if sums are added.
    """

    def __init__(
        self,
        state: ServerState,
        weight: Weighting,
        finish: Finish,
        dimensions_of: DimensionsOf | None = None,
    ) -> None:
        self.state = state
        self.weight = weight
        self.finish = finish
        self.dimensions_of = dimensions_of
        self.mean = RankwiseMean(state.adapter)

    def weight_of(self, client: Client) -> float:
        """A client's weight before its reply. Raises `ValueError` where that depends on it."""
        for known in (by_examples, uniformly):
            if known is self.weight:
                return known(client)
        raise ValueError("the weight depends on the reply")

    def add(self, update: Update) -> None:
        """Fold in a reply's rank dimensions."""
        of = self.dimensions_of
        dimensions = of(update.client) if of is not None else None
        self.mean.add(update.adapter, self.weight(update), dimensions)

    def add_sums(self, changes: LoraAdapter, weights: Mapping[str, Tensor], total: float) -> None:
        """Take the sums of a whole round, as `RankwiseMean.add_sums` does."""
        self.mean.add_sums(self.state.adapter, changes, weights, total)

    def result(self) -> ServerState:
        """The state after the round; its adapter is the old one where no reply had a weight."""
        old = self.state.adapter
        return self.state.advanced(self.finish(self.mean, old) if self.mean.total > 0 else old)


class AveragingProducts(Generic[Sums]):
    """The aggregator of the methods that average products.

    Args:
        state: before the round.
        weight: of a reply.
        sums: of the replies' products, empty.
        finish: makes the sums the state after the round, if a reply had a weight.
    """

    def __init__(
        self,
        state: ServerState,
        weight: Weighting,
        sums: Sums,
        finish: Callable[[Sums], ServerState],
    ) -> None:
        self.state = state
        self.weight = weight
        self.sums: Sums = sums
        self.finish: Callable[[Sums], ServerState] = finish

    def add(self, update: Update) -> None:
        """Fold in a reply's product."""
        self.sums.add(update.adapter, self.weight(update))

    def result(self) -> ServerState:
        """The state after the round; its adapter is the old one where no reply had a weight."""
        state = self.state
        return self.finish(self.sums) if self.sums.total > 0 else state.advanced(state.adapter)


def needing_only_sums(aggregator: Aggregator) -> Averaging | None:
    """The aggregator if it needs no single reply: an `Averaging` whose weights are known before.

    None for any other, also for one derived from it: what that does with a reply is unknown.
    """
    if type(aggregator) is Averaging and aggregator.weight in (by_examples, uniformly):
        return aggregator
    return None
