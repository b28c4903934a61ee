"""Sorted prefixes: our extension of PreLort where clients of high rank are few (tail problem).

Averaging slots lets a tail segment become whatever the one or two clients who hold it and happen to
take part have made of it. Here the server works on products, on changes, and sorts:

    Delta W  <-  Delta W + sum_j eta_j sum_{k: r_k >= j} (w_k / N_j) (P_kj - P_j)
    N_j = sum_{k: r_k >= j} w_k,   eta_j = m_j ** step,   m_j = N_j^2 / sum_{k: r_k >= j} w_k^2

with P_j = s B_j A_j the product of slot j as it was broadcast and P_kj as client k returned it. A
slot that a client lacks is no change there. The mean of m independent changes is shorter than they
are, so a slot's step grows with the number m_j of clients (counted by weight) that agree on it: the
many-handed prefix moves on quickly, the tail of a single client is not extrapolated. The sum is
stacked factors; its SVD at the global rank, singular values split evenly, becomes the new adapter.
So the slots are sorted by strength after every round, whoever trained them, and any prefix is the
best approximation of its rank.

A client trains its prefix alone, or, in a drawn share ``presence`` of the rounds, in the presence
of the slots above its rank, which are folded into its base: alone makes good prefixes, in presence
makes a good whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from prelort.adapters import Factors, LoraAdapter
from prelort.adapters.algebra import concatenate
from prelort.config import Section
from prelort.methods.flexlora import cut
from prelort.methods.interface import Broadcast, Client, ServerState, Update
from prelort.methods.products import ProductMethod
from prelort.methods.selection import folded
from prelort.methods.slot_mean import Weighting, weighting
from prelort.seeds import numpy_generator


class SortedOptions(Section):
    """``[method.options.prelort-sorted]``."""

    step: Annotated[float, Field(ge=0.0, le=0.5)] = 0.2
    presence: Annotated[float, Field(ge=0.0, le=1.0)] = 0.3


class PreLortSorted(ProductMethod):
    """Changes averaged segment by segment as products, slots sorted by SVD."""

    name: ClassVar[str] = "prelort-sorted"
    summary: ClassVar[str] = "our extension: averages changes as products, sorts slots by strength"
    paper: ClassVar[str] = "this project, after arXiv 2606.15963 and 2602.13486"
    Options: ClassVar[type[Section]] = SortedOptions

    def broadcast(self, state: ServerState, client: Client) -> Broadcast:
        """The prefix of the client's rank; in a share of the rounds, the other slots frozen."""
        frozen = None
        if self._in_presence(state, client):
            layers = state.adapter.layers
            above = {n: torch.arange(min(client.rank, f.rank), f.rank) for n, f in layers.items()}
            frozen = folded(state.adapter, above)
        return Broadcast(self.readout(state, client.rank), frozen=frozen)

    def aggregator(self, state: ServerState) -> Changes:
        """The mean change of each slot, with its step, sorted into the new adapter."""
        return Changes(state, weighting(self.config.weights), self.options.step, self.seed)

    def _in_presence(self, state: ServerState, client: Client) -> bool:
        drawn = numpy_generator(self.seed, "presence", client.name, state.round).random()
        return bool(drawn < self.options.presence)


class Changes:
    """Keeps the replies until the weight that each slot has received is known."""

    def __init__(self, state: ServerState, weight: Weighting, step: float, seed: int) -> None:
        self.state = state
        self.weight = weight
        self.step = step
        self.seed = seed
        self.replies: list[tuple[LoraAdapter, float]] = []

    def add(self, update: Update) -> None:
        """Keep a reply."""
        if (weight := self.weight(update)) > 0:
            self.replies.append((update.adapter.to(torch.float32), weight))

    def result(self) -> ServerState:
        """The state after the round; its adapter is the old one where no reply had a weight."""
        old = self.state.adapter
        if not self.replies:
            return ServerState(old, self.state.round + 1, self.state.memory)
        weights = [weight for _, weight in self.replies]
        parts: dict[str, Factors] = {}
        for name, factors in old.layers.items():
            ranks = [adapter.layers[name].rank for adapter, _ in self.replies]
            kept, shares = steps(factors.rank, ranks, weights, self.step)
            whole = LoraAdapter({name: _times(factors, kept)}, old.scale)
            replied = [
                LoraAdapter({name: _times(adapter.layers[name], share)}, old.scale)
                for (adapter, _), share in zip(self.replies, shares, strict=True)
            ]
            stack = concatenate([whole, *replied], [1.0] * (len(replied) + 1))
            parts[name] = stack.layers[name]
        product = LoraAdapter(parts, old.scale, self._extras(weights))
        adapter = cut(product, old, "even", self.seed, self.state.round)
        return ServerState(adapter, self.state.round + 1, self.state.memory)

    def _extras(self, weights: Sequence[float]) -> dict[str, Tensor]:
        """What is trained in full has no slots: its weighted mean."""
        bare = [LoraAdapter({}, a.scale, a.extras) for a, _ in self.replies]
        return dict(concatenate(bare, [weight / sum(weights) for weight in weights]).extras)


def steps(
    slots: int, ranks: Sequence[int], weights: Sequence[float], step: float
) -> tuple[Tensor, list[Tensor]]:
    """What each slot keeps of its old product [slots], and takes of each reply's [rank of it].

    Both float64. A slot that nobody holds keeps 1; else it keeps ``1 - eta`` and takes
    ``eta w_k / N`` of reply k.
    """
    held = torch.zeros(slots, dtype=torch.float64)
    squares = torch.zeros(slots, dtype=torch.float64)
    for rank, weight in zip(ranks, weights, strict=True):
        held[:rank] += weight
        squares[:rank] += weight**2
    nobody = held == 0
    hands = torch.where(nobody, 1.0, held.square() / squares.clamp(min=1e-300))
    eta = torch.where(nobody, 0.0, hands**step)
    taken = [eta[:rank] * weight / held[:rank] for rank, weight in zip(ranks, weights, strict=True)]
    return 1 - eta, taken


def _times(factors: Factors, weights: Tensor) -> Factors:
    """Each slot's product times its weight."""
    return Factors(factors.A, factors.B * weights.to(factors.B.dtype))
