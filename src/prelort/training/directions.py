"""Factors trained as directions of length 1 and magnitudes (FedRoRA, arXiv 2609.00632, eq. 4-6)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize


class UnitDirections:
    """``B A = B~ S A~`` with unit columns of B~, unit rows of A~ and a diagonal S, all trained.

    The model keeps the factors, as A = A~ and B = B~ S: `take_gradients` passes their gradients on
    to the three, and `write_factors` computes them again after a step. Gradients go through the
    normalisation, so that what changes the length of a direction alone has none.

    Args:
        a: A of each layer [r, d_in], whose rows have length 1.
        b: B of each layer [d_out, r]; the magnitudes S are the lengths of its columns.
    """

    def __init__(self, a: Sequence[nn.Parameter], b: Sequence[nn.Parameter]) -> None:
        self._factors = [*a, *b]
        self.rows = [nn.Parameter(normalize(one.detach(), dim=1)) for one in a]
        self.columns = [nn.Parameter(normalize(one.detach(), dim=0)) for one in b]
        self.magnitudes = [nn.Parameter(one.detach().norm(dim=0)) for one in b]

    def take_gradients(self) -> None:
        """Turn the factors' gradients into those of directions and magnitudes."""
        for made, factor in zip(self._made(), self._factors, strict=True):
            if factor.grad is not None:
                torch.autograd.backward(made, factor.grad)
                factor.grad = None

    @torch.no_grad()
    def write_factors(self) -> None:
        """Make the factors those of the directions and magnitudes."""
        for made, factor in zip(self._made(), self._factors, strict=True):
            factor.copy_(made)

    def _made(self) -> list[Tensor]:
        """The factors, in their order."""
        pairs = zip(self.columns, self.magnitudes, strict=True)
        return [
            *(normalize(row, dim=1) for row in self.rows),
            *(normalize(column, dim=0) * magnitude for column, magnitude in pairs),
        ]
