"""Reference rows: what FedIT reaches if all clients had the lowest, or the highest, rank.

Every table of mixed ranks should have both: the first is what the federation can do without mixing
ranks, the second what it could do if everyone afforded the highest. Under the second, clients train
what they cannot afford, so it exists in simulation only: a real site refuses.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import ClassVar

from prelort.adapters import LoraAdapter
from prelort.methods.interface import Broadcast, Client, ServerState
from prelort.methods.objective import Objective
from prelort.methods.prefix import PrefixMethod


class HomogeneousMin(PrefixMethod):
    """FedIT with every client at the lowest rank of the federation."""

    name: ClassVar[str] = "homogeneous-min"
    summary: ClassVar[str] = "reference: everyone at the lowest rank (FedIT)"
    paper: ClassVar[str] = "FedIT at r_min, arXiv 2305.05644"
    one_scale: ClassVar[bool] = False

    def rank(self, state: ServerState) -> int:
        """The rank at which everyone trains."""
        return state.levels[0]

    def broadcast(self, state: ServerState, client: Client) -> Broadcast:
        """The same prefix for everyone."""
        return Broadcast(state.adapter.prefix(self.rank(state)))

    def objective(self, state: ServerState, client: Client) -> Objective:
        """As of a client of that rank."""
        return super().objective(state, replace(client, rank=self.rank(state)))

    def global_adapter(
        self, state: ServerState, rank: int | None = None, layers: Collection[str] | None = None
    ) -> LoraAdapter:
        """What was trained, or a prefix of it: the dimensions above must not change its scale."""
        trained = self.rank(state)
        rank = trained if rank is None else min(rank, trained)
        return super().global_adapter(state, rank, layers)


class HomogeneousMax(HomogeneousMin):
    """FedIT with every client at the highest rank of the federation."""

    name: ClassVar[str] = "homogeneous-max"
    summary: ClassVar[str] = "reference, simulation only: everyone at the highest rank (FedIT)"
    paper: ClassVar[str] = "FedIT at r_max, arXiv 2305.05644"
    ignores_ranks: ClassVar[bool] = True

    def rank(self, state: ServerState) -> int:
        """The rank at which everyone trains."""
        return state.levels[-1]
