"""FedMomentum (arXiv 2603.08014): the mean product by SVD; what that misses stays in the base.

    Delta W = sum_k p_k s B_k A_k = U S V'

The first R singular triples, their values split evenly, are the new adapter. The others are folded
into every client's base, up to a share ``energy`` of all energy, instead of being thrown away as in
FlexLoRA: so no client's progress is lost. For mixed ranks, our extension as in `fedex_lora`: a
client of rank r trains the first r dimensions, with everything else of the global function frozen
beside it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, ClassVar

from pydantic import Field

from prelort.adapters.algebra import compress, concatenate
from prelort.config import Section
from prelort.methods.averaging import Averaging, Weighting, weighting
from prelort.methods.fedex_lora import RESIDUAL, FedExLora, WithResidual
from prelort.methods.flexlora import cut
from prelort.methods.interface import ServerState
from prelort.methods.memory import recall, store


class FedMomentumOptions(Section):
    """``[method.options.fedmomentum]``: the share of the energy that the sum keeps."""

    energy: Annotated[float, Field(gt=0.0, le=1.0)] = 0.9999


class FedMomentum(FedExLora):
    """SVD of the mean product, and a residual that makes it exact."""

    name: ClassVar[str] = "fedmomentum"
    summary: ClassVar[str] = "SVD of the mean product; what it misses is folded into the base"
    paper: ClassVar[str] = "FedMomentum 2026, arXiv 2603.08014"
    Options: ClassVar[type[Section]] = FedMomentumOptions

    def aggregator(self, state: ServerState) -> SvdWithResidual:
        """The SVD of the mean product, and the rest."""
        weight = weighting(self.config.weights)
        return SvdWithResidual(state, weight, self.options.energy, self.name, self.seed)


class SvdWithResidual(WithResidual):
    """The mean of the clients' whole functions, cut to the global rank, and what is beyond."""

    def __init__(
        self, state: ServerState, weight: Weighting, energy: float, name: str, seed: int
    ) -> None:
        super().__init__(state, weight, None, name)
        self.energy = energy
        self.seed = seed

    def result(self) -> ServerState:
        """The state after the round, its residual in the memory."""
        old = self.state.adapter
        if self.products.total == 0:
            return self.state.advanced(old)
        trained = self.products.mean()
        function = compress(concatenate([trained, self.frozen_above(old)], [1.0, 1.0]), self.energy)
        modules_to_save = Averaging.result(self).adapter.modules_to_save
        whole = replace(function, modules_to_save=modules_to_save)
        adapter = cut(whole, old, "even", self.seed, self.state.round)
        parts, signs = [function, adapter.bare()], [1.0, -1.0]
        before = recall(self.state.memory, RESIDUAL, old)
        if before is not None:
            parts, signs = [*parts, before], [*signs, 1.0]
        residual = compress(concatenate(parts, signs))
        return self.state.advanced(adapter, store(RESIDUAL, residual))
