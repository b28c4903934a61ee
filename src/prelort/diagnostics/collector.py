"""What a round did to the products: noise of aggregation and truncation, drift, energy of ranks.

With P_k the product that client k trained (at its scale multiplier) and P0_k the one it received,
W_k = P_k plus what was frozen beside it, p_k the client's share of the weight, G the global
function before the round and G' after it, T_h the rank dimensions of a segment (l, h] as the mean
of their holders', all as sums of ``s B A``, and q_j the shares of the squared singular values of
G':

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
over the measured layers. Everything is a sum of rank-one products (`rank_one_products`); no
d_out x d_in matrix is ever built. Differences are taken between coefficients and not between norms,
in float64. ``docs/diagnostics.md`` explains how to read the numbers.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from prelort.adapters import LoraAdapter
from prelort.diagnostics.rank_one_products import (
    LayerDimensions,
    Matrix,
    Numbers,
    Product,
    effective_rank,
    singular_energies,
)
from prelort.diagnostics.sample import Budget
from prelort.methods.averaging import Weighting
from prelort.methods.interface import Broadcast, Client, Method, ServerState, Update

RESOLUTION = 1e-6
"""A smaller relative norm is reported as 0: float64 inner products leave some 1e-8 of nothing."""

DIGITS = 6
"""Significant digits of the result, so that it does not depend on the order of a sum."""


@dataclass(frozen=True, slots=True)
class States:
    """The global function around a round.

    ``cuts``: rank level -> the function at that rank, after the round. ``adapter``: the global
    adapter where rank dimensions have kept their place, else None.
    """

    before: LoraAdapter
    after: LoraAdapter
    cuts: Mapping[int, LoraAdapter]
    adapter: LoraAdapter | None


class Collector:
    """Collects one round's replies and computes its numbers at the end.

    It measures a sample of the layers that changes with the round, a function of the seed, the
    round, the cohort and the layers' shapes (`Budget.sample`).
    """

    def __init__(
        self,
        method: Method,
        state: ServerState,
        clients: Sequence[Client],
        weight: Weighting,
        seed: int,
        budget: Budget = Budget(),
    ) -> None:
        self.method = method
        self.state = state
        self.weight = weight
        self.budget = budget
        self.names = budget.sample(state.adapter, [c.rank for c in clients], seed, state.round)
        self.layers = [Layer(name) for name in self.names]
        self.clients: list[str] = []
        self.weights: list[float] = []
        self.measures_clients = True
        self.in_place = True
        """Whether all clients received the first rank dimensions of the adapter, in their order."""

    def add(self, sent: Broadcast, update: Update) -> None:
        """Keep the measured layers of one reply."""
        whole, received = self.state.adapter.layers, sent.trainable.layers
        self.in_place &= all(
            name in whole and torch.equal(received[name].A, whole[name].A[: received[name].rank])
            for name in self.names
            if name in received
        )
        if self.measures_clients:
            for layer in self.layers:
                layer.add_reply(sent, update.adapter)
            self.clients.append(update.client.name)
            self.weights.append(self.weight(update))
            self._limit()

    def result(self, after: ServerState) -> dict[str, Any]:
        """The round's numbers, ready for JSON; null for what is not defined, such as 0 / 0.

        By rank level (as text): what a cut to it loses, and its segment's share of the energy or
        of what was kept. ``layers``: number of measured layers, and of all.
        """
        levels = tuple(sorted(self.state.levels))
        whole = self._global_adapter(after)
        states = States(
            before=self._global_adapter(self.state),
            after=whole,
            cuts={
                rank: self._global_adapter(after, min(rank, whole.rank)) if whole.layers else whole
                for rank in levels
            },
            adapter=after.adapter if self.in_place else None,
        )
        for _ in range(2):  # again without the clients if there are too many dimensions with them
            for layer in self.layers:
                layer.add_states(states)
            self._limit()
        total = sum(self.weights)
        shares = np.array(self.weights) / total if total > 0 else np.zeros(0)
        sums = Sums(levels)
        measured = [x for x in self.layers if 0 < x.dimensions.count <= self.budget.dimensions]
        for layer in measured:
            layer.measure(sums, self.clients if total > 0 else [], shares)
        counts = {"measured": len(measured), "of": len(self.state.adapter.layers)}
        numbers: dict[str, Any] = rounded({"layers": counts, **sums.ratios(self.clients)})
        return numbers

    def _limit(self) -> None:
        """Forget the clients where a layer has too many dimensions."""
        too_many = any(layer.dimensions.count > self.budget.dimensions for layer in self.layers)
        if too_many and self.measures_clients:
            self.layers = [Layer(name) for name in self.names]
            self.clients, self.weights, self.measures_clients = [], [], False

    def _global_adapter(self, state: ServerState, rank: int | None = None) -> LoraAdapter:
        return self.method.global_adapter(state, rank, self.names)


class Layer:
    """One layer's rank dimensions in a round, and the products that they make up."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.dimensions = LayerDimensions()
        self.received: list[Product] = []
        self.frozen: list[Product] = []
        self.trained: list[Product] = []

    def add_reply(self, sent: Broadcast, trained: LoraAdapter) -> None:
        """Take in what a client received and what it made of it."""
        self.received.append(self._product(sent.trainable, sent.scale_multiplier))
        self.frozen.append(self._product(sent.frozen))
        self.trained.append(self._product(trained, sent.scale_multiplier))

    def add_states(self, states: States) -> None:
        """Take in the global functions before and after the round."""
        self.before = self._product(states.before)
        self.after = self._product(states.after)
        self.cuts = {str(level): self._product(cut) for level, cut in states.cuts.items()}
        self.adapter = self._product(states.adapter)

    def _product(self, adapter: LoraAdapter | None, multiplier: float = 1.0) -> Product:
        """The layer's ``multiplier * s(r) B A``."""
        factors = adapter.layers.get(self.name) if adapter is not None else None
        if adapter is None or factors is None:
            return None
        coefficients = np.full(factors.rank, multiplier * adapter.scale(factors.rank))
        return self.dimensions.add(factors), coefficients

    def measure(self, sums: Sums, clients: Sequence[str], shares: Matrix) -> None:
        """Add the layer's numbers to the sums over layers; ``shares``: of the weight, by client."""
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
        if clients:
            received, frozen, trained = rows(self.received), rows(self.frozen), rows(self.trained)
            functions = trained + frozen
            mean = shares[None] @ functions
            sums.add("mean", [""], squared(mean))
            sums.add("noise", [""], squared(after - mean))
            sums.add("spread", [""], shares[None] @ squared(functions - mean))
            sums.add("start", clients, squared(received + frozen - before))
            sums.add("moved", clients, squared(trained - received))
        if self.adapter is not None:
            new, means = self._segments(self.adapter[0], shares, sums.segments)
            sums.add("holders", sums.names, squared(means))
            sums.add("common", sums.names, ((new @ inner) * means).sum(axis=1))
        if self.after is not None:
            numbers, scales = self.after
            block = np.ix_(numbers, numbers)
            energies = singular_energies(gram_a[block], gram_b[block]) * scales[0] ** 2
            lengths = np.sqrt(np.maximum(inner[numbers, numbers], 0.0))
            sums.add_spectrum(energies, scales * lengths)

    def _segments(
        self, new: Numbers, shares: Matrix, segments: Sequence[tuple[int, int]]
    ) -> tuple[Matrix, Matrix]:
        """Each segment after the round, and as the mean of its holders, without a scale."""
        clients = [
            (share, product[0])
            for share, product in zip(shares, self.trained, strict=False)
            if product is not None and share > 0
        ]
        weights = np.zeros(max([len(numbers) for _, numbers in clients], default=0))
        for share, numbers in clients:
            weights[: len(numbers)] += share
        new_rows = np.zeros((len(segments), self.dimensions.count))
        mean_rows = np.zeros_like(new_rows)
        for index, (low, high) in enumerate(segments):
            np.add.at(new_rows[index], new[low:high], 1.0)
            for share, numbers in clients:
                parts = (share / weights[: len(numbers)])[low:high]
                np.add.at(mean_rows[index], numbers[low:high], parts)
        return new_rows, mean_rows


