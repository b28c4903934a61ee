"""FLoRA (Wang et al., arXiv 2409.05976) and FLoRIST (arXiv 2506.09199): stack, fold, restart.

    A = [p_1 A_1; ...; p_K A_K],  B = [B_1, ..., B_K],  B A = sum_k p_k B_k A_k     (exactly)

The stack is folded into every client's base, and the next round trains a new random adapter.
FLoRIST sends, instead of the stack, the fewest singular triples that keep a share ``energy`` of the
stack's energy; with ``energy = 1`` it is FLoRA.

In the paper every client receives the stack of every round, whether it takes part or not, and folds
it in for good. Here a client keeps nothing: it receives the sum of all stacks so far, compressed
without loss, as a frozen second path. That is what is counted as sent. Fresh adapters are drawn
from the seed and do not travel. There are no prefixes: at a rank, the sum's best approximation is
measured; whole, it has as many dimensions as it needs.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Annotated, ClassVar

from pydantic import Field

from prelort.adapters import LoraAdapter
from prelort.adapters.algebra import best_approximation, compress, concatenate
from prelort.adapters.initial import fresh
from prelort.aggregation.products import ProductSum
from prelort.config import Section
from prelort.methods.averaging import AveragingProducts, weighting
from prelort.methods.interface import Broadcast, Client, ServerState
from prelort.methods.memory import recall, store
from prelort.methods.prefix import PrefixMethod
from prelort.seeds import derive

FOLDED = "folded"
"""The key of the sum of all rounds in the server's memory."""


class Flora(PrefixMethod):
    """Exact sums of products, folded into the base each round."""

    name: ClassVar[str] = "flora"
    summary: ClassVar[str] = "stacks all adapters, folds the stack into the base, starts anew"
    paper: ClassVar[str] = "FLoRA, Wang et al. 2024, arXiv 2409.05976"
    one_scale: ClassVar[bool] = False
    may_nest: ClassVar[bool] = False

    def energy(self) -> float:
        """The share of a round's energy that is kept."""
        return 1.0

    def broadcast(self, state: ServerState, client: Client) -> Broadcast:
        """A fresh adapter, and everything learnt so far as a frozen path."""
        seed = derive(self.seed, "fresh adapter", state.round, client.name)
        return Broadcast(
            fresh(state.adapter, seed).prefix(client.rank),
            frozen=recall(state.memory, FOLDED, state.adapter),
            seeded_factors="A and B",
            factor_seed=seed,
        )

    def aggregator(self, state: ServerState) -> AveragingProducts[ProductSum]:
        """The stack of the replies, added to what is folded already."""

        def finish(products: ProductSum) -> ServerState:
            stack = products.mean()
            if self.energy() < 1:
                stack = compress(stack, self.energy())
            before, bare = recall(state.memory, FOLDED, state.adapter), stack.bare()
            total = bare if before is None else concatenate([before, bare], [1.0, 1.0])
            # A sum that is no wider than its layers needs no SVD, which would only take time.
            if any(f.rank > min(f.A.shape[1], f.B.shape[0]) for f in total.layers.values()):
                total = compress(total)
            adapter = replace(state.adapter, modules_to_save=stack.modules_to_save)
            return state.advanced(adapter, store(FOLDED, total))

        return AveragingProducts(state, weighting(self.config.weights), ProductSum(), finish)

    def global_adapter(
        self, state: ServerState, rank: int | None = None, layers: Collection[str] | None = None
    ) -> LoraAdapter:
        """The best approximation of the sum of all rounds (None: the sum)."""
        adapter = state.adapter.select(layers)
        total = recall(state.memory, FOLDED, adapter)
        if total is None:
            return super().global_adapter(state, rank, layers)
        whole = replace(total, modules_to_save=adapter.modules_to_save)
        return whole if rank is None else best_approximation(whole, rank)


class FloristOptions(Section):
    """``[method.options.florist]``: the share of the energy that is kept (ours: 0.95)."""

    energy: Annotated[float, Field(gt=0.0, le=1.0)] = 0.95


class Florist(Flora):
    """FLoRA whose stack is cut to the singular triples that matter."""

    name: ClassVar[str] = "florist"
    summary: ClassVar[str] = "as flora, with the stack cut to a share of its energy"
    paper: ClassVar[str] = "FLoRIST 2025, arXiv 2506.09199"
    Options: ClassVar[type[Section]] = FloristOptions

    def energy(self) -> float:
        """The share of a round's energy that is kept."""
        return float(self.options.energy)
