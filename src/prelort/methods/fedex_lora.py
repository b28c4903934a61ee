"""FedEx-LoRA (Singhal et al., arXiv 2410.09432) for mixed ranks: the residual makes averages exact.

FedIT's mean of the factors misses the mean of the products by a residual; FedEx folds it into every
client's base. For mixed ranks, our extension: A and B are averaged dimension by dimension over
their holders, and a client of rank r trains the first r dimensions with everything else of the
global function frozen beside it: the residual and the dimensions above r. With F_k that frozen
part,

    residual' = sum_k p_k (s B_k A_k + F_k) - s B' A'

so that the new global function is exactly the mean of the clients' functions. The residual is kept
as factors through QR and a small SVD, never as a d_out x d_in matrix, whole or cut to
``residual_rank``. At a rank, the best approximation of the global function is measured.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Annotated, ClassVar

import torch
from pydantic import Field

from prelort.adapters import Factors, LoraAdapter
from prelort.adapters.algebra import best_approximation, compress, concatenate
from prelort.aggregation.products import ProductSum, sum_products
from prelort.aggregation.rankwise_mean import RankwiseMean
from prelort.config import Section
from prelort.methods.averaging import Averaging, Weighting, weighting
from prelort.methods.interface import Broadcast, Client, ServerState, Update
from prelort.methods.memory import recall, store
from prelort.methods.prefix import PrefixMethod
from prelort.methods.selection import above, freeze, scale_multiplier_of

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
    one_scale: ClassVar[bool] = False
    Options: ClassVar[type[Section]] = FedExOptions

    def broadcast(self, state: ServerState, client: Client) -> Broadcast:
        """The prefix to train; the residual and the dimensions above it frozen."""
        whole = state.adapter
        residual = recall(state.memory, RESIDUAL, whole)
        rest = freeze(whole, above(client.rank, whole))
        parts = [part for part in (residual, rest) if part is not None]
        return Broadcast(
            whole.prefix(client.rank),
            frozen=sum_products(parts) if parts else None,
            scale_multiplier=scale_multiplier_of(whole, client.rank, self.name),
        )

    def aggregator(self, state: ServerState) -> WithResidual:
        """The means, and what they miss."""
        return WithResidual(
            state, weighting(self.config.weights), self.options.residual_rank, self.name
        )

    def global_adapter(
        self, state: ServerState, rank: int | None = None, layers: Collection[str] | None = None
    ) -> LoraAdapter:
        """The best approximation of adapter plus residual (None: their sum)."""
        adapter = state.adapter.select(layers)
        residual = recall(state.memory, RESIDUAL, adapter)
        if residual is None:
            return super().global_adapter(state, rank, layers)
        total = compress(concatenate([adapter.bare(), residual], [1.0, 1.0]))
        whole = replace(total, modules_to_save=adapter.modules_to_save)
        return whole if rank is None else best_approximation(whole, rank)


class WithResidual(Averaging):
    """Beside the dimensions' means, the mean of the clients' whole functions."""

    def __init__(self, state: ServerState, weight: Weighting, rank: int | None, name: str) -> None:
        super().__init__(state, weight, RankwiseMean.over_holders)
        self.rank = rank
        self.name = name
        self.products = ProductSum()

    def add(self, update: Update) -> None:
        """Fold in a reply's dimensions and its product."""
        super().add(update)
        multiplier = scale_multiplier_of(self.state.adapter, update.adapter.rank, self.name)
        product = update.adapter.bare().to(torch.float32).scaled(multiplier)
        self.products.add(product, self.weight(update))

    def result(self) -> ServerState:
        """The state after the round, its residual in the memory."""
        state = super().result()
        if self.products.total == 0:
            return state
        old, mean = self.state.adapter, self.products.mean()
        before = recall(self.state.memory, RESIDUAL, old)
        # What the clients trained, plus what each had frozen, minus what the adapter now is.
        parts, signs = [mean, self.frozen_above(old), state.adapter.bare()], [1.0, 1.0, -1.0]
        if before is not None:
            parts, signs = [*parts, before], [*signs, 1.0]
        residual = compress(concatenate(parts, signs))
        if self.rank is not None:
            residual = best_approximation(residual, self.rank)
        return replace(state, memory=store(RESIDUAL, residual))

    def frozen_above(self, old: LoraAdapter) -> LoraAdapter:
        """``sum_k p_k`` of the old dimensions above the rank of client k."""
        layers = {}
        for name, factors in old.layers.items():
            lacking = (1 - self.mean.weights[name] / self.mean.total).to(torch.float32)
            layers[name] = Factors(factors.A.float(), factors.B.float() * lacking)
        return LoraAdapter(layers, old.scale)
