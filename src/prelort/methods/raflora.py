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
from prelort.methods.averaging import AveragingProducts, weighting
from prelort.methods.flexlora import cut
from prelort.methods.interface import ServerState
from prelort.methods.prefix import ProductMethod


class RaFlora(ProductMethod):
    """SVD of the segment-wise mean of the products."""

    name: ClassVar[str] = "raflora"
    summary: ClassVar[str] = "averages each segment's products over their holders, then SVD"
    paper: ClassVar[str] = "raFLoRA 2026, arXiv 2602.13486"

    def aggregator(self, state: ServerState) -> AveragingProducts[SegmentSums]:
        """The segment-wise mean of the products, cut to the global rank."""
        old = state.adapter

        def finish(sums: SegmentSums) -> ServerState:
            parts = [
                segment.products.mean()
                if segment.products.total > 0
                else between(old, segment.low, segment.high).to(torch.float32)
                for segment in sums.segments
            ]
            product = replace(sum_products(parts), modules_to_save=parts[0].modules_to_save)
            return state.advanced(cut(product, old, "even", self.seed, state.round))

        sums = SegmentSums(state.levels, old.rank)
        return AveragingProducts(state, weighting(self.config.weights), sums, finish)
