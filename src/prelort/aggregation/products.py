"""What the methods share that average products instead of factors.

    Delta W = sum_k p_k s(r_k) B_k A_k

is kept as stacked factors and approximated through QR and a small SVD; no d_out x d_in matrix is
ever built.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from prelort.adapters import Factors, LoraAdapter, ScaleRule
from prelort.adapters.algebra import compressed, concatenate, squared_distance
from prelort.errors import AdapterError


class ProductSum:
    """The weighted mean of products, one reply at a time.

    Memory: the replies' factors. Where they have more slots than a layer has dimensions they are
    compressed without loss, so that it stays bounded however many clients reply.

    Stacking is associative, so partial sums can be merged, and travel as tensors: all that
    FlexLoRA, HLoRA, FLoRA and FLoRIST need of an edge aggregator.
    """

    def __init__(self) -> None:
        self.parts: list[LoraAdapter] = []
        self.weights: list[float] = []
        self.total = 0.0
        self.aligned = True
        """Whether slot j of each part is still slot j of a reply: nothing was compressed yet."""

    def add(self, adapter: LoraAdapter, weight: float) -> None:
        """Fold in one product."""
        if weight == 0:
            return
        self.total += weight
        self._stack([adapter.to(torch.float32)], [weight])

    def merge(self, other: ProductSum) -> None:
        """Fold in all products of another sum."""
        self.total += other.total
        self.aligned = self.aligned and other.aligned
        self._stack(other.parts, other.weights)

    def _stack(self, parts: Sequence[LoraAdapter], weights: Sequence[float]) -> None:
        self.parts += parts
        self.weights += weights
        layers = (f for part in parts for f in part.layers.values())
        most = max((min(f.A.shape[1], f.B.shape[0]) for f in layers), default=0)
        if most and sum(part.rank for part in self.parts) > 2 * most:
            self.parts, self.weights = [compressed(concatenate(self.parts, self.weights))], [1.0]
            self.aligned = False

    def mean(self) -> LoraAdapter | None:
        """The mean, with as many slots as were added; None where nothing was."""
        if not self.parts:
            return None
        return concatenate(self.parts, [weight / self.total for weight in self.weights])

    def to_tensors(self) -> dict[str, Tensor]:
        """All of it as named tensors: ``total`` (float64 []) and the factors of the mean."""
        tensors = {"total": torch.tensor(self.total, dtype=torch.float64)}
        mean = self.mean()
        return tensors | ({f"mean:{n}": t for n, t in mean.tensors().items()} if mean else {})

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], scale: ScaleRule) -> ProductSum:
        """The inverse of `to_tensors`. Raises `AdapterError` naming what is missing or wrong."""
        if "total" not in tensors:
            raise AdapterError("tensor 'total' is missing")
        partial, mean = cls(), {n: t for n, t in tensors.items() if n != "total"}
        if mean:
            bare = {name.removeprefix("mean:"): tensor for name, tensor in mean.items()}
            partial.add(LoraAdapter.from_tensors(bare, scale), float(tensors["total"]))
        return partial


@dataclass
class Segment:
    """Slots low + 1 to high: the products of those who hold them.

    Besides, the sum of the squared weights, and that of the weighted squared distances of the
    products from ``before``, where it is known.
    """

    low: int
    high: int
    before: LoraAdapter | None = None
    products: ProductSum = field(default_factory=ProductSum)
    squares: float = 0.0
    moved: float = 0.0

    def add(self, part: LoraAdapter, weight: float) -> None:
        """Fold in a holder's product of these slots."""
        self.products.add(part, weight)
        self.squares += weight**2
        if self.before is not None:
            self.moved += weight * squared_distance(part, self.before)


class SegmentSums:
    """One `ProductSum` for each segment of slots, whose holders are the same for all its slots.

    So the weight of a segment is one number, and no reply has to be kept until it is known. The
    configured ``levels`` cut the slots up to ``rank`` into segments; a reply of another rank
    divides one. Extras are those of the first segment, which everyone holds. With ``before``, the
    adapter that was broadcast, segments also sum how far the replies have moved.
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
        compressed, so that it cannot be divided any more.
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
                if not whole.products.aligned:
                    raise AdapterError(
                        f"a reply of rank {rank} is not allowed: it would divide the slots "
                        f"{whole.low + 1} to {whole.high}, which are summed already"
                    )
                width = rank - whole.low
                halves = self._segment(whole.low, rank), self._segment(rank, whole.high)
                for part, weight in zip(whole.products.parts, whole.products.weights, strict=True):
                    for half, ends in zip(halves, ((0, width), (width, part.rank)), strict=True):
                        half.add(between(part, *ends), weight)
                self.segments[place : place + 1] = halves


def between(adapter: LoraAdapter, low: int, high: int) -> LoraAdapter:
    """Slots low + 1 to high with the product that they have within the whole adapter.

    Layers without any are left out; extras come with the first slot.
    """
    layers: dict[str, Factors] = {}
    for name, factors in adapter.layers.items():
        if factors.rank > low:
            a, b = factors.A[low:high], factors.B[:, low:high]
            ratio = adapter.scale(factors.rank) / adapter.scale(a.shape[0])
            layers[name] = Factors(a, b if ratio == 1 else b * ratio)
    return LoraAdapter(layers, adapter.scale, adapter.modules_to_save if low == 0 else {})


def summed(parts: Sequence[LoraAdapter]) -> LoraAdapter:
    """The sum of products of adapters that need not have the same layers; extras are dropped."""
    layers: dict[str, Factors] = {}
    for name in sorted({name for part in parts for name in part.layers}):
        having = [part for part in parts if name in part.layers]
        single = [LoraAdapter({name: part.layers[name]}, part.scale) for part in having]
        layers[name] = concatenate(single, [1.0] * len(single)).layers[name]
    return LoraAdapter(layers, parts[0].scale)


def rescaled(adapter: LoraAdapter, rank: int) -> LoraAdapter:
    """The first ``rank`` slots with the product that they have within the whole adapter.

    Under a constant scale that is the prefix; else B makes up for the other scale.
    """
    part = adapter.prefix(rank)
    layers: dict[str, Factors] = {}
    for name, factors in part.layers.items():
        ratio = adapter.scale(adapter.layers[name].rank) / adapter.scale(factors.rank)
        layers[name] = factors if ratio == 1 else Factors(factors.A, factors.B * ratio)
    return replace(part, layers=layers)
