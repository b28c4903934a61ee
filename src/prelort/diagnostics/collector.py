"""What a round did to the products: noise of aggregation and of truncation, drift, energy of ranks.

With P_k the product that client k trained (at its gain) and P0_k as it was received, W_k = P_k plus
what was frozen beside it, p_k the client's share of the weight, G the global function before the
round and G' after it, T_h the slots of a rank segment (l, h] as the mean of their holders', all as
sums of ``s B A``, and q_j the shares of the squared singular values of G':

    aggregation noise     |G' - sum_k p_k W_k| / |sum_k p_k W_k|
    initialization noise  |P0_k + frozen - G| / |G|          (both: Fed-PLoRA, arXiv 2602.16936)
    truncation noise      |G' - G'_r| / |G'|, G'_r as the method cuts it to rank r
      the least possible  sqrt(sum_{j > r} q_j)              (Eckart & Young 1936)
    client drift          |P_k - P0_k| / |G|
    client dispersion     sqrt(sum_k p_k |W_k - sum_l p_l W_l|^2) / |sum_k p_k W_k|
    effective rank        exp(-sum_j q_j ln q_j)             (Roy & Vetterli, EUSIPCO 2007)
    energy share          sum_{l < j <= h} q_j               (rank collapse: arXiv 2602.13486)
    tail kept             <T'_h, T_h> / |T_h|^2              (dilution: arXiv 2406.17477)

The ratios are ours, so that layers, rounds and methods can be compared. Norms are Frobenius norms
over the measured layers. Everything is a sum of slots (`slot_products`); no d_out x d_in matrix is
ever built. Differences are taken between coefficients of slots and not between norms, in float64.
``docs/diagnostics.md`` says how to read the numbers.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from prelort.adapters import Factors, LoraAdapter
from prelort.diagnostics.rank_one_products import (
    LayerDimensions,
    Matrix,
    Numbers,
    Product,
    effective_rank,
    equal,
    singular_energies,
)
from prelort.methods.interface import Broadcast, Client, Method, ServerState, Update
from prelort.seeds import torch_generator

LEAST_BUDGET = 1e8
"""Multiply-adds that a round may always spend on the slots' inner products."""

BUDGET_PER_ELEMENT = 1.5
"""Multiply-adds that it may spend for each number that the clients send."""

MOST_SLOTS = 2048
"""With more slots in a layer (all clients' together) the clients are not measured in that round."""

RESOLUTION = 1e-6
"""A relative norm below this is told as 0: float64 inner products leave some 1e-8 of nothing."""

DIGITS = 6
"""Significant digits of what is told, so that it does not hang on the order of a sum."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What is kept of a client until the round ends: the measured layers, and its weight."""

    client: str
    weight: float
    received: LoraAdapter
    frozen: LoraAdapter | None
    scale_multiplier: float
    trained: LoraAdapter


@dataclass(frozen=True, slots=True)
class Round:
    """The measured layers of a whole round. ``adapter`` only where slots have kept their place.

    ``before``, ``after``: the global function; ``cuts``: as it is now at each rank level.
    """

    before: LoraAdapter
    after: LoraAdapter
    cuts: Mapping[int, LoraAdapter]
    adapter: LoraAdapter | None
    replies: Sequence[Reply]


