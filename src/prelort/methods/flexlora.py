"""FlexLoRA (Bai et al., arXiv 2402.11505) and HLoRA (arXiv 2503.00813): average the products.

    Delta W = sum_k p_k s B_k A_k,    Delta W = U S V',

and a client of rank r receives the best approximation of its rank: ``B = U_r S_r, A = V_r'``
(FlexLoRA) or ``B = U_r, A = S_r V_r'`` (HLoRA). Scales are folded into the products and divided out
again. The SVD is that of the stacked factors (QR, then a small core).

Directions that the round's products do not have (singular value 0) get a drawn A with B = 0: the
function is the same, and the dimensions can learn.
"""

from __future__ import annotations

from typing import ClassVar

from prelort.adapters import Factors, LoraAdapter
from prelort.adapters.algebra import Split, best_approximation
from prelort.adapters.initial import filled
from prelort.aggregation.products import ProductSum
from prelort.methods.averaging import AveragingProducts, weighting
from prelort.methods.interface import Aggregator, ServerState
from prelort.methods.prefix import ProductMethod
from prelort.seeds import derive


class FlexLora(ProductMethod):
    """SVD of the mean product; singular values go to B."""

    name: ClassVar[str] = "flexlora"
    summary: ClassVar[str] = "averages the products; clients get the SVD cut to their rank"
    paper: ClassVar[str] = "FlexLoRA, Bai et al. 2024, arXiv 2402.11505"
    split: ClassVar[Split] = "B"

    def aggregator(self, state: ServerState) -> Aggregator:
        """The best approximation, at the global rank, of the mean product."""

        def finish(products: ProductSum) -> ServerState:
            mean, old = products.mean(), state.adapter
            return state.advanced(cut(mean, old, self.split, self.seed, state.round))

        return AveragingProducts(state, weighting(self.config.weights), ProductSum(), finish)


class HLora(FlexLora):
    """SVD of the mean product; singular values go to A."""

    name: ClassVar[str] = "hlora"
    summary: ClassVar[str] = "as flexlora, with the singular values in A"
    paper: ClassVar[str] = "HLoRA 2025, arXiv 2503.00813"
    split: ClassVar[Split] = "A"


def cut(
    product: LoraAdapter, like: LoraAdapter, split: Split, seed: int, round_index: int
) -> LoraAdapter:
    """The best approximation at the ranks of ``like``; empty directions get a drawn A."""
    near = best_approximation(product, like.rank, split)
    layers: dict[str, Factors] = {}
    for name, factors in near.layers.items():
        dimensions = like.layers[name].rank
        # The dimensions count at the scale of the rank that the layer has in the end.
        ratio = near.scale(factors.rank) / near.scale(dimensions)
        to_a, to_b = {"even": (0.5, 0.5), "A": (1.0, 0.0), "B": (0.0, 1.0)}[split]
        first = factors.prefix(dimensions)
        layers[name] = Factors(first.A * ratio**to_a, first.B * ratio**to_b)
    alive = _alive(LoraAdapter(layers, near.scale, near.modules_to_save))
    return filled(alive, like, derive(seed, "empty directions", round_index))


def _alive(adapter: LoraAdapter) -> LoraAdapter:
    """The rank dimensions of each layer that are not zero; at least the first one."""
    layers = {}
    for name, factors in adapter.layers.items():
        energy = factors.A.norm(dim=1) * factors.B.norm(dim=0)
        floor = 1e-6 * energy.max()
        layers[name] = factors.prefix(max(1, int((energy > floor).sum())))
    return LoraAdapter(layers, adapter.scale, adapter.modules_to_save)
