"""What most methods have in common: a client of rank r holds the first r slots.

A method's own file overrides the part where its paper differs, so that it shows nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from prelort.adapters import LoraAdapter
from prelort.aggregation.rankwise_mean import RankwiseMean
from prelort.config import MethodConfig, NoOptions, Section
from prelort.errors import ConfigError
from prelort.methods.averaging import Averaging, weighting
from prelort.methods.interface import Broadcast, Client, ServerState
from prelort.methods.objective import Kind, Objective, configured


class PrefixMethod:
    """Prefixes down, prefixes up, each slot averaged over the clients that hold it."""

    name: ClassVar[str]
    summary: ClassVar[str]
    paper: ClassVar[str]

    Options: ClassVar[type[Section]] = NoOptions
    """The keys of ``[method.options.<name>]``."""
    default_objective: ClassVar[Kind] = "plain"
    rank_exponent: ClassVar[float] = 0.0
    """Clients of rank r train at (highest rank / r) to this power times the learning rate."""
    may_nest: ClassVar[bool] = True
    """Whether ``method.objective`` may ask for prefixes of what a client trains."""
    personal: ClassVar[bool] = False
    """Whether there is no global model, so that only clients can measure."""
    ignores_ranks: ClassVar[bool] = False
    """A reference row: clients train at a rank that they cannot afford (simulation only)."""

    def __init__(self, config: MethodConfig, seed: int) -> None:
        if not self.may_nest and config.objective not in (None, "plain"):
            raise ConfigError(
                f"method.objective = {config.objective!r} is not part of {self.name}: use 'plain'"
            )
        self.config = config
        self.seed = seed
        self.options: Any = config.options_of(self.name, self.Options)

    def check(self, state: ServerState, clients: Sequence[Client]) -> None:
        """Any mixture of ranks is served; the objective of each must leave something to train."""
        for client in clients:
            self.objective(state, client)

    def broadcast(self, state: ServerState, client: Client) -> Broadcast:
        """The prefix of the client's rank."""
        return Broadcast(state.adapter.prefix(client.rank))

    def objective(self, state: ServerState, client: Client) -> Objective:
        """The method's own objective, unless the configuration asks for another."""
        return configured(self.config, client.rank, state.levels, default=self.default_objective)

    def aggregator(self, state: ServerState) -> Any:
        """Segment-wise: each slot's mean over its holders, or its previous value."""
        return Averaging(state, weighting(self.config.weights), RankwiseMean.over_holders)

    def global_adapter(self, state: ServerState, rank: int | None = None) -> LoraAdapter:
        """The prefix of this rank (None: the whole)."""
        return state.adapter if rank is None else state.adapter.prefix(rank)
