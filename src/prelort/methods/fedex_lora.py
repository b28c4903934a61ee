"""FedEx-LoRA (Singhal et al., arXiv 2410.09432) for mixed ranks: the residual makes averages exact.

FedIT's mean of the factors misses the mean of the products by a residual; FedEx folds it into every
client's base. For mixed ranks, our extension: A and B are averaged slot by slot over their holders,
and a client of rank r trains the first r slots with everything else of the global function frozen
beside it: the residual and the slots above r. With F_k that frozen part,

    residual' = sum_k p_k (s B_k A_k + F_k) - s B' A'

so that the new global function is exactly the mean of the clients' functions. The residual is kept
as factors through QR and a small SVD, never as a d_out x d_in matrix, whole or cut to
``residual_rank``. At a rank, the best approximation of the global function is measured.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, ClassVar

import torch
from pydantic import Field

from prelort.adapters import Factors, LoraAdapter
from prelort.adapters.algebra import best_approximation, compressed, concatenate
from prelort.aggregation.products import ProductSum, summed
from prelort.aggregation.rankwise_mean import RankwiseMean
from prelort.config import Section
from prelort.methods.averaging import Averaging, Weighting, weighting
from prelort.methods.interface import Broadcast, Client, ServerState, Update
from prelort.methods.prefix import PrefixMethod
from prelort.methods.product_method import memorised, remembered
from prelort.methods.selection import folded, scale_multiplier_of

RESIDUAL = "residual"
"""The key of the residual in the server's memory."""


class FedExOptions(Section):
    """``[method.options.fedex-lora]``: the residual's largest rank; not set: all of it."""

    residual_rank: Annotated[int, Field(ge=1)] | None = None


class FedExLora(PrefixMethod):
    """Segment-wise means of the factors, and a low-rank residual that makes them exact."""

    name: ClassVar[str] = "fedex-lora"
    summary: ClassVar[str] = "averages factors, and folds what that misses into everyone's base"
    paper: ClassVar[str] = "FedEx-LoRA, Singhal et al. 2024, arXiv 2410.09432"
    Options: ClassVar[type[Section]] = FedExOptions

    def broadcast(self, state: ServerState, client: Client) -> Broadcast:
        """The prefix to train; the residual and the slots above it frozen."""
        whole = state.adapter
        above = {n: torch.arange(min(client.rank, f.rank), f.rank) for n, f in whole.layers.items()}
        residual = remembered(state.memory, RESIDUAL, whole)
        parts = [part for part in (residual, folded(whole, above)) if part is not None]
        scale_multiplier = scale_multiplier_of(whole.scale, whole, client.rank, self.name)
        return Broadcast(
            whole.prefix(client.rank),
            frozen=summed(parts) if parts else None,
            scale_multiplier=scale_multiplier,
        )

    def aggregator(self, state: ServerState) -> WithResidual:
        """The means, and what they miss."""
        return WithResidual(
            state, weighting(self.config.weights), self.options.residual_rank, self.name
        )

    def global_adapter(self, state: ServerState, rank: int | None = None) -> LoraAdapter:
        """The best approximation of adapter plus residual (None: their sum)."""
        residual = remembered(state.memory, RESIDUAL, state.adapter)
        if residual is None:
            return state.adapter if rank is None else state.adapter.prefix(rank)
        bare = replace(state.adapter, modules_to_save={})
        whole = replace(
            compressed(concatenate([bare, residual], [1.0, 1.0])),
            modules_to_save=state.adapter.modules_to_save,
        )
        return whole if rank is None else best_approximation(whole, rank)


class WithResidual(Averaging):
    """Beside the slots' means, the mean of the clients' whole functions."""

    def __init__(self, state: ServerState, weight: Weighting, rank: int | None, name: str) -> None:
        super().__init__(state, weight, RankwiseMean.over_holders)
        self.rank = rank
        self.name = name
        self.products = ProductSum()

    def add(self, update: Update) -> None:
        """Fold in a reply's slots and its product."""
        super().add(update)
        whole = self.state.adapter
        scale_multiplier = scale_multiplier_of(whole.scale, whole, update.adapter.rank, self.name)
        product = (
            replace(update.adapter, modules_to_save={}).to(torch.float32).scaled(scale_multiplier)
        )
        self.products.add(product, self.weight(update))

    def result(self) -> ServerState:
        """The state after the round, its residual in the memory."""
        state = super().result()
        old, mean = self.state.adapter, self.products.mean()
        if mean is None:
            return state
        before = remembered(self.state.memory, RESIDUAL, old)
        bare = replace(state.adapter, modules_to_save={})
        # What the clients trained, plus what each had frozen, minus what the adapter now is.
        parts, signs = [mean, self._kept_by_those_who_lack(old), bare], [1.0, 1.0, -1.0]
        if before is not None:
            parts, signs = [*parts, before], [*signs, 1.0]
        residual = compressed(concatenate(parts, signs))
        if self.rank is not None:
            residual = best_approximation(residual, self.rank)
        return replace(state, memory=memorised(RESIDUAL, residual))

    def _kept_by_those_who_lack(self, old: LoraAdapter) -> LoraAdapter:
        """``sum_k p_k`` of the old slots above the rank of client k."""
        layers = {}
        for name, factors in old.layers.items():
            lacking = (1 - self.mean.held[name] / self.mean.total).to(torch.float32)
            layers[name] = Factors(factors.A.float(), factors.B.float() * lacking)
        return LoraAdapter(layers, old.scale)
