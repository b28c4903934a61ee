"""The aggregations as the papers write them: plain loops over slots and clients, in float64."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch

from prelort.adapters import LoraAdapter
from prelort.methods import Update


def weights_of(updates: Sequence[Update], weighting: str) -> list[float]:
    return [float(u.examples) if weighting == "examples" else 1.0 for u in updates]


def dimensions(adapter: LoraAdapter, name: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Row j of A and column j of B, for every slot j."""
    factors = adapter.layers[name]
    return [(factors.A[j].double(), factors.B[:, j].double()) for j in range(factors.rank)]


def segment_wise(previous: LoraAdapter, updates: Sequence[Update], weighting: str) -> dict:
    """A_j = sum_{k: r_k >= j} w_k A_kj / sum_{k: r_k >= j} w_k, B_j too; else the old value."""
    weights, result = weights_of(updates, weighting), {}
    for name in previous.layers:
        replies = [dimensions(u.adapter, name) for u in updates]
        rows, columns = [], []
        for j, (row, column) in enumerate(dimensions(previous, name)):
            holders = [k for k, reply in enumerate(replies) if len(reply) > j]
            total = sum(weights[k] for k in holders)
            if holders:
                row = sum(weights[k] * replies[k][j][0] for k in holders) / total
                column = sum(weights[k] * replies[k][j][1] for k in holders) / total
            rows.append(row)
            columns.append(column)
        result[f"{name}.lora_A.weight"] = torch.stack(rows)
        result[f"{name}.lora_B.weight"] = torch.stack(columns, dim=1)
    return result | modules_to_save(updates, weights)


def zero_padded(previous: LoraAdapter, updates: Sequence[Update], weighting: str) -> dict:
    """Pad every reply with zero slots to the global rank, then the plain weighted mean."""
    return padded_mean(previous, updates, weights_of(updates, weighting))


def norm_weighted(previous: LoraAdapter, updates: Sequence[Update]) -> dict:
    """HetLoRA: zero-padding where a client weighs |s B_k A_k|_F of the whole model."""
    norms = []
    for update in updates:
        squares = 0.0
        for name in previous.layers:
            squares += float((product(update.adapter, name) ** 2).sum())
        norms.append(squares**0.5)
    return padded_mean(previous, updates, norms)


def padded_mean(previous: LoraAdapter, updates: Sequence[Update], weights: Sequence[float]) -> dict:
    """A slot that nobody holds keeps its value."""
    result = {}
    for name, factors in previous.layers.items():
        a, b = factors.A.double().clone(), factors.B.double().clone()
        held = max(u.adapter.layers[name].rank for u in updates)
        a[:held], b[:, :held] = 0.0, 0.0
        for weight, update in zip(weights, updates, strict=True):
            for j, (row, column) in enumerate(dimensions(update.adapter, name)):
                a[j] += weight * row / sum(weights)
                b[:, j] += weight * column / sum(weights)
        result[f"{name}.lora_A.weight"] = a
        result[f"{name}.lora_B.weight"] = b
    return result | modules_to_save(updates, weights)


def replicated(
    previous: LoraAdapter, updates: Sequence[Update], weighting: str, donors: str = "highest"
) -> dict:
    """Pad every reply with the donors' weighted mean of the slot, then the plain weighted mean.

    Donors: those of the round's highest rank, or all that hold the slot.
    """
    weights, result = weights_of(updates, weighting), {}
    highest = max(u.adapter.rank for u in updates)
    for name in previous.layers:
        replies = [dimensions(u.adapter, name) for u in updates]
        rows, columns = [], []
        for j, (row, column) in enumerate(dimensions(previous, name)):
            giving = [
                k
                for k, u in enumerate(updates)
                if len(replies[k]) > j and (donors == "holders" or u.adapter.rank == highest)
            ]
            if giving:
                share = sum(weights[k] for k in giving)
                given = [sum(weights[k] * replies[k][j][i] for k in giving) / share for i in (0, 1)]
                padded = [reply[j] if len(reply) > j else given for reply in replies]
                row, column = (
                    sum(w * dimension[i] for w, dimension in zip(weights, padded, strict=True))
                    / sum(weights)
                    for i in (0, 1)
                )
            rows.append(row)
            columns.append(column)
        result[f"{name}.lora_A.weight"] = torch.stack(rows)
        result[f"{name}.lora_B.weight"] = torch.stack(columns, dim=1)
    return result | modules_to_save(updates, weights)


def by_module(
    previous: LoraAdapter,
    updates: Sequence[Update],
    drawn: Sequence[Mapping[str, torch.Tensor]],
    weighting: str,
    absent: str,
) -> dict:
    """Each slot's mean where client k trained the slots ``drawn[k]`` (layer -> indices).

    ``absent``: what a client says about a slot that it did not draw: 'nothing' (Fed-PLoRA: the
    mean is over those who drew it) or 'no change' (FSLoRA: the mean of everyone's updates).
    """
    weights, result = weights_of(updates, weighting), {}
    for name in previous.layers:
        rows, columns = [], []
        for j, (row, column) in enumerate(dimensions(previous, name)):
            change, share = [torch.zeros_like(row), torch.zeros_like(column)], 0.0
            for weight, update, chosen in zip(weights, updates, drawn, strict=True):
                if j not in chosen[name].tolist():
                    continue
                place = chosen[name].tolist().index(j)
                trained = dimensions(update.adapter, name)[place]
                change[0] += weight * (trained[0] - row)
                change[1] += weight * (trained[1] - column)
                share += weight
            total = share if absent == "nothing" else sum(weights)
            rows.append(row + change[0] / total if share else row)
            columns.append(column + change[1] / total if share else column)
        result[f"{name}.lora_A.weight"] = torch.stack(rows)
        result[f"{name}.lora_B.weight"] = torch.stack(columns, dim=1)
    return result | modules_to_save(updates, weights)


