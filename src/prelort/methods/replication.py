"""Replication padding (Byun & Lee, arXiv 2406.17477): missing dimensions are copied, not zeroed.

A client that lacks rank dimension j is padded with the donors' mean there,

    x_k,j := D_j = sum_{k in donors} w_k x_k,j / sum_{k in donors} w_k    for j > r_k,

and all are averaged, x_j = sum_k w_k x_k,j / sum_k w_k (A and B alike). The paper has two ranks
and takes the high-rank clients as donors. With more levels that choice is ours: ``donors`` are the
clients of the round's highest rank ("highest", default) or all that hold the dimension ("holders",
which is the segment-wise mean). A dimension above all ranks of the round keeps its value.

The paper's other half, ranks by validation loss, is `ranks.allocation = "by-loss"` and works with
every method.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch

from prelort.adapters import LoraAdapter
from prelort.aggregation.rankwise_mean import RankwiseMean
from prelort.config import Section
from prelort.methods.averaging import Averaging, Weighting, weighting
from prelort.methods.interface import Aggregator, ServerState, Update
from prelort.methods.prefix import PrefixMethod


class ReplicationOptions(Section):
    """``[method.options.replication]``."""

    donors: Literal["highest", "holders"] = "highest"


class Replication(PrefixMethod):
    """Low-rank clients are padded with the high-rank clients' dimensions."""

    name: ClassVar[str] = "replication"
    summary: ClassVar[str] = "fills missing dimensions from the highest-rank clients, then averages"
    paper: ClassVar[str] = "Byun & Lee 2024, arXiv 2406.17477"
    Options: ClassVar[type[Section]] = ReplicationOptions

    def aggregator(self, state: ServerState) -> Aggregator:
        """The mean of the padded replies."""
        weight = weighting(self.config.weights)
        if self.options.donors == "holders":
            return Averaging(state, weight, RankwiseMean.over_holders)
        return Replicating(state, weight)


class Replicating:
    """The mean over all holders, and beside it that over the clients of the highest rank so far."""

    def __init__(self, state: ServerState, weight: Weighting) -> None:
        self.state = state
        self.weight = weight
        self.holders = RankwiseMean(state.adapter)
        self.donors = RankwiseMean(state.adapter)
        self.highest = 0

    def add(self, update: Update) -> None:
        """Fold in a reply; one of a higher rank than any before starts the donors' mean anew."""
        rank, weight = update.adapter.rank, self.weight(update)
        if weight == 0:
            return
        self.holders.add(update.adapter, weight)
        if rank > self.highest:
            del self.donors  # before the memory of the next one is taken
            self.highest, self.donors = rank, RankwiseMean(self.state.adapter)
        if rank == self.highest:
            self.donors.add(update.adapter, weight)

    def result(self) -> ServerState:
        """The state after the round; its adapter is the old one where no reply had a weight."""
        old = self.state.adapter
        return self.state.advanced(self._padded(old) if self.holders.total > 0 else old)

    def _padded(self, previous: LoraAdapter) -> LoraAdapter:
        """``p_j M_j + (1 - p_j) D_j``: M_j the holders' mean, p_j their share of the weight."""
        donors = self.donors.over_holders(previous)
        mean = self.holders.over_holders(previous)
        for name, factors in mean.layers.items():
            donor, share = donors.layers[name], self.holders.share(name)
            torch.lerp(donor.A, factors.A, share[:, None], out=factors.A)
            torch.lerp(donor.B, factors.B, share, out=factors.B)
        return mean
