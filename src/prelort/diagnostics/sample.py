"""Sampling the layers to measure in a round, so that diagnostics cost less than aggregation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from prelort.adapters import LoraAdapter
from prelort.seeds import torch_generator


@dataclass(frozen=True, slots=True)
class Budget:
    """What measuring a round may cost.

    Args:
        least: multiply-adds that a round may always spend on inner products of rank dimensions.
        per_element: multiply-adds for each number that the clients send.
        dimensions: maximum number of rank dimensions of a layer, of all clients together; with
            more of them the clients are not measured.
    """

    least: float = 1e8
    per_element: float = 1.5
    dimensions: int = 2048

    def sample(
        self, adapter: LoraAdapter, ranks: Sequence[int], seed: int, round_index: int
    ) -> list[str]:
        """Names of the layers to measure in a round (from 0) whose clients have these ranks.

        The inner products of K rank dimensions take ``(d_in + d_out) K^2 / 2`` multiply-adds a
        layer. Where all layers exceed the budget, as many as fit are measured, at least one: a
        window that moves on each round, over an order drawn by the seed.
        """
        names = sorted(adapter.layers)
        elements = cost = 0.0
        for factors in adapter.layers.values():
            width = factors.A.shape[1] + factors.B.shape[0]
            trained = sum(min(rank, factors.rank) for rank in ranks)
            elements += width * trained
            cost += width * (trained + 2 * factors.rank) ** 2 / 2
        budget = max(self.least, self.per_element * elements)
        if cost <= budget:
            return names
        count = max(1, int(len(names) * budget / cost))
        generator = torch_generator(seed, "measured layers")
        order = torch.randperm(len(names), generator=generator).tolist()
        window = [order[(round_index * count + i) % len(names)] for i in range(count)]
        return sorted(names[index] for index in window)