def product(adapter: LoraAdapter, name: str, first: int = 0, last: int | None = None):
    """``s(r) sum_j B_j A_j`` over the slots first <= j < last of one layer, slot by slot."""
    factors = adapter.layers[name]
    total = torch.zeros(factors.B.shape[0], factors.A.shape[1], dtype=torch.float64)
    for row, column in dimensions(adapter, name)[first:last]:
        total += torch.outer(column, row)
    return adapter.scale(factors.rank) * total


def mean_product(updates: Sequence[Update], weighting: str) -> dict:
    """``sum_k p_k s(r_k) B_k A_k`` of every layer."""
    weights = weights_of(updates, weighting)
    return {
        name: sum(w * product(u.adapter, name) for w, u in zip(weights, updates, strict=True))
        / sum(weights)
        for name in updates[0].adapter.layers
    }


def partitioned_product(
    previous: LoraAdapter, updates: Sequence[Update], levels: Sequence[int], weighting: str
) -> dict:
    """raFLoRA: ``sum_h sum_{k: r_k >= h} (n_k / N_h) s B_k[:, l:h] A_k[l:h]``.

    A partition (l, h] that nobody holds this round keeps its old product.
    """
    weights, result = weights_of(updates, weighting), {}
    for name, factors in previous.layers.items():
        total = torch.zeros(factors.B.shape[0], factors.A.shape[1], dtype=torch.float64)
        edges = sorted({0, factors.rank, *(min(level, factors.rank) for level in levels)})
        for low, high in itertools.pairwise(edges):
            holders = [k for k, u in enumerate(updates) if u.adapter.layers[name].rank >= high]
            if not holders:
                total += product(previous, name, low, high)
            share = sum(weights[k] for k in holders)
            for k in holders:
                total += weights[k] / share * product(updates[k].adapter, name, low, high)
        result[name] = total
    return result


def stepped_product(
    previous: LoraAdapter,
    updates: Sequence[Update],
    levels: Sequence[int],
    weighting: str,
    step: float,
    unchanged: float = 0.0,
) -> dict:
    """Sorted PreLort: every segment's product plus its step times the mean change of its holders.

    The step is ``ratio ** step`` times the share of the weight that holds the segment to the power
    ``unchanged``. The ratio is that of the holders' mean squared change to the square of the mean
    change, over all layers; between 1 and N^2 / sum w_k^2, the number of holders by weight.
    """
    weights = weights_of(updates, weighting)
    ends = sorted({*levels, *(update.adapter.rank for update in updates), previous.rank})
    result = {name: torch.zeros_like(product(previous, name)) for name in previous.layers}
    for low, high in itertools.pairwise([0, *ends]):
        holders = [k for k, update in enumerate(updates) if update.adapter.rank >= high]
        share = sum(weights[k] for k in holders)
        names = [name for name, factors in previous.layers.items() if factors.rank > low]
        old = {name: product(previous, name, low, high) for name in names}
        changes = {
            k: {name: product(updates[k].adapter, name, low, high) - old[name] for name in names}
            for k in holders
        }
        mean = {
            name: sum((weights[k] / share * changes[k][name] for k in holders), 0 * old[name])
            for name in names
        }
        eta = 1.0
        if holders:
            hands = share**2 / sum(weights[k] ** 2 for k in holders)
            lengths = sum(weights[k] / share * squared_length(changes[k]) for k in holders)
            ratio = min(lengths / squared_length(mean), hands)
            eta = max(ratio, 1.0) ** step * (share / sum(weights)) ** unchanged
        for name in names:
            result[name] += old[name] + eta * mean[name]
    return result


def squared_length(matrices: Mapping[str, torch.Tensor]) -> float:
    """The squared Frobenius norm over all layers."""
    return sum(float(matrix.square().sum()) for matrix in matrices.values())


def best_of_rank(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    """The nearest matrix of this rank, by a dense SVD (Eckart-Young)."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank] @ torch.diag(s[:rank]) @ vh[:rank]


def rank_of_energy(matrix: torch.Tensor, energy: float) -> int:
    """The smallest rank whose squared singular values make up this share of all of them."""
    squares = (torch.linalg.svdvals(matrix) ** 2).tolist()
    for rank in range(1, len(squares)):
        if sum(squares[:rank]) >= energy * sum(squares):
            return rank
    return len(squares)


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


def modules_to_save(updates: Sequence[Update], weights: Sequence[float]) -> dict:
    return {
        name: sum(
            w * u.adapter.modules_to_save[name].double()
            for w, u in zip(weights, updates, strict=True)
        )
        / sum(weights)
        for name in updates[0].adapter.modules_to_save
    }
