"""What the methods share that average products instead of factors.

    Delta W = sum_k p_k s(r_k) B_k A_k

is kept as stacked factors and approximated through QR and a small SVD; no d_out x d_in matrix is
ever built.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from prelort.adapters import Factors, LoraAdapter
from prelort.adapters.algebra import compressed, concatenate
from prelort.methods.interface import Broadcast, Client, ServerState
from prelort.methods.prefix import PrefixMethod


class ProductSum:
    """The weighted mean of products, one reply at a time.

    Memory: the replies' factors. Where they have more slots than a layer has dimensions they are
    compressed without loss, so that it stays bounded however many clients reply.
    """

    def __init__(self) -> None:
        self.parts: list[LoraAdapter] = []
        self.weights: list[float] = []
        self.total = 0.0

    def add(self, adapter: LoraAdapter, weight: float) -> None:
        """Fold in one product."""
        if weight == 0:
            return
        self.total += weight
        self.parts.append(adapter.to(torch.float32))
        self.weights.append(weight)
        most = max(min(f.A.shape[1], f.B.shape[0]) for f in adapter.layers.values())
        if sum(part.rank for part in self.parts) > 2 * most:
            self.parts, self.weights = [compressed(concatenate(self.parts, self.weights))], [1.0]

    def mean(self) -> LoraAdapter | None:
        """The mean, with as many slots as were added; None where nothing was."""
        if not self.parts:
            return None
        return concatenate(self.parts, [weight / self.total for weight in self.weights])


def added(parts: Sequence[LoraAdapter]) -> LoraAdapter | None:
    """The sum of products of adapters that need not have the same layers; extras are dropped."""
    names = sorted({name for part in parts for name in part.layers})
    if not names:
        return None
    layers: dict[str, Factors] = {}
    for name in names:
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


class ProductMethod(PrefixMethod):
    """The global adapter's slots are singular triples in falling order; clients get the first."""

    def broadcast(self, state: ServerState, client: Client) -> Broadcast:
        """The best approximation of the client's rank."""
        return Broadcast(self.readout(state, client.rank))

    def readout(self, state: ServerState, rank: int | None = None) -> LoraAdapter:
        """The best approximation of this rank (None: the whole)."""
        return state.adapter if rank is None else rescaled(state.adapter, rank)


def remembered(memory: Mapping[str, Tensor], key: str, like: LoraAdapter) -> LoraAdapter | None:
    """The adapter that the server's memory holds under ``key``, without extras."""
    start = f"{key}:"
    tensors = {n.removeprefix(start): t for n, t in memory.items() if n.startswith(start)}
    return LoraAdapter.from_tensors(tensors, like.scale) if tensors else None


def memorised(key: str, adapter: LoraAdapter) -> dict[str, Tensor]:
    """The factors of an adapter as the server's memory keeps them under ``key``."""
    bare = replace(adapter, extras={})
    return {f"{key}:{name}": tensor for name, tensor in bare.tensors().items()}
