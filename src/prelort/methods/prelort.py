"""PreLort: prefix-nested LoRA for mixed ranks (Waseem et al., arXiv 2606.15963).

Server: the distinct client ranks 0 = rho_0 < rho_1 < ... < rho_M = R cut the global adapter into
segments (rho_{m-1}, rho_m]. Each segment of A (rows) and of B (columns) becomes the weighted mean
over the clients that hold it:

    A_j = sum_{k: r_k >= j} w_k A_{k,j} / sum_{k: r_k >= j} w_k        (likewise B_j)

A segment that nobody trained this round keeps its value; a missing segment is never a zero.
Client: receives the prefix of its rank, and trains it under several rank truncations.

The paper's equations were not at hand: segment-wise averaging and training under truncations are
the abstract's words, while the weights (examples) and the sum over truncations are our reading.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from prelort.adapters import LoraAdapter
from prelort.config import MethodConfig
from prelort.methods.interface import Client, ServerState
from prelort.methods.objective import Objective, configured
from prelort.methods.slot_mean import Averaging, SlotMean, weighting


class PreLort:
    """Segment-wise aggregation and the prefix-nested objective."""

    name: ClassVar[str] = "prelort"
    summary: ClassVar[str] = (
        "prefix-nested training, each rank segment averaged over the clients that hold it"
    )
    paper: ClassVar[str] = "PreLort, Waseem et al. 2026, arXiv 2606.15963"

    def __init__(self, config: MethodConfig, levels: Sequence[int], seed: int) -> None:
        self.config = config
        self.levels = tuple(levels)

    def check(self, clients: Sequence[Client]) -> None:
        """Any mixture of ranks is served; the objective of each must leave something to train."""
        for client in clients:
            self.objective(client)

    def broadcast(self, state: ServerState, client: Client) -> LoraAdapter:
        """The prefix of the client's rank."""
        return state.adapter.prefix(client.rank)

    def objective(self, client: Client) -> Objective:
        """The levels up to the client's rank, by default one drawn for each example."""
        return configured(self.config, client.rank, self.levels, default="example")

    def aggregator(self, state: ServerState) -> Averaging:
        """Segment-wise: each slot's mean over its holders, or its previous value."""
        return Averaging(state, weighting(self.config.weights), SlotMean.over_holders)
