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
from torch import Tensor

from prelort.adapters import Factors

Numbers = npt.NDArray[np.int64]
Matrix = npt.NDArray[np.float64]

Product = tuple[Numbers, Matrix] | None
"""A sum of rank dimensions: their numbers [n] and coefficients [n]; None for the zero product."""


class LayerDimensions:
    """The rank dimensions of one layer that occur in a round, numbered, and their inner products.

    What a client merely received is recognised among the numbered dimensions, bit for bit: so it
    costs nothing, and cancels exactly.
    """

    def __init__(self) -> None:
        self.count = 0
        self._taken: list[Factors] = []
        self._known: list[tuple[Factors, Numbers]] = []

    def add(self, factors: Factors, *, known: bool = False) -> Numbers:
        """Number new dimensions; ``known``: `find` recognises them from now on."""
        numbers = np.arange(self.count, self.count + factors.rank)
        self.count += factors.rank
        self._taken.append(factors)
        if known:
            self._known.append((factors, numbers))
        return numbers

    def find(self, factors: Factors) -> Numbers | None:
        """The numbers of dimensions, of which some may be known; None where all are zero."""
        for block, numbers in self._known:
            if _begins_with(block, factors):
                return numbers[: factors.rank]
        if not bool(factors.B.any()):
            return None
        result = np.full(factors.rank, -1)
        for block, numbers in self._known:
            place = places(factors, block)
            result = np.where((result < 0) & (place >= 0), numbers[place], result)
        (unknown,) = (result < 0).nonzero()
        if len(unknown):
            result[unknown] = self.add(factors.take(torch.from_numpy(unknown)), known=True)
        return result

    def grams(self) -> tuple[Matrix, Matrix]:
        """``A A'`` and ``B'B`` over all dimensions, float64 [count, count] each."""
        a = torch.cat([factors.A for factors in self._taken]).double().cpu().numpy()
        b = torch.cat([factors.B for factors in self._taken], dim=1).double().cpu().numpy()
        # NumPy recognises x x' as symmetric and takes half the time for it; torch does not.
        return a @ a.T, b.T @ b

    def rows(self, products: Sequence[Product]) -> Matrix:
        """Each product as the coefficients of all dimensions: float64 [products, count]."""
        rows = np.zeros((len(products), self.count))
        for row, product in zip(rows, products, strict=True):
            if product is not None:
                np.add.at(row, *product)
        return rows


def places(part: Factors, whole: Factors) -> Numbers:
    """For each dimension of ``part``, that of ``whole`` with the same bits, or -1: int64 [r]."""
    nowhere = torch.full((part.rank,), -1, device=part.A.device)
    # A few numbers tell almost all dimensions apart; only those that agree in them are compared.
    alike = (part.A[:, None, :8] == whole.A[None, :, :8]).all(dim=2)
    if not bool(alike.any()):
        return nowhere.cpu().numpy()
    guess = alike.int().argmax(dim=1)
    same = torch.eq(part.A, whole.A[guess]).all(dim=1)
    same &= torch.eq(part.B, whole.B[:, guess]).all(dim=0)
    return torch.where(same, guess, nowhere).cpu().numpy()


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


def _begins_with(whole: Factors, factors: Factors) -> bool:
    """Whether the first dimensions of ``whole`` are those of ``factors``, bit for bit."""
    rank = factors.rank
    return equal(whole.A[:rank], factors.A) and equal(whole.B[:, :rank], factors.B)


def equal(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors have the same bits; views of the same memory are not compared."""
    if x.dtype != y.dtype or x.shape != y.shape:
        return False
    return (x.data_ptr() == y.data_ptr() and x.stride() == y.stride()) or torch.equal(x, y)
