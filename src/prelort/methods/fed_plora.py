"""Fed-PLoRA (Zhang, Xu & Hu, arXiv 2602.16936): parallel one-rank modules, Select-N-Fold.

The global adapter is a sum of R one-rank modules, ``Delta W = s sum_j B_(j) A_(j)``. In round t a
client of rank r draws r of them, K; the others are folded into its frozen base,

    W = W0 + s sum_{j not in K} B_(j) A_(j),

so that it starts exactly at the global function. It trains and returns only K. Each module is then
averaged over the clients that trained it; one that nobody drew keeps its value.

The fold is a frozen second path beside the base: the weights are not touched, the base may be
quantised, and taking the fold out again is exact. All modules count at one scale, s(R), whatever
r is. The paper's notes leave the weights open (its bound has uniform ones): ``method.weights``.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from prelort.config import MethodConfig, Section
from prelort.methods.averaging import Averaging, weighting
from prelort.methods.interface import Broadcast, Client, ServerState
from prelort.methods.prefix import PrefixMethod
from prelort.methods.selection import (
    complement,
    find_order,
    freeze,
    scale_multiplier_of,
    select,
    take,
)


class FedPloraOptions(Section):
    """``[method.options.fed-plora]``."""

    selection: str = "uniform"
    """'uniform', 'in-turn', 'prefix' or 'module:function'."""


class FedPlora(PrefixMethod):
    """Clients train a random selection of modules with the rest folded into the base."""

    name: ClassVar[str] = "fed-plora"
    summary: ClassVar[str] = "clients train random rank dimensions, the rest folded into the base"
    paper: ClassVar[str] = "Fed-PLoRA, Zhang et al. 2026, arXiv 2602.16936"
    one_scale: ClassVar[bool] = False
    may_nest: ClassVar[bool] = False
    Options: ClassVar[type[Section]] = FedPloraOptions

    def __init__(self, config: MethodConfig, seed: int) -> None:
        super().__init__(config, seed)
        self.order = find_order(self.options.selection)

    def modules(self, state: ServerState, client: Client) -> dict[str, Tensor]:
        """K of one client and round: layer -> rank dimensions."""
        return select(self.order, self.seed, state.round, client, state.adapter)

    def broadcast(self, state: ServerState, client: Client) -> Broadcast:
        """The selected modules to train, all others frozen."""
        chosen = self.modules(state, client)
        return Broadcast(
            take(state.adapter, chosen),
            frozen=freeze(state.adapter, complement(chosen, state.adapter)),
            scale_multiplier=scale_multiplier_of(state.adapter, client.rank, self.name),
        )

    def aggregator(self, state: ServerState) -> Averaging:
        """Each module's mean over the clients that trained it."""
        return Averaging(
            state,
            weighting(self.config.weights),
            type(self).finish,
            dimensions_of=lambda client: self.modules(state, client),
        )
