"""HetLoRA (Cho et al., arXiv 2401.06432): zero-padding weighted by norm, and self-pruning.

Client: receives the prefix of its rank r, minimises ``loss + lambda |B[:, q:]| |A[q:]|`` with
q = floor(gamma r), and goes on with rank q if training has made that tail smaller. Server:

    A = sum_k p_k pad(A_k),   p_k = |B_k A_k|_F / sum_j |B_j A_j|_F       (likewise B)

The norms come from Gram matrices. Not found in the paper's notes, so our reading: the norm is of
the whole model, the penalty is a sum over layers, gamma also stands for the pruned share, lambda's
default; the rank never falls below the lowest of the federation.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, ClassVar

from pydantic import Field

from prelort.adapters.algebra import norm
from prelort.aggregation.rankwise_mean import RankwiseMean
from prelort.config import Section
from prelort.methods.averaging import Averaging
from prelort.methods.interface import Client, ServerState, Update
from prelort.methods.objective import Objective, TailPenalty
from prelort.methods.prefix import PrefixMethod


class HetLoraOptions(Section):
    """``[method.options.hetlora]``."""

    gamma: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.99
    penalty: Annotated[float, Field(ge=0.0)] = 1e-3


class HetLora(PrefixMethod):
    """Norm-weighted zero-padding; clients prune their own rank."""

    name: ClassVar[str] = "hetlora"
    summary: ClassVar[str] = "zero-padding weighted by each product's norm; clients prune ranks"
    paper: ClassVar[str] = "HetLoRA, Cho et al. 2024, arXiv 2401.06432"
    Options: ClassVar[type[Section]] = HetLoraOptions

    def objective(self, state: ServerState, client: Client) -> Objective:
        """Ordinary training with the tail's penalty; an adapter of one dimension has no tail."""
        tail = TailPenalty(self.options.penalty, self.options.gamma, state.levels[0])
        objective = super().objective(state, client)
        return replace(objective, tail=tail) if client.rank > 1 else objective

    def aggregator(self, state: ServerState) -> Averaging:
        """Zero-padding with the products' norms as weights."""
        return Averaging(state, by_norm, RankwiseMean.over_everyone)


def by_norm(update: Update) -> float:
    """``|s B_k A_k|_F`` over all layers."""
    return norm(update.adapter)
