"""FedRot-LoRA (arXiv 2602.23638): rotates the clients' factors onto each other before averaging.

B R and R^T A have the same product for every orthogonal R, so clients may drift apart in factors
whose products agree, and the mean of their factors misses the mean of the products. Each client's
factors are first rotated towards the global adapter that it received (orthogonal Procrustes): in
one round by A, in the next by B,

    R = argmin |R^T A_k - A|_F    or    argmin |B_k R - B|_F,

R = U V' of the SVD of A_k A^T or B_k^T B. In the first round B is zero, and nothing is rotated. For
mixed ranks, our extension: a client's first r dimensions are rotated towards the global ones, and
each dimension is averaged over its holders.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch

from prelort.adapters import Factors
from prelort.methods.averaging import Averaging, weighting
from prelort.methods.interface import ServerState, Update
from prelort.methods.prefix import PrefixMethod


class FedRotLora(PrefixMethod):
    """Rotate each client's factors towards the global ones, then average them."""

    name: ClassVar[str] = "fedrot-lora"
    summary: ClassVar[str] = "rotates factors towards the global ones before averaging them"
    paper: ClassVar[str] = "FedRot-LoRA 2026, arXiv 2602.23638"

    def aggregator(self, state: ServerState) -> Rotated:
        """Segment-wise means of the rotated factors."""
        return Rotated(state, weighting(self.config.weights), type(self).finish)


class Rotated(Averaging):
    """Rank-wise means of factors that are rotated first."""

    def add(self, update: Update) -> None:
        """Fold in a reply's rotated factors."""
        if self.state.round > 0:
            whole, by_a = self.state.adapter.layers, self.state.round % 2 == 1
            layers = {
                name: rotated(factors, whole[name].prefix(factors.rank), by_a)
                for name, factors in update.adapter.layers.items()
            }
            update = replace(update, adapter=replace(update.adapter, layers=layers))
        super().add(update)


def rotated(factors: Factors, reference: Factors, by_a: bool) -> Factors:
    """Factors of the same product, rotated so that A (or else B) comes nearest to the reference."""
    a, b = factors.A.double(), factors.B.double()
    overlap = a @ reference.A.double().T if by_a else b.T @ reference.B.double()
    left, _, right = torch.linalg.svd(overlap)
    rotation = left @ right
    return Factors((rotation.T @ a).float(), (b @ rotation).float())
