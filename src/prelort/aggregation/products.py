"""Weighted means of products ``s B A`` instead of factors.

    Delta W = sum_k p_k s(r_k) B_k A_k

is kept as stacked factors and approximated through QR and a small SVD; no d_out x d_in matrix is
ever built.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from prelort.adapters import Factors, LoraAdapter
from prelort.adapters.algebra import compress, concatenate, layer_inner, squared_distance
from prelort.errors import AdapterError


class ProductSum:
    """The weighted mean of products, one reply at a time.

    It keeps the replies' factors. Where their ranks exceed twice a layer's smaller dimension they
    are compressed without loss, so that memory stays bounded however many clients reply.
    """

    def __init__(self) -> None:
        self.parts: list[LoraAdapter] = []
        self.weights: list[float] = []
        self.total = 0.0
        """The weight of all replies."""
        self.compressed = False
        """Whether the rank dimensions of the parts are no longer those of the replies."""

    def add(self, adapter: LoraAdapter, weight: float) -> None:
        """Fold in one product of a weight of at least 0; with weight 0 it changes nothing."""
        if weight == 0:
            return
        self.total += weight
        self.parts.append(adapter.to(torch.float32))
        self.weights.append(weight)
        smaller = [min(f.A.shape[1], f.B.shape[0]) for f in adapter.layers.values()]
        if smaller and sum(part.rank for part in self.parts) > 2 * max(smaller):
            self.parts, self.weights = [compress(concatenate(self.parts, self.weights))], [1.0]
            self.compressed = True

    def mean(self) -> LoraAdapter:
        """The exact mean as stacked factors. Raises `AdapterError` where nothing was added."""
        return concatenate(self.parts, [weight / self.total for weight in self.weights])


@dataclass
class Segment:
    """Rank dimensions low + 1 to high: the products of the clients that hold them.

    With ``before``, the segment as it was broadcast, it also sums how far the products have moved:
    at all, and `along` it.
    """

    low: int
    high: int
    before: LoraAdapter | None = None
    products: ProductSum = field(default_factory=ProductSum)
    squares: float = 0.0
    """Sum of the squared weights."""
    moved: float = 0.0
    """Sum of the squared weights times the squared distances of the products from ``before``."""
    gained: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.float64))
    """Sum of the weights times the vectors `along` ``before`` (float64 [layers])."""
    gained_squares: float = 0.0
    """Sum of the squared weights times the squared lengths of these vectors."""

    def add(self, part: LoraAdapter, weight: float) -> None:
        """Fold in a holder's product of these dimensions."""
        self.products.add(part, weight)
        self.squares += weight**2
        if self.before is not None:
            self.moved += weight**2 * squared_distance(part, self.before)
            gained = along(part, self.before)
            self.gained = self.gained + weight * gained
            self.gained_squares += weight**2 * float(gained @ gained)


class SegmentSums:
    """One `ProductSum` for each segment of rank dimensions, all of which have the same holders.

    So the weight of a segment is one number, and no reply has to be kept until that is known.
    The modules to save belong to the first segment, which everyone holds.

    Args:
        levels: rank levels, which cut the dimensions up to ``rank`` into segments. A reply of
            another rank divides a segment.
        rank: of the global adapter.
        before: the global adapter that was broadcast, where segments are to sum how far the
            replies have moved.
    """

    def __init__(self, levels: Sequence[int], rank: int, before: LoraAdapter | None = None) -> None:
        cuts = [0, *sorted({level for level in levels if level < rank}), rank]
        self.before = None if before is None else before.to(torch.float32)
        self.segments = [self._segment(low, high) for low, high in itertools.pairwise(cuts)]

    def _segment(self, low: int, high: int) -> Segment:
        before = self.before
        return Segment(low, high, None if before is None else between(before, low, high))

    @property
    def total(self) -> float:
        """The weight of all replies."""
        return self.segments[0].products.total

    def add(self, adapter: LoraAdapter, weight: float) -> None:
        """Fold in a reply, segment by segment.

        Raises `AdapterError` for a rank that is no level, where that segment's products have been
        compressed, so that it can no longer be divided.
        """
        if weight == 0:
            return
        self._cut(adapter.rank)
        for segment in self.segments:
            if segment.high <= adapter.rank:
                segment.add(between(adapter, segment.low, segment.high), weight)

    def _cut(self, rank: int) -> None:
        """Make this rank the end of a segment."""
        for place, whole in enumerate(self.segments):
            if whole.low < rank < whole.high:
                if whole.products.compressed:
                    raise AdapterError(
                        f"a reply of rank {rank} is not allowed: it would divide the rank "
                        f"dimensions {whole.low + 1} to {whole.high}, which are summed already"
                    )
                width = rank - whole.low
                halves = self._segment(whole.low, rank), self._segment(rank, whole.high)
                for part, weight in zip(whole.products.parts, whole.products.weights, strict=True):
                    for half, ends in zip(halves, ((0, width), (width, part.rank)), strict=True):
                        half.add(between(part, *ends), weight)
                self.segments[place : place + 1] = halves


def between(adapter: LoraAdapter, low: int, high: int) -> LoraAdapter:
    """Rank dimensions low + 1 to high with the product that they have within the whole adapter.

    Layers without any are left out; the modules to save come with the first dimension.
    """
    layers: dict[str, Factors] = {}
    for name, factors in adapter.layers.items():
        if factors.rank > low:
            a, b = factors.A[low:high], factors.B[:, low:high]
            ratio = adapter.scale(factors.rank) / adapter.scale(a.shape[0])
            layers[name] = Factors(a, b if ratio == 1 else b * ratio)
    return LoraAdapter(layers, adapter.scale, adapter.modules_to_save if low == 0 else {})


def along(part: LoraAdapter, before: LoraAdapter) -> Tensor:
    """What each layer's product has gained in the direction of the one before (float64 [layers]).

    ``<P - P0, P0> / |P0|``; 0 in a layer whose P0 is zero, as all are before the first round.
    """
    gained = []
    for name in sorted(before.layers):
        square = layer_inner(before, before, name)
        change = layer_inner(part, before, name) - square
        gained.append(change / math.sqrt(square) if square > 0 else 0.0)
    return torch.tensor(gained, dtype=torch.float64)


def sum_products(parts: Sequence[LoraAdapter]) -> LoraAdapter:
    """The sum of the products of adapters with any layers, without their modules to save."""
    layers: dict[str, Factors] = {}
    for name in sorted({name for part in parts for name in part.layers}):
        single = [part.bare().select([name]) for part in parts if name in part.layers]
        layers[name] = concatenate(single, [1.0] * len(single)).layers[name]
    return LoraAdapter(layers, parts[0].scale)
