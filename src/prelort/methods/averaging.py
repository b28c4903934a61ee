"""The weights of clients, and the aggregator of the methods that average factors."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from prelort.adapters import LoraAdapter
from prelort.aggregation.rankwise_mean import RankwiseMean
from prelort.methods.interface import ServerState, Update

Weighting = Callable[[Update], float]


def by_examples(update: Update) -> float:
    """A client's weight is its number of examples."""
    return float(update.examples)


def uniformly(update: Update) -> float:
    """Every client weighs the same."""
    return 1.0


def weighting(name: str) -> Weighting:
    """The weighting that `MethodConfig.weights` names."""
    return by_examples if name == "examples" else uniformly


class Averaging:
    """The aggregator of the methods that average rank dimensions.

    Args:
        state: before the round.
        weight: of a reply.
        finish: makes the mean the new adapter, given the old one; here the methods differ.
        dimensions_of: the rank dimensions that a client trained (layer -> int64 [rank]), where
            these are not the first ones.
    """

    def __init__(
        self,
        state: ServerState,
        weight: Weighting,
        finish: Callable[[RankwiseMean, LoraAdapter], LoraAdapter],
        dimensions_of: Callable[[Update], Mapping[str, Tensor]] | None = None,
    ) -> None:
        self.state = state
        self.weight = weight
        self.finish = finish
        self.dimensions_of = dimensions_of
        self.mean = RankwiseMean(state.adapter)

    def add(self, update: Update) -> None:
        """Fold in a reply's rank dimensions."""
        dimensions = self.dimensions_of(update) if self.dimensions_of is not None else None
        self.mean.add(update.adapter, self.weight(update), dimensions)

    def result(self) -> ServerState:
        """The state after the round; its adapter is the old one where no reply had a weight."""
        old = self.state.adapter
        return self.state.advanced(self.finish(self.mean, old) if self.mean.total > 0 else old)