class Sums:
    """Squared norms summed over the measured layers, and means over them."""

    def __init__(self, levels: Sequence[int]) -> None:
        self.segments = list(zip([0, *levels], levels, strict=False))
        """Rank dimensions (low, high] between neighbouring rank levels."""
        self.names = [str(level) for level in levels]
        self.squares: dict[tuple[str, str], float] = defaultdict(float)
        self.effective_ranks: list[float] = []
        self.energies: list[Matrix] = []

    def add(self, quantity: str, names: Iterable[str], squares: Matrix) -> None:
        """A layer's squared norms (or inner products) of a quantity, by rank level or client."""
        for name, square in zip(names, squares.tolist(), strict=True):
            self.squares[quantity, name] += square

    def add_spectrum(self, energies: Matrix, lengths: Matrix) -> None:
        """A layer's squared singular values, falling, and the norms of its rank-one products."""
        if energies.sum() > 0:
            self.effective_ranks.append(effective_rank(energies))
        self.energies.append(lengths[: self.segments[-1][1]])
        within = np.array([energies[low:high].sum() for low, high in self.segments])
        beyond = np.array([energies[high:].sum() for _, high in self.segments])
        self.add("within", self.names, within)
        self.add("beyond", self.names, beyond)
        self.add("spectrum", [""], energies.sum(keepdims=True))

    def ratios(self, clients: Sequence[str]) -> dict[str, Any]:
        """The relative numbers of the round and of these clients."""
        names = self.names
        starts = _defined(self._relative("start", client, "before") for client in clients)
        drifts = _defined(self._relative("moved", client, "before") for client in clients)
        longest = max((len(one) for one in self.energies), default=0)
        return {
            "aggregation_noise": self._relative("noise", "", "mean"),
            "client_dispersion": self._relative("spread", "", "mean"),
            "initialization_noise": {"mean": _mean(starts), "max": max(starts, default=None)},
            "client_drift": {
                "mean": _mean(drifts),
                "deviation": float(np.std(drifts)) if drifts else None,
            },
            "truncation_noise": {n: self._relative("cut", n, "after") for n in names},
            "least_truncation_noise": {n: self._relative("beyond", n, "spectrum") for n in names},
            "effective_rank": _mean(self.effective_ranks),
            "energy_share": {n: self._share(("within", n), ("spectrum", "")) for n in names},
            # The mean over the layers that have the dimension.
            "dimension_energy": [
                float(np.mean([one[j] for one in self.energies if len(one) > j]))
                for j in range(longest)
            ],
            "tail_kept": {n: self._share(("common", n), ("holders", n)) for n in names},
        }

    def _relative(self, quantity: str, name: str, reference: str) -> float | None:
        """A norm over the norm of a reference, 0 below `RESOLUTION`."""
        share = self._share((quantity, name), (reference, ""))
        if share is None:
            return None
        return math.sqrt(share) if share > RESOLUTION**2 else 0.0

    def _share(self, key: tuple[str, str], reference: tuple[str, str]) -> float | None:
        whole = self.squares.get(reference, 0.0)
        return self.squares[key] / whole if whole > 0 else None


def _defined(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def rounded(value: Any) -> Any:
    """Floats within dictionaries and lists to `DIGITS` digits; None for what is not finite."""
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [rounded(inner) for inner in value]
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    return value
