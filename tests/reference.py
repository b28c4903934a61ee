"""The aggregations as the papers write them: plain float64 loops over dimensions and clients."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch

from prelort.adapters import LoraAdapter
from prelort.methods import Update


def weights_of(updates: Sequence[Update], weighting: str) -> list[float]:
    return [float(u.examples) if weighting == "examples" else 1.0 for u in updates]


def dimensions(adapter: LoraAdapter, name: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Row j of A and column j of B, for every dimension j."""
    factors = adapter.layers[name]
    return [(factors.A[j].double(), factors.B[:, j].double()) for j in range(factors.rank)]


def averaged(
    previous: LoraAdapter,
    updates: Sequence[Update],
    weights: Sequence[float],
    absent: str,
    chosen: Sequence[Mapping[str, torch.Tensor]] | None = None,
) -> dict:
    """The weighted mean of each rank dimension; one that nobody holds keeps its old value.

    ``absent``: what a client that lacks it says about it, 'nothing' (the mean is over its holders),
    'zero' or 'no change' (the mean is over everyone). ``chosen[k]``: the dimensions that client k
    holds (layer -> indices), where these are not the first ones.
    """
    result = {}
    for name in previous.layers:
        rows, columns = [], []
        for j, old in enumerate(dimensions(previous, name)):
            held = []
            for k, update in enumerate(updates):
                own = dimensions(update.adapter, name)
                indices = list(range(len(own))) if chosen is None else chosen[k][name].tolist()
                if j in indices:
                    held.append((weights[k], own[indices.index(j)]))
            share = sum(weight for weight, _ in held)
            everyone = share if absent == "nothing" else sum(weights)
            for i, factor in enumerate((rows, columns)):
                total = sum(weight * dimension[i] for weight, dimension in held)
                if absent == "no change":
                    total = total + (everyone - share) * old[i]
                factor.append(total / everyone if held else old[i])
        result[f"{name}.lora_A.weight"] = torch.stack(rows)
        result[f"{name}.lora_B.weight"] = torch.stack(columns, dim=1)
    return result | modules_to_save(updates, weights)


def segment_wise(previous: LoraAdapter, updates: Sequence[Update], weighting: str) -> dict:
    """A_j = sum_{k: r_k >= j} w_k A_kj / sum_{k: r_k >= j} w_k, B_j too; else the old value."""
    return averaged(previous, updates, weights_of(updates, weighting), "nothing")


def zero_padded(previous: LoraAdapter, updates: Sequence[Update], weighting: str) -> dict:
    """Pad every reply with zeros to the global rank, then the plain weighted mean."""
    return averaged(previous, updates, weights_of(updates, weighting), "zero")


def norm_weighted(previous: LoraAdapter, updates: Sequence[Update]) -> dict:
    """HetLoRA: zero-padding where a client weighs |s B_k A_k|_F of the whole model."""
    norms = [
        sum(float(product(u.adapter, name).square().sum()) for name in previous.layers) ** 0.5
        for u in updates
    ]
    return averaged(previous, updates, norms, "zero")


def replicated(
    previous: LoraAdapter, updates: Sequence[Update], weighting: str, donors: str = "highest"
) -> dict:
    """Pad every reply with the donors' weighted mean of a dimension, then the plain weighted mean.

    Donors: those of the round's highest rank, or all that hold the dimension.
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


def product(adapter: LoraAdapter, name: str, first: int = 0, last: int | None = None):
    """``s(r) sum_j B_j A_j`` over the rank dimensions first <= j < last of one layer."""
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


def predicted_product(
    previous: LoraAdapter, updates: Sequence[Update], levels: Sequence[int], weighting: str
) -> dict:
    """Sorted PreLort: the old function plus the clients' mean change, missing changes predicted."""
    weights = weights_of(updates, weighting)
    ends = sorted({*levels, *(update.adapter.rank for update in updates), previous.rank})
    result = {name: torch.zeros_like(product(previous, name)) for name in previous.layers}
    segments, along, whole = [], [], []
    for low, high in itertools.pairwise([0, *ends]):
        names = [name for name, factors in previous.layers.items() if factors.rank > low]
        old = {name: product(previous, name, low, high) for name in names}
        changes = {
            k: {name: product(update.adapter, name, low, high) - old[name] for name in names}
            for k, update in enumerate(updates)
            if update.adapter.rank >= high
        }
        segments.append((old, changes))
        units = {name: m / m.norm() for name, m in old.items() if m.norm() > 0}
        gains = {
            k: {name: (d[name] * unit).sum() for name, unit in units.items()}
            for k, d in changes.items()
        }
        own = {k: weights[k] for k in changes}
        along += [(own, gains)] if len(changes) > 1 and units else []
        whole += [(own, changes)] if len(changes) > 1 else []
    rho = agreement(along or whole)
    for old, changes in segments:
        held = sum(weights[k] for k in changes)
        number = held**2 / sum(weights[k] ** 2 for k in changes) if changes else 0.0
        for name, matrix in old.items():
            result[name] += matrix
            if changes:
                mean = sum(weights[k] * d[name] for k, d in changes.items()) / held
                prediction = number * rho / (1 + (number - 1) * rho) * mean
                missing = sum(weights) - held
                result[name] += (held * mean + missing * prediction) / sum(weights)
    return result


def agreement(segments: Sequence[tuple[Mapping[int, float], Mapping[int, dict]]]) -> float:
    """The mean inner product of two clients' vectors relative to their mean square, over pairs."""
    agreeing = pairs = 0.0
    for weights, vectors in segments:
        square = sum(weights[k] ** 2 * inner(v, v) for k, v in vectors.items())
        square /= sum(weight**2 for weight in weights.values())
        for i, j in itertools.permutations(vectors, 2):
            agreeing += weights[i] * weights[j] * inner(vectors[i], vectors[j]) / square
            pairs += weights[i] * weights[j]
    return min(max(agreeing / pairs, 0.0), 1.0) if pairs else 0.0


def inner(x: Mapping[str, torch.Tensor], y: Mapping[str, torch.Tensor]) -> float:
    """The Frobenius inner product over all layers."""
    return sum(float((x[name] * y[name]).sum()) for name in x)


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
