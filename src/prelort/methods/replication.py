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

from prelort.adapters import Factors, LoraAdapter
from prelort.config import Section
from prelort.methods.interface import ServerState, Update
from prelort.methods.prefix import PrefixMethod
from prelort.methods.slot_mean import Averaging, SlotMean, Weighting, weighting


class ReplicationOptions(Section):
    """``[method.options.replication]``."""

    donors: Literal["highest", "holders"] = "highest"


class Replication(PrefixMethod):
    """Low-rank clients are padded with the high-rank clients' slots."""

    name: ClassVar[str] = "replication"
    summary: ClassVar[str] = "missing slots are filled from the highest-rank clients, then averaged"
    paper: ClassVar[str] = "Byun & Lee 2024, arXiv 2406.17477"
    Options: ClassVar[type[Section]] = ReplicationOptions

    def aggregator(self, state: ServerState) -> Averaging:
        """The mean of the padded replies."""
        weight = weighting(self.config.weights)
        if self.options.donors == "holders":
            return Averaging(state, weight, SlotMean.over_holders)
        return Replicating(state, weight)


class Replicating(Averaging):
    """Beside the mean over the holders, the mean over those of the highest rank so far."""

    def __init__(self, state: ServerState, weight: Weighting) -> None:
        super().__init__(state, weight, self.padded)
        self.donors = SlotMean(state.adapter)
        self.highest = 0

    def add(self, update: Update) -> None:
        """Fold in a reply; one of a higher rank than any before replaces the donors."""
        super().add(update)
        rank, weight = update.adapter.rank, self.weight(update)
        if rank > self.highest and weight > 0:
            self.donors, self.highest = SlotMean(self.state.adapter), rank
        if rank == self.highest:
            self.donors.add(update.adapter, weight)

    def padded(self, holders: SlotMean, previous: LoraAdapter) -> LoraAdapter:
        """``share held * holders' mean + share lacking * donors' mean`` of each slot."""
        own, donated = holders.over_holders(previous), self.donors.over_holders(previous)
        layers: dict[str, Factors] = {}
        for name, factors in own.layers.items():
            lacking = (1 - holders.held[name] / holders.total).to(torch.float32)
            given = donated.layers[name]
            layers[name] = Factors(
                torch.lerp(factors.A, given.A, lacking[:, None]),
                torch.lerp(factors.B, given.B, lacking[None, :]),
            )
        return LoraAdapter(layers, own.scale, own.extras)
