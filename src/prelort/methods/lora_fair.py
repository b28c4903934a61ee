"""LoRA-FAIR (Bian et al., arXiv 2411.14961): corrects the mean of B so that the product is right.

With A' and B' the means of the clients' factors (missing dimensions count as zeros) and M the mean
of their products B_k A_k, the server broadcasts A' and B' + D, where D solves

    min_D  |(B' + D) A' - M|^2 + penalty |D|^2

that is D = (M - B' A') A'^T (A' A'^T + penalty I)^-1. The paper measures the distance by cosine
similarity and minimises it by gradient descent; the Frobenius norm has this closed form (our
reading).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from prelort.adapters import Factors, LoraAdapter, ScaleRule
from prelort.adapters.algebra import concatenate
from prelort.aggregation.products import ProductSum
from prelort.aggregation.rankwise_mean import RankwiseMean
from prelort.config import Section
from prelort.methods.averaging import Averaging, Weighting, weighting
from prelort.methods.interface import ServerState, Update
from prelort.methods.prefix import PrefixMethod


class LoraFairOptions(Section):
    """``[method.options.lora-fair]``: how strongly B is held at the clients' mean."""

    penalty: Annotated[float, Field(gt=0.0)] = 0.01


class LoraFair(PrefixMethod):
    """The mean of A, and the mean of B corrected towards the mean product."""

    name: ClassVar[str] = "lora-fair"
    summary: ClassVar[str] = "averages factors, then corrects B towards the mean of the products"
    paper: ClassVar[str] = "LoRA-FAIR, Bian et al. 2024, arXiv 2411.14961"
    Options: ClassVar[type[Section]] = LoraFairOptions

    def aggregator(self, state: ServerState) -> Corrected:
        """The means of the factors, B corrected."""
        return Corrected(state, weighting(self.config.weights), self.options.penalty)


class Corrected(Averaging):
    """Beside the means of the factors, the mean of the products."""

    def __init__(self, state: ServerState, weight: Weighting, penalty: float) -> None:
        super().__init__(state, weight, RankwiseMean.over_everyone)
        self.penalty = penalty
        self.products = ProductSum()

    def add(self, update: Update) -> None:
        """Fold in a reply's factors and its product."""
        super().add(update)
        self.products.add(unscaled(update.adapter), self.weight(update))

    def result(self) -> ServerState:
        """The state after the round; its adapter is the old one where no reply had a weight."""
        state = super().result()
        if self.products.total == 0:
            return state
        mean = self.products.mean()
        # A dimension that nobody held keeps its value, and is none of the means.
        ranks = {name: int((weight > 0).sum()) for name, weight in self.mean.weights.items()}
        means = {name: f.prefix(ranks[name]) for name, f in state.adapter.layers.items()}
        missed = concatenate([mean, LoraAdapter(means, mean.scale)], [1.0, -1.0])
        layers = {}
        for name, factors in state.adapter.layers.items():
            b = factors.B.clone()
            b[:, : ranks[name]] += correction(means[name], missed.layers[name], self.penalty)
            layers[name] = Factors(factors.A, b)
        return replace(state, adapter=replace(state.adapter, layers=layers))


def unscaled(adapter: LoraAdapter) -> LoraAdapter:
    """Its factors with the products B A, whatever its scale: the means are of factors."""
    return LoraAdapter(adapter.layers, ScaleRule("constant", 1.0))


def correction(mean: Factors, missed: Factors, penalty: float) -> Tensor:
    """D [d_out, r] of one layer: ``missed`` is the product that the means of the factors lack."""
    a = mean.A.double()
    gram = a @ a.T + penalty * torch.eye(len(a), dtype=a.dtype, device=a.device)
    solved: Tensor = torch.linalg.solve(gram, a @ missed.A.double().T)
    return (solved @ missed.B.double().T).T.to(mean.B.dtype)
