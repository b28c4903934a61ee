"""raFLoRA (arXiv 2602.13486): the product-space counterpart of segment-wise averaging.

The configured ranks cut the slots into segments (l, h]. Each segment's product is averaged over the
clients that hold it,

    Delta W = sum_h sum_{k: r_k >= h} (n_k / N_h) s B_k[:, l:h] A_k[l:h],   N_h = sum_{r_k >= h} n_k

which is again a stack of factors, each slot with a weight of its own; its SVD at the global rank,
singular values split evenly, is the new adapter, of which clients receive prefixes. A segment that
nobody holds this round keeps its old product (our reading; the notes do not say).
"""

from __future__ import annotations

from typing import ClassVar

import torch

from prelort.adapters import Factors, LoraAdapter
from prelort.adapters.algebra import concatenate
from prelort.methods.flexlora import cut
from prelort.methods.interface import ServerState, Update
from prelort.methods.products import ProductMethod
from prelort.methods.slot_mean import Weighting, weighting


class RaFlora(ProductMethod):
    """SVD of the segment-wise mean of the products."""

    name: ClassVar[str] = "raflora"
    summary: ClassVar[str] = "averages each segment's products over their holders, then SVD"
    paper: ClassVar[str] = "raFLoRA 2026, arXiv 2602.13486"

    def aggregator(self, state: ServerState) -> SegmentProducts:
        """The segment-wise mean of the products, cut to the global rank."""
        return SegmentProducts(state, weighting(self.config.weights), self.seed)


class SegmentProducts:
    """Keeps the replies until the weight that each slot has received is known."""

    def __init__(self, state: ServerState, weight: Weighting, seed: int) -> None:
        self.state = state
        self.weight = weight
        self.seed = seed
        self.replies: list[tuple[LoraAdapter, float]] = []

    def add(self, update: Update) -> None:
        """Keep a reply."""
        if (weight := self.weight(update)) > 0:
            self.replies.append((update.adapter, weight))

    def result(self) -> ServerState:
        """The state after the round; its adapter is the old one where no reply had a weight."""
        old = self.state.adapter
        if not self.replies:
            return ServerState(old, self.state.round + 1, self.state.memory)
        held = {name: self._held(name, factors.rank) for name, factors in old.layers.items()}
        parts = [_weighted(adapter, weight, held) for adapter, weight in self.replies]
        shares = [weight / sum(w for _, w in self.replies) for _, weight in self.replies]
        # Extras are averaged by the shares, while the slots bring their own weights.
        bare = [LoraAdapter(part.layers, part.scale) for part in (*parts, _unheld(old, held))]
        product = concatenate(bare, [1.0] * len(bare))
        extras = concatenate(parts, shares).extras
        product = LoraAdapter(product.layers, product.scale, extras)
        adapter = cut(product, old, "even", self.seed, self.state.round)
        return ServerState(adapter, self.state.round + 1, self.state.memory)

    def _held(self, name: str, rank: int) -> torch.Tensor:
        """The weight [rank] that each slot of a layer has received."""
        total = torch.zeros(rank, dtype=torch.float64)
        for adapter, weight in self.replies:
            total[: adapter.layers[name].rank] += weight
        return total


def _weighted(adapter: LoraAdapter, weight: float, held: dict[str, torch.Tensor]) -> LoraAdapter:
    """The reply with each slot's product times the client's share of those who hold it."""
    layers = {
        name: Factors(f.A.float(), f.B.float() * (weight / held[name][: f.rank]).float())
        for name, f in adapter.layers.items()
    }
    return LoraAdapter(layers, adapter.scale, {n: t.float() for n, t in adapter.extras.items()})


def _unheld(old: LoraAdapter, held: dict[str, torch.Tensor]) -> LoraAdapter:
    """The old slots that nobody holds this round; the others are zero."""
    layers = {
        name: Factors(f.A.float(), f.B.float() * (held[name] == 0))
        for name, f in old.layers.items()
    }
    return LoraAdapter(layers, old.scale)