class Collector:
    """Takes one round's replies and, at its end, says what the round did.

    It keeps the measured layers of each reply: a sample that moves on with the rounds. Which, is a
    function of the seed, the round, the clients asked and the layers' shapes (`sampled`).
    """

    def __init__(
        self,
        method: Method,
        state: ServerState,
        clients: Sequence[Client],
        levels: Sequence[int],
        weight: Callable[[Update], float],
        seed: int,
    ) -> None:
        self.method = method
        self.state = state
        self.levels = tuple(sorted(levels))
        self.weight = weight
        self.names = sampled(state.adapter, [c.rank for c in clients], seed, state.round)
        self.before = self._readout(state)
        self.replies: list[Reply] = []
        self.dimensions = 0
        """That the clients have trained so far in the layer with the fewest."""
        self.in_place = True
        """Whether all clients received the first slots of the global adapter, in their order."""

    def add(self, sent: Broadcast, update: Update) -> None:
        """Keep what is needed of one client's round."""
        received, own = only(sent.trainable, self.names), self.state.adapter.layers
        trained = only(update.adapter, self.names)
        self.dimensions += min((factors.rank for factors in trained.layers.values()), default=0)
        self.in_place &= all(
            name in own and equal(factors.A, own[name].A[: factors.rank])
            for name, factors in received.layers.items()
        )
        if self.dimensions > MOST_SLOTS:
            self.replies.clear()  # the clients are not measured, however many come
            return
        self.replies.append(
            Reply(
                client=update.client.name,
                weight=self.weight(update),
                received=received,
                frozen=None if sent.frozen is None else only(sent.frozen, self.names),
                scale_multiplier=sent.scale_multiplier,
                # Copies: a view could keep a whole reply in memory.
                trained=_copied(trained),
            )
        )

    def result(self, after: ServerState) -> dict[str, Any]:
        """The round's numbers, ready for JSON; null for what is not defined, as 0 / 0.

        By rank level (as text): what a cut to it loses, and its segment's share of the energy or
        of what was kept. ``layers``: how many were measured, of how many.
        """
        whole = self._readout(after)
        total = sum(reply.weight for reply in self.replies)
        finished = Round(
            before=self.before,
            after=whole,
            cuts={rank: self._cut(after, rank, whole) for rank in self.levels},
            adapter=after.adapter if self.in_place else None,
            # By name, whoever answered first: sums depend on their order.
            replies=sorted(
                (replace(r, weight=r.weight / total) for r in self.replies if total > 0),
                key=lambda reply: reply.client,
            ),
        )
        layers = [Layer(name, finished) for name in self.names]
        if any(layer.dimensions.count > MOST_SLOTS for layer in layers):
            finished = replace(finished, replies=[])
            layers = [Layer(name, finished) for name in self.names]
        sums = Sums(self.levels)
        measured = sum([layer.into(sums) for layer in layers])
        counts = {"measured": measured, "of": len(self.state.adapter.layers)}
        shares = {reply.client: reply.weight for reply in finished.replies}
        return {"layers": counts, **sums.told(shares)}

    def _cut(self, state: ServerState, rank: int, whole: LoraAdapter) -> LoraAdapter:
        return self._readout(state, min(rank, whole.rank)) if whole.layers else whole

    def _readout(self, state: ServerState, rank: int | None = None) -> LoraAdapter:
        """The measured layers of a readout.

        A readout of all layers can cost more than the round's aggregation (an SVD each), so it is
        asked of a state that has the measured layers only.
        """
        try:
            found = self.method.global_adapter(part(state, self.names), rank)
        except Exception:  # a method that keeps its memory in its own way may need all of it
            found = self.method.global_adapter(state, rank)
        return only(found, self.names)


