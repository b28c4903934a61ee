"""Sums of rank-one products, and their inner products, without a matrix of a layer's size.

A product ``B A`` is the sum of its rank dimensions, column j of B times row j of A. The inner
product of two of them is that of their columns times that of their rows, so that one matrix over
all rank dimensions of a layer, ``(B'B) * (A A')``, gives the norm of any sum of them, and of any
difference, from its coefficients alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from prelort.adapters import Factors

Numbers = npt.NDArray[np.int64]
Matrix = npt.NDArray[np.float64]

Product = tuple[Numbers, Matrix] | None
"""A sum of rank dimensions: their numbers [n] and coefficients [n]; None for the zero product."""


class LayerDimensions:
    """The rank dimensions of one layer that occur in a round, numbered, and their inner products.

    Dimensions with the same bits have one number, as have all that are zero: what a client merely
    received costs nothing, and cancels exactly.
    """

    def __init__(self) -> None:
        self._numbers: dict[bytes, int] = {}
        self._dimensions: list[npt.NDArray[np.float32]] = []
        self._width = 0
        """d_in: a dimension is a row of A followed by a column of B."""

    @property
    def count(self) -> int:
        """Number of different dimensions."""
        return len(self._numbers)

    def add(self, factors: Factors) -> Numbers:
        """The numbers of a layer's rank dimensions, of which some may be known: int64 [r]."""
        self._width = factors.A.shape[1]
        dimensions = torch.cat([factors.A, factors.B.T], dim=1).cpu().numpy()
        numbers = []
        for dimension, nonzero in zip(dimensions, factors.B.any(dim=0).tolist(), strict=True):
            key = dimension.tobytes() if nonzero else b""
            if key not in self._numbers:
                self._numbers[key] = self.count
                self._dimensions.append(dimension)
            numbers.append(self._numbers[key])
        return np.array(numbers, dtype=np.int64)

    def grams(self) -> tuple[Matrix, Matrix]:
        """``A A'`` and ``B'B`` over all dimensions, float64 [count, count] each."""
        dimensions = np.stack(self._dimensions).astype(np.float64)
        a, b = dimensions[:, : self._width], dimensions[:, self._width :]
        # NumPy recognises x x' as symmetric and takes half the time for it; torch does not.
        return a @ a.T, b @ b.T

    def rows(self, products: Sequence[Product]) -> Matrix:
        """Each product as the coefficients of all dimensions: float64 [products, count]."""
        rows = np.zeros((len(products), self.count))
        for row, product in zip(rows, products, strict=True):
            if product is not None:
                np.add.at(row, *product)
        return rows


def singular_energies(gram_a: Matrix, gram_b: Matrix) -> Matrix:
    """Squared singular values of ``B A``, falling [r], from ``A A'`` and ``B'B`` [r, r].

    They are the eigenvalues of ``S' B'B S`` for any S with ``S S' = A A'``.
    """
    values, vectors = np.linalg.eigh(gram_a)
    root = vectors * np.sqrt(np.maximum(values, 0.0))
    return np.maximum(np.linalg.eigvalsh(root.T @ gram_b @ root), 0.0)[::-1]


def effective_rank(energies: Matrix) -> float:
    """``exp(H)``, H the entropy of the energies as shares; between 1 and their number.

    Roy & Vetterli, EUSIPCO 2007, with squared singular values in place of theirs.
    """
    shares = energies[energies > 0] / energies.sum()
    return math.exp(-float((shares * np.log(shares)).sum()))
