"""The weighted mean of each slot over the clients that hold it, folded in one reply at a time.

The factor-space methods differ only in what they make of the slots that a client lacks, so they
share this accumulator. Its memory is one global adapter, however many clients reply.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from prelort.adapters import Factors, LoraAdapter
from prelort.adapters.algebra import zeros
from prelort.methods.interface import ServerState, Update

Weighting = Callable[[Update], float]


def by_examples(update: Update) -> float:
    """A client's weight is its number of examples."""
    return float(update.examples)


def uniformly(update: Update) -> float:
    """Every client weighs the same."""
    return 1.0


def weighting(name: str) -> Weighting:
    """The weighting that `MethodConfig.weights` names."""
    return by_examples if name == "examples" else uniformly


class SlotMean:
    """Running weighted means in float32: ``mean += (w / W) * (value - mean)`` for each slot.

    W is the weight that the slot has received, the new reply's included. The running form makes
    one client's mean that client, and the mean of equal clients that value, bit for bit.
    """

    def __init__(self, like: LoraAdapter) -> None:
        self.mean = zeros(like)
        self.total = 0.0
        self.held = {
            name: torch.zeros(f.rank, dtype=torch.float64) for name, f in like.layers.items()
        }
        """Layer name -> weight [rank] that each slot has received."""

    def add(
        self, adapter: LoraAdapter, weight: float, slots: Mapping[str, Tensor] | None = None
    ) -> None:
        """Fold in the slots that ``adapter`` has; extras are held by everyone.

        They are the first ones, or those of the indices ``slots`` (layer -> int64 [rank]).
        """
        if weight == 0:
            return
        self.total += weight
        for name, factors in adapter.layers.items():
            if slots is None:
                self._add_first(name, factors, weight)
            else:
                self._add_at(name, factors, weight, slots[name])
        for name, tensor in adapter.extras.items():
            _move(self.mean.extras[name], tensor, torch.tensor(weight / self.total))

    def _add_first(self, name: str, factors: Factors, weight: float) -> None:
        """In place, on views: nothing is copied."""
        held, mean = self.held[name][: factors.rank], self.mean.layers[name]
        held += weight
        step = (weight / held).to(torch.float32)
        _move(mean.A[: factors.rank], factors.A, step[:, None])
        _move(mean.B[:, : factors.rank], factors.B, step[None, :])

    def _add_at(self, name: str, factors: Factors, weight: float, slots: Tensor) -> None:
        held, mean = self.held[name], self.mean.layers[name]
        held[slots] += weight
        step = (weight / held[slots]).to(torch.float32)
        a, b = mean.A[slots], mean.B[:, slots]
        _move(a, factors.A, step[:, None])
        _move(b, factors.B, step[None, :])
        mean.A[slots], mean.B[:, slots] = a, b

    def over_holders(self, previous: LoraAdapter) -> LoraAdapter:
        """Each slot's mean over its holders; a slot that nobody held keeps its previous value."""
        layers: dict[str, Factors] = {}
        for name, mean in self.mean.layers.items():
            old, nobody = previous.layers[name], self.held[name] == 0
            layers[name] = Factors(
                torch.where(nobody[:, None], old.A.float(), mean.A),
                torch.where(nobody[None, :], old.B.float(), mean.B),
            )
        return self._like(previous, layers)

    def over_everyone(self, previous: LoraAdapter) -> LoraAdapter:
        """Each slot's mean over all replies, where a client that lacks it counts as zero.

        A slot that nobody held keeps its previous value: as zeros it could never learn again.
        """
        layers: dict[str, Factors] = {}
        for name, mean in self.mean.layers.items():
            old, nobody = previous.layers[name], self.held[name] == 0
            share = (self.held[name] / self.total).to(torch.float32)
            layers[name] = Factors(
                torch.where(nobody[:, None], old.A.float(), mean.A * share[:, None]),
                torch.where(nobody[None, :], old.B.float(), mean.B * share[None, :]),
            )
        return self._like(previous, layers)

    def or_unchanged(self, previous: LoraAdapter) -> LoraAdapter:
        """Each slot's mean over all replies, where a client that lacks it votes for no change."""
        layers: dict[str, Factors] = {}
        for name, mean in self.mean.layers.items():
            old, share = previous.layers[name], (self.held[name] / self.total).to(torch.float32)
            layers[name] = Factors(
                torch.lerp(old.A.float(), mean.A, share[:, None]),
                torch.lerp(old.B.float(), mean.B, share[None, :]),
            )
        return self._like(previous, layers)

    def _like(self, previous: LoraAdapter, layers: dict[str, Factors]) -> LoraAdapter:
        extras = dict(self.mean.extras) if self.total > 0 else dict(previous.extras)
        return LoraAdapter(layers, previous.scale, extras)


class Averaging:
    """The aggregator of the methods that average slots; ``finish`` is where they differ.

    ``slots_of`` says which slots a client trained, where these are not the first ones.
    """

    def __init__(
        self,
        state: ServerState,
        weight: Weighting,
        finish: Callable[[SlotMean, LoraAdapter], LoraAdapter],
        slots_of: Callable[[Update], Mapping[str, Tensor]] | None = None,
    ) -> None:
        self.state = state
        self.weight = weight
        self.finish = finish
        self.slots_of = slots_of
        self.mean = SlotMean(state.adapter)

    def add(self, update: Update) -> None:
        """Fold in a reply's slots."""
        slots = self.slots_of(update) if self.slots_of is not None else None
        self.mean.add(update.adapter, self.weight(update), slots)

    def result(self) -> ServerState:
        """The state after the round; its adapter is the old one where no reply had a weight."""
        old = self.state.adapter
        adapter = self.finish(self.mean, old) if self.mean.total > 0 else old
        return ServerState(adapter, self.state.round + 1, self.state.memory)


def _move(mean: Tensor, value: Tensor, step: Tensor) -> None:
    """``mean += step * (value - mean)`` in place; exact for step 1 and for value == mean."""
    mean.lerp_(value.to(mean.dtype), step)