class Layer:
    """One layer's slots in a round, and the products that they make up."""

    def __init__(self, name: str, finished: Round) -> None:
        self.name = name
        self.dimensions = LayerDimensions()
        replies = finished.replies
        self.clients = [reply.client for reply in replies]
        self.shares = np.array([reply.weight for reply in replies])
        self.before = self._new(finished.before, known=True)
        self.after = self._new(finished.after, known=True)
        self.cuts = {str(level): self._found(cut) for level, cut in finished.cuts.items()}
        self.adapter = self._found(finished.adapter)
        self.received = [self._found(reply.received, reply.scale_multiplier) for reply in replies]
        self.frozen = [self._found(reply.frozen) for reply in replies]
        self.trained = [self._new(reply.trained, reply.scale_multiplier) for reply in replies]

    def _new(
        self, adapter: LoraAdapter, scale_multiplier: float = 1.0, *, known: bool = False
    ) -> Product:
        """The layer's ``gain * s(r) B A`` as slots that are not there yet."""
        factors = adapter.layers.get(self.name)
        if factors is None:
            return None
        numbers = self.dimensions.add(factors, known=known)
        return numbers, np.full(factors.rank, scale_multiplier * adapter.scale(factors.rank))

    def _found(self, adapter: LoraAdapter | None, scale_multiplier: float = 1.0) -> Product:
        """The layer's ``gain * s(r) B A`` as slots that may be there already."""
        factors = adapter.layers.get(self.name) if adapter is not None else None
        numbers = self.dimensions.find(factors) if factors is not None else None
        if adapter is None or factors is None or numbers is None:
            return None
        return numbers, np.full(factors.rank, scale_multiplier * adapter.scale(factors.rank))

    def into(self, sums: Sums) -> bool:
        """Add the layer's numbers; False (and nothing added) where it has no or too many slots."""
        if not 0 < self.dimensions.count <= MOST_SLOTS:
            return False
        gram_a, gram_b = self.dimensions.grams()
        inner = gram_a * gram_b
        rows = self.dimensions.rows

        def squared(products: Matrix) -> Matrix:
            squares: Matrix = ((products @ inner) * products).sum(axis=1)
            return np.maximum(squares, 0.0)

        before, after = rows([self.before]), rows([self.after])
        sums.add("before", [""], squared(before))
        sums.add("after", [""], squared(after))
        sums.add("cut", self.cuts, squared(after - rows(list(self.cuts.values()))))
        if self.clients:
            received, frozen, trained = rows(self.received), rows(self.frozen), rows(self.trained)
            functions = trained + frozen
            mean = self.shares[None] @ functions
            sums.add("mean", [""], squared(mean))
            sums.add("noise", [""], squared(after - mean))
            sums.add("spread", [""], self.shares[None] @ squared(functions - mean))
            sums.add("start", self.clients, squared(received + frozen - before))
            sums.add("moved", self.clients, squared(trained - received))
        if self.adapter is not None:
            kept, held = self._segments(self.adapter[0], sums.segments)
            sums.add("held", sums.names, squared(held))
            sums.add("common", sums.names, ((kept @ inner) * held).sum(axis=1))
        if self.after is not None:
            numbers, scales = self.after
            own = np.ix_(numbers, numbers)
            energies = singular_energies(gram_a[own], gram_b[own]) * scales[0] ** 2
            lengths = np.sqrt(np.maximum(inner[numbers, numbers], 0.0))
            sums.add_spectrum(energies, scales * lengths)
        return True

    def _segments(self, new: Numbers, segments: Sequence[tuple[int, int]]) -> tuple[Matrix, Matrix]:
        """Each segment's slots, new and as the mean of those who trained them, without a scale."""
        clients = [
            (share, product[0])
            for share, product in zip(self.shares, self.trained, strict=True)
            if product is not None and share > 0
        ]
        held = np.zeros(max([len(numbers) for _, numbers in clients], default=0))
        for share, numbers in clients:
            held[: len(numbers)] += share
        kept_rows = np.zeros((len(segments), self.dimensions.count))
        held_rows = np.zeros_like(kept_rows)
        for index, (low, high) in enumerate(segments):
            np.add.at(kept_rows[index], new[low:high], 1.0)
            for share, numbers in clients:
                held_rows[index, numbers[low:high]] = (share / held[: len(numbers)])[low:high]
        return kept_rows, held_rows


class Sums:
    """Squared norms summed over the measured layers, and what is a mean over them."""

    def __init__(self, levels: Sequence[int]) -> None:
        self.segments = segments(levels)
        self.names = [str(high) for _, high in self.segments]
        self.squares: dict[tuple[str, str], float] = defaultdict(float)
        self.effective_ranks: list[float] = []
        self.slot_energies: list[Matrix] = []

    def add(self, quantity: str, names: Iterable[str], squares: Matrix) -> None:
        """A layer's squared norms (or inner products) of a quantity, by rank level or client."""
        for name, square in zip(names, squares.tolist(), strict=True):
            self.squares[quantity, name] += square

    def add_spectrum(self, energies: Matrix, slot_energies: Matrix) -> None:
        """A layer's squared singular values, falling, and the norms of its slots' products."""
        if energies.sum() > 0:
            self.effective_ranks.append(effective_rank(energies))
        highest = self.segments[-1][1]
        self.slot_energies.append(slot_energies[:highest])
        within = np.array([energies[low:high].sum() for low, high in self.segments])
        beyond = np.array([energies[high:].sum() for _, high in self.segments])
        self.add("within", self.names, within)
        self.add("beyond", self.names, beyond)
        self.add("spectrum", [""], energies.sum(keepdims=True))

    def told(self, shares: Mapping[str, float]) -> dict[str, Any]:
        """The relative numbers; ``shares``: the clients' weights."""
        names = self.names
        starts = [self._relative("start", client, "before") for client in shares]
        drifts = [self._relative("moved", client, "before") for client in shares]
        return {
            "aggregation_noise": _told(self._relative("noise", "", "mean")),
            "client_dispersion": _told(self._relative("spread", "", "mean")),
            "initialization_noise": _mean_and(starts, max=_most),
            "client_drift": _mean_and(drifts, deviation=_deviation),
            "truncation_noise": {n: _told(self._relative("cut", n, "after")) for n in names},
            "least_truncation_noise": {
                n: _told(self._relative("beyond", n, "spectrum")) for n in names
            },
            "effective_rank": _told(_mean(self.effective_ranks)),
            "energy_share": {n: _told(self._share(("within", n), ("spectrum", ""))) for n in names},
            "slot_energy": [_told(energy) for energy in _by_slot(self.slot_energies)],
            "tail_kept": {n: _told(self._share(("common", n), ("held", n))) for n in names},
        }

    def _relative(self, quantity: str, name: str, reference: str) -> float | None:
        """A norm over the norm of a reference, 0 below what float64 can tell."""
        share = self._share((quantity, name), (reference, ""))
        if share is None:
            return None
        return math.sqrt(share) if share > RESOLUTION**2 else 0.0

    def _share(self, key: tuple[str, str], reference: tuple[str, str]) -> float | None:
        whole = self.squares.get(reference, 0.0)
        return self.squares[key] / whole if whole > 0 else None


