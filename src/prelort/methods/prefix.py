"""The base of most methods: a client of rank r holds the first r rank dimensions.

A method's own file overrides only the parts in which its paper differs.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, ClassVar

from prelort.adapters import LoraAdapter
from prelort.aggregation.products import between
from prelort.aggregation.rankwise_mean import RankwiseMean
from prelort.config import MethodConfig, NoOptions, Section
from prelort.errors import ConfigError
from prelort.methods.averaging import Averaging, Finish, weighting
from prelort.methods.interface import Aggregator, Broadcast, Client, ServerState
from prelort.methods.objective import Kind, Objective, configured


class PrefixMethod:
    """Prefixes down, prefixes up, each rank dimension averaged over the clients that hold it."""

    name: ClassVar[str]
    summary: ClassVar[str]
    paper: ClassVar[str]

    Options: ClassVar[type[Section]] = NoOptions
    """The keys of ``[method.options.<name>]``."""
    finish: ClassVar[Finish] = RankwiseMean.over_holders
    """What becomes of each rank dimension's mean over its holders, and of one without holders."""
    default_objective: ClassVar[Kind] = "plain"
    rank_exponent: ClassVar[float] = 0.0
    """Clients of rank r train at (maximum rank / r) to this power times the learning rate."""
    may_nest: ClassVar[bool] = True
    """Whether ``method.objective`` may ask for truncations of what a client trains."""
    one_scale: ClassVar[bool] = True
    """Whether factors of all ranks are averaged as they are, which needs one scale for them."""
    personal: ClassVar[bool] = False
    """Whether there is no global model, so that only clients can evaluate."""
    ignores_ranks: ClassVar[bool] = False
    """A reference: clients train at a rank that they cannot afford (simulation only)."""

    def __init__(self, config: MethodConfig, seed: int) -> None:
        if not self.may_nest and config.objective not in (None, "plain"):
            raise ConfigError(
                f"method.objective = {config.objective!r} is not part of {self.name}: use 'plain'"
            )
        self.config = config
        self.seed = seed
        self.options: Any = config.options_of(self.name, self.Options)

    def check(self, state: ServerState, clients: Sequence[Client]) -> None:
        """Any mixture of ranks is served; the objective of each must leave something to train.

        Where factors are averaged, rsLoRA's scale allows one rank only: at the global rank R a
        client of rank r would count sqrt(r / R) of what it trained.
        """
        ranks = sorted({*state.levels, *(client.rank for client in clients)})
        if self.one_scale and state.adapter.scale.kind == "rslora" and len(ranks) > 1:
            raise ConfigError(
                f"lora.scale_rule = 'rslora' with ranks {ranks[0]} to {ranks[-1]}: {self.name} "
                "averages factors, whose scales differ then; use 'constant', or a method that "
                "averages products, such as flexlora"
            )
        for client in clients:
            self.objective(state, client)

    def broadcast(self, state: ServerState, client: Client) -> Broadcast:
        """The prefix of the client's rank."""
        return Broadcast(state.adapter.prefix(client.rank))

    def objective(self, state: ServerState, client: Client) -> Objective:
        """The method's own objective, unless the configuration asks for another."""
        return configured(self.config, client.rank, state.levels, default=self.default_objective)

    def aggregator(self, state: ServerState) -> Aggregator:
        """The mean of each rank dimension over its holders, finished by the method's `finish`."""
        return Averaging(state, weighting(self.config.weights), type(self).finish)

    def global_adapter(
        self, state: ServerState, rank: int | None = None, layers: Collection[str] | None = None
    ) -> LoraAdapter:
        """The prefix of this rank (None: the whole)."""
        whole = state.adapter
        return (whole if rank is None else whole.prefix(rank)).select(layers)


class ProductMethod(PrefixMethod):
    """Methods that average products: rank dimensions are singular triples in falling order.

    So the first r of them are the best approximation of rank r, with the product that they have
    within the whole.
    """

    one_scale: ClassVar[bool] = False

    def broadcast(self, state: ServerState, client: Client) -> Broadcast:
        """The best approximation of the client's rank."""
        return Broadcast(self.global_adapter(state, client.rank))

    def global_adapter(
        self, state: ServerState, rank: int | None = None, layers: Collection[str] | None = None
    ) -> LoraAdapter:
        """The best approximation of this rank (None: the whole)."""
        whole = state.adapter.select(layers)
        return whole if rank is None else between(whole, 0, rank)
