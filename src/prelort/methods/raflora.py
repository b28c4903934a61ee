"""raFLoRA (arXiv 2602.13486): the product-space counterpart of segment-wise averaging.

The configured ranks cut the dimensions into segments (l, h]. Each segment's product is averaged
over the clients that hold it,

    Delta W = sum_h sum_{k: r_k >= h} (n_k / N_h) s B_k[:, l:h] A_k[l:h],   N_h = sum_{r_k >= h} n_k

which is again a stack of factors, each dimension with a weight of its own; its SVD at the global
rank, singular values split evenly, is the new adapter, of which clients receive prefixes. A segment
that nobody holds this round keeps its old product (our reading; the notes do not say).
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch

from prelort.aggregation.products import SegmentSums, between, sum_products
from prelort.methods.averaging import Weighting, weighting
from prelort.methods.flexlora import cut
from prelort.methods.interface import ServerState, Update
from prelort.methods.prefix import ProductMethod


class RaFlora(ProductMethod):
    """SVD of the segment-wise mean of the products."""

    name: ClassVar[str] = "raflora"
    summary: ClassVar[str] = "averages each segment's products over their holders, then SVD"
    paper: ClassVar[str] = "raFLoRA 2026, arXiv 2602.13486"

    def aggregator(self, state: ServerState) -> SegmentProducts:
        """The segment-wise mean of the products, cut to the global rank."""
        return SegmentProducts(state, weighting(self.config.weights), self.seed)


class SegmentProducts:
    """The sum of each segment's products, divided by the weight of its holders at the end."""

    def __init__(self, state: ServerState, weight: Weighting, seed: int) -> None:
        self.state = state
        self.weight = weight
        self.seed = seed
        self.sums = SegmentSums(state.levels, state.adapter.rank)

    def add(self, update: Update) -> None:
        """Fold in a reply's product, segment by segment."""
        self.sums.add(update.adapter, self.weight(update))

    def result(self) -> ServerState:
        """The state after the round; its adapter is the old one where no reply had a weight."""
        old = self.state.adapter
        means = [(segment, segment.products.mean()) for segment in self.sums.segments]
        everyones = means[0][1]
        if everyones is None:
            return self.state.advanced(old)
        parts = [
            between(old, segment.low, segment.high).to(torch.float32) if mean is None else mean
            for segment, mean in means
        ]
        product = replace(sum_products(parts), modules_to_save=everyones.modules_to_save)
        adapter = cut(product, old, "even", self.seed, self.state.round)
        return self.state.advanced(adapter)