def sampled(adapter: LoraAdapter, ranks: Sequence[int], seed: int, round_index: int) -> list[str]:
    """The layers to measure in a round (from 0) whose clients have these ranks.

    The inner products of K slots take ``(d_in + d_out) K^2 / 2`` multiply-adds a layer. All layers
    are measured where that fits `LEAST_BUDGET`, or `BUDGET_PER_ELEMENT` times the numbers that the
    clients send; else as many as fit, at least one: a window that moves on each round, over an
    order drawn by the seed.
    """
    names = sorted(adapter.layers)
    elements = cost = 0.0
    for factors in adapter.layers.values():
        dimensions = factors.A.shape[1] + factors.B.shape[0]
        trained = sum(min(rank, factors.rank) for rank in ranks)
        elements += dimensions * trained
        cost += dimensions * (trained + 2 * factors.rank) ** 2 / 2
    budget = max(LEAST_BUDGET, BUDGET_PER_ELEMENT * elements)
    if cost <= budget:
        return names
    count = max(1, int(len(names) * budget / cost))
    generator = torch_generator(seed, "measured layers")
    order = torch.randperm(len(names), generator=generator).tolist()
    window = [order[(round_index * count + i) % len(names)] for i in range(count)]
    return sorted(names[index] for index in window)


def segments(levels: Sequence[int]) -> list[tuple[int, int]]:
    """The slots (low, high] between neighbouring rank levels."""
    rising = sorted(levels)
    return list(zip([0, *rising[:-1]], rising, strict=True))


def only(adapter: LoraAdapter, names: Sequence[str]) -> LoraAdapter:
    """The adapter with these of its layers, without extras."""
    layers = {name: adapter.layers[name] for name in names if name in adapter.layers}
    return LoraAdapter(layers, adapter.scale)


def part(state: ServerState, names: Sequence[str]) -> ServerState:
    """The state as if the model had these layers only.

    Of the memory goes what is named after another layer, maybe behind a ``key:`` of the method's.
    """
    others = tuple(f"{name}." for name in state.adapter.layers.keys() - set(names))
    memory = {
        key: tensor
        for key, tensor in state.memory.items()
        if not key.rpartition(":")[2].startswith(others)
    }
    adapter = replace(only(state.adapter, names), modules_to_save=state.adapter.modules_to_save)
    return replace(state, adapter=adapter, memory=memory)


def _copied(adapter: LoraAdapter) -> LoraAdapter:
    layers = {name: Factors(f.A.clone(), f.B.clone()) for name, f in adapter.layers.items()}
    return replace(adapter, layers=layers)


Some = Sequence[float | None]


def _mean_and(values: Some, **more: Callable[[Some], float | None]) -> dict[str, float | None]:
    measures = {"mean": _mean, **more}
    return {name: _told(measure(values)) for name, measure in measures.items()}


def _mean(values: Some) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _most(values: Some) -> float | None:
    return max((value for value in values if value is not None), default=None)


def _deviation(values: Some) -> float | None:
    """The standard deviation of all values (not of a sample)."""
    mean = _mean(values)
    if mean is None:
        return None
    variance = _mean([(value - mean) ** 2 for value in values if value is not None])
    return math.sqrt(variance or 0.0)


def _by_slot(energies: Sequence[Matrix]) -> list[float]:
    """Slot by slot the mean over the layers that have it."""
    longest = max((len(one) for one in energies), default=0)
    return [
        float(np.mean([one[dimension] for one in energies if len(one) > dimension]))
        for dimension in range(longest)
    ]


def _told(value: float | None) -> float | None:
    """To `DIGITS` digits; None for what is no number."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.{DIGITS}g}")
