"""The aggregations as the papers write them: plain loops over slots and clients, in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from prelort.adapters import LoraAdapter
from prelort.methods import Update


def weights_of(updates: Sequence[Update], weighting: str) -> list[float]:
    return [float(u.examples) if weighting == "examples" else 1.0 for u in updates]


def slots(adapter: LoraAdapter, name: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Row j of A and column j of B, for every slot j."""
    factors = adapter.layers[name]
    return [(factors.A[j].double(), factors.B[:, j].double()) for j in range(factors.rank)]


def segment_wise(previous: LoraAdapter, updates: Sequence[Update], weighting: str) -> dict:
    """A_j = sum_{k: r_k >= j} w_k A_kj / sum_{k: r_k >= j} w_k, B_j too; else the old value."""
    weights, result = weights_of(updates, weighting), {}
    for name in previous.layers:
        replies = [slots(u.adapter, name) for u in updates]
        rows, columns = [], []
        for j, (row, column) in enumerate(slots(previous, name)):
            holders = [k for k, reply in enumerate(replies) if len(reply) > j]
            total = sum(weights[k] for k in holders)
            if holders:
                row = sum(weights[k] * replies[k][j][0] for k in holders) / total
                column = sum(weights[k] * replies[k][j][1] for k in holders) / total
            rows.append(row)
            columns.append(column)
        result[f"{name}.lora_A.weight"] = torch.stack(rows)
        result[f"{name}.lora_B.weight"] = torch.stack(columns, dim=1)
    return result | extras(updates, weights)


def zero_padded(previous: LoraAdapter, updates: Sequence[Update], weighting: str) -> dict:
    """Pad every reply with zero slots to the global rank, then the plain weighted mean."""
    weights, result = weights_of(updates, weighting), {}
    for name, factors in previous.layers.items():
        a = torch.zeros(factors.A.shape, dtype=torch.float64)
        b = torch.zeros(factors.B.shape, dtype=torch.float64)
        for weight, update in zip(weights, updates, strict=True):
            for j, (row, column) in enumerate(slots(update.adapter, name)):
                a[j] += weight * row / sum(weights)
                b[:, j] += weight * column / sum(weights)
        result[f"{name}.lora_A.weight"] = a
        result[f"{name}.lora_B.weight"] = b
    return result | extras(updates, weights)


def federated_average(updates: Sequence[Update], weighting: str) -> dict:
    """sum_k p_k X_k of every tensor; all replies have the same shapes."""
    weights = weights_of(updates, weighting)
    return {
        name: sum(
            w * u.adapter.tensors()[name].double() for w, u in zip(weights, updates, strict=True)
        )
        / sum(weights)
        for name in updates[0].adapter.tensors()
    }


def extras(updates: Sequence[Update], weights: Sequence[float]) -> dict:
    return {
        name: sum(
            w * u.adapter.extras[name].double() for w, u in zip(weights, updates, strict=True)
        )
        / sum(weights)
        for name in updates[0].adapter.extras
    }
