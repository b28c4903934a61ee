"""Replication padding (Byun & Lee, arXiv 2406.17477): missing slots are copied, not zeroed.

A client that lacks slot j is padded with the donors' mean there,

    x_k,j := D_j = sum_{k in donors} w_k x_k,j / sum_{k in donors} w_k    for j > r_k,

and all are averaged, x_j = sum_k w_k x_k,j / sum_k w_k (A and B alike). The paper has two ranks
and takes the high-rank clients as donors. With more levels that choice is ours: ``donors`` are the
clients of the round's highest rank ("highest", default) or all that hold the slot ("holders",
which is the segment-wise mean). A slot above all ranks of the round keeps its value.

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
    """Low-rank clients are padded with the high-rank clients' slots."""

    name: ClassVar[str] = "replication"
    summary: ClassVar[str] = "missing slots are filled from the highest-rank clients, then averaged"
    paper: ClassVar[str] = "Byun & Lee 2024, arXiv 2406.17477"
    Options: ClassVar[type[Section]] = ReplicationOptions

    def aggregator(self, state: ServerState) -> Aggregator:
        """The mean of the padded replies."""
        weight = weighting(self.config.weights)
        if self.options.donors == "holders":
            return Averaging(state, weight, RankwiseMean.over_holders)
        return Replicating(state, weight)


class Replicating:
    """The mean over the clients of the highest rank so far, and apart from it the others' mean.

    Every reply is folded into one of the two. The others' is as wide as their highest rank, so
    that memory is that of fewer than two and a half global adapters.
    """

    def __init__(self, state: ServerState, weight: Weighting) -> None:
        self.state = state
        self.weight = weight
        self.donors = RankwiseMean(state.adapter)
        self.highest = 0
        self.others: RankwiseMean | None = None
        self.width = 0

    def add(self, update: Update) -> None:
        """Fold in a reply; by one of a higher rank than any before, the donors become others."""
        rank, weight = update.adapter.rank, self.weight(update)
        if weight == 0:
            return
        if rank > self.highest:
            if self.highest > 0:
                self._others(self.highest).merge(self.donors)
                self.donors = RankwiseMean(self.state.adapter)
            self.highest = rank
        means = self.donors if rank == self.highest else self._others(rank)
        means.add(update.adapter, weight)

    def _others(self, rank: int) -> RankwiseMean:
        """The others' mean, of at least this rank."""
        if self.others is None or self.width < rank:
            wider = RankwiseMean(self.state.adapter.prefix(rank))
            if self.others is not None:
                wider.merge(self.others)
            self.others, self.width = wider, rank
        return self.others

    def result(self) -> ServerState:
        """The state after the round; its adapter is the old one where no reply had a weight."""
        old = self.state.adapter
        adapter = self._padded(old) if self.donors.total > 0 else old
        return self.state.advanced(adapter)

    def _padded(self, previous: LoraAdapter) -> LoraAdapter:
        """``share held by others * their mean + the rest * donors' mean`` of each slot."""
        adapter, others = self.donors.over_holders(previous), self.others
        if others is None:
            return adapter
        everyone = self.donors.total + others.total
        for name, theirs in others.mean.layers.items():
            share = (others.held[name] / everyone).to(torch.float32)
            part = adapter.layers[name].prefix(theirs.rank)
            part.A.lerp_(theirs.A, share[:, None])
            part.B.lerp_(theirs.B, share[None, :])
        for name, tensor in others.mean.modules_to_save.items():
            adapter.modules_to_save[name].lerp_(tensor, others.total / everyone)
        return adapter
