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
class Reply:
    """A client's reply until the round ends: its measured layers and its weight."""

    client: str
    weight: float
    received: LoraAdapter
    frozen: LoraAdapter | None
    scale_multiplier: float
    trained: LoraAdapter


@dataclass(frozen=True, slots=True)
class Round:
    """The measured layers of a whole round.

    Args:
        before: the global function before the round.
        after: and after it.
        cuts: rank level -> the global function at that rank, after the round.
        adapter: the global adapter where rank dimensions have kept their place, else None.
        replies: their weights sum to 1.
    """

    before: LoraAdapter
    after: LoraAdapter
    cuts: Mapping[int, LoraAdapter]
    adapter: LoraAdapter | None
    replies: Sequence[Reply]


class Collector:
    """Collects one round's replies and computes its numbers at the end.

    It keeps the measured layers of each reply: a sample that changes with the round, a function of
    the seed, the round, the cohort and the layers' shapes (`Budget.sample`).
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
        self.before = self._global_adapter(state)
        self.replies: list[Reply] = []
        self.dimensions = 0
        """Rank dimensions trained so far in the layer with the fewest."""
        self.in_place = True
        """Whether all clients received the first rank dimensions of the adapter, in their order."""

    def add(self, sent: Broadcast, update: Update) -> None:
        """Keep the measured layers of one reply."""
        received, layers = sent.trainable.bare().select(self.names), self.state.adapter.layers
        trained = update.adapter.bare().select(self.names)
        self.dimensions += min((factors.rank for factors in trained.layers.values()), default=0)
        self.in_place &= all(
            name in layers and torch.equal(factors.A, layers[name].A[: factors.rank])
            for name, factors in received.layers.items()
        )
        if self.dimensions > self.budget.dimensions:
            self.replies.clear()  # the clients are not measured, however many reply
            return
        # Copies: a view could keep a whole reply in memory.
        copies = {name: Factors(f.A.clone(), f.B.clone()) for name, f in trained.layers.items()}
        self.replies.append(
            Reply(
                client=update.client.name,
                weight=self.weight(update),
                received=received,
                frozen=None if sent.frozen is None else sent.frozen.bare().select(self.names),
                scale_multiplier=sent.scale_multiplier,
                trained=replace(trained, layers=copies),
            )
        )

    def result(self, after: ServerState) -> dict[str, Any]:
        """The round's numbers, ready for JSON; null for what is not defined, such as 0 / 0.

        By rank level (as text): what a cut to it loses, and its segment's share of the energy or
        of what was kept. ``layers``: number of measured layers, and of all.
        """
        numbers: dict[str, Any] = rounded(self.measure(after))
        return numbers

    def measure(self, after: ServerState) -> dict[str, Any]:
        """`result` before it is rounded."""
        levels = tuple(sorted(self.state.levels))
        whole = self._global_adapter(after)
        total = sum(reply.weight for reply in self.replies)
        finished = Round(
            before=self.before,
            after=whole,
            cuts={
                rank: self._global_adapter(after, min(rank, whole.rank)) if whole.layers else whole
                for rank in levels
            },
            adapter=after.adapter if self.in_place else None,
            # By name, whoever replied first: sums depend on their order.
            replies=sorted(
                (replace(r, weight=r.weight / total) for r in self.replies if total > 0),
                key=lambda reply: reply.client,
            ),
        )
        layers = [Layer(name, finished) for name in self.names]
        if any(layer.dimensions.count > self.budget.dimensions for layer in layers):
            finished = replace(finished, replies=[])
            layers = [Layer(name, finished) for name in self.names]
        sums = Sums(levels)
        measured = [x for x in layers if 0 < x.dimensions.count <= self.budget.dimensions]
        for layer in measured:
            layer.measure(sums)
        counts = {"measured": len(measured), "of": len(self.state.adapter.layers)}
        return {"layers": counts, **sums.ratios([reply.client for reply in finished.replies])}

    def _global_adapter(self, state: ServerState, rank: int | None = None) -> LoraAdapter:
        return self.method.global_adapter(state, rank, self.names).bare()


class Layer:
    """One layer's rank dimensions in a round, and the products that they make up."""

    def __init__(self, name: str, finished: Round) -> None:
        self.name = name
        self.dimensions = LayerDimensions()
        replies = finished.replies
        self.clients = [reply.client for reply in replies]
        self.shares = np.array([reply.weight for reply in replies])
        self.before = self._product(finished.before)
        self.after = self._product(finished.after)
        self.cuts = {str(level): self._product(cut) for level, cut in finished.cuts.items()}
        self.adapter = self._product(finished.adapter)
        self.received = [self._product(r.received, r.scale_multiplier) for r in replies]
        self.frozen = [self._product(reply.frozen) for reply in replies]
        self.trained = [self._product(r.trained, r.scale_multiplier) for r in replies]

    def _product(self, adapter: LoraAdapter | None, multiplier: float = 1.0) -> Product:
        """The layer's ``multiplier * s(r) B A``."""
        factors = adapter.layers.get(self.name) if adapter is not None else None
        if adapter is None or factors is None:
            return None
        coefficients = np.full(factors.rank, multiplier * adapter.scale(factors.rank))
        return self.dimensions.add(factors), coefficients

    def measure(self, sums: Sums) -> None:
        """Add the layer's numbers to the sums over layers."""
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
            new, means = self._segments(self.adapter[0], sums.segments)
            sums.add("holders", sums.names, squared(means))
            sums.add("common", sums.names, ((new @ inner) * means).sum(axis=1))
        if self.after is not None:
            numbers, scales = self.after
            block = np.ix_(numbers, numbers)
            energies = singular_energies(gram_a[block], gram_b[block]) * scales[0] ** 2
            lengths = np.sqrt(np.maximum(inner[numbers, numbers], 0.0))
            sums.add_spectrum(energies, scales * lengths)

    def _segments(self, new: Numbers, segments: Sequence[tuple[int, int]]) -> tuple[Matrix, Matrix]:
        """Each segment after the round, and as the mean of its holders, without a scale."""
        clients = [
            (share, product[0])
            for share, product in zip(self.shares, self.trained, strict=True)
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
