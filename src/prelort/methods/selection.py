"""Selecting the rank dimensions that a client trains, where they are not the first ones."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from prelort.adapters import Factors, LoraAdapter
from prelort.errors import ConfigError
from prelort.methods.interface import Client
from prelort.seeds import torch_generator

Order = Callable[[int, int, str, int], Tensor]
"""(seed, round from 0, client, number of rank dimensions) -> dimensions in order of preference."""


def uniform(seed: int, round_index: int, client: str, dimensions: int) -> Tensor:
    """Drawn anew for every client and round."""
    # The word "slots" is part of the seed: another one would give other draws.
    generator = torch_generator(seed, "slots", client, round_index)
    return torch.randperm(dimensions, generator=generator)


def in_turn(seed: int, round_index: int, client: str, dimensions: int) -> Tensor:
    """A window that moves by one dimension a round, from a place drawn for the client."""
    generator = torch_generator(seed, "slots", client)
    start = int(torch.randint(dimensions, (), generator=generator)) + round_index
    return (torch.arange(dimensions) + start) % dimensions


def prefix(seed: int, round_index: int, client: str, dimensions: int) -> Tensor:
    """The first ones: what the prefix methods train."""
    return torch.arange(dimensions)


ORDERS: Mapping[str, Order] = {"uniform": uniform, "in-turn": in_turn, "prefix": prefix}


def find_order(name: str) -> Order:
    """A rule by its name, or the user's own as ``package.module:function``.

    Raises `ConfigError` for a name that is neither.
    """
    if name in ORDERS:
        return ORDERS[name]
    module, colon, attribute = name.partition(":")
    if not colon:
        raise ConfigError(
            f"selection = {name!r} is not allowed: use {', '.join(ORDERS)} or 'module:function'"
        )
    try:
        order: Order = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"selection {name!r} cannot be imported: {error}") from None
    return order


def select(
    order: Order, seed: int, round_index: int, client: Client, adapter: LoraAdapter
) -> dict[str, Tensor]:
    """Layer -> the client's dimensions, rising: int64 [min(rank of client, rank of layer)].

    One order serves all layers; a layer of a lower rank takes those of it that it has.
    """
    preferred = order(seed, round_index, client.name, adapter.rank)
    return {
        name: preferred[preferred < factors.rank][: client.rank].sort().values
        for name, factors in adapter.layers.items()
    }


def complement(dimensions: Mapping[str, Tensor], adapter: LoraAdapter) -> dict[str, Tensor]:
    """Layer -> the dimensions that are not among ``dimensions``, rising: int64."""
    others: dict[str, Tensor] = {}
    for name, factors in adapter.layers.items():
        free = torch.ones(factors.rank, dtype=torch.bool)
        free[dimensions[name]] = False
        others[name] = free.nonzero().flatten()
    return others


def above(rank: int, adapter: LoraAdapter) -> dict[str, Tensor]:
    """Layer -> the dimensions beyond the first ``rank``: int64."""
    return {n: torch.arange(min(rank, f.rank), f.rank) for n, f in adapter.layers.items()}


def take(adapter: LoraAdapter, dimensions: Mapping[str, Tensor]) -> LoraAdapter:
    """These dimensions of every layer, as copies; layers without any are left out."""
    layers = {
        name: factors.take(dimensions[name])
        for name, factors in adapter.layers.items()
        if len(dimensions[name])
    }
    return LoraAdapter(layers, adapter.scale, adapter.modules_to_save)


def freeze(adapter: LoraAdapter, dimensions: Mapping[str, Tensor]) -> LoraAdapter | None:
    """These dimensions as an adapter to freeze beside the base; None if there are none.

    They count at the scale that they have in ``adapter``, whatever their number.
    """
    part = take(adapter, dimensions)
    if not part.layers:
        return None
    layers = {
        name: Factors(f.A, f.B * (adapter.scale(adapter.layers[name].rank) / part.scale(f.rank)))
        for name, f in part.layers.items()
    }
    return LoraAdapter(layers, part.scale)


def scale_multiplier_of(adapter: LoraAdapter, rank: int, method: str) -> float:
    """The multiplier with which a part of ``rank`` dimensions counts as in the whole: s(R) / s(r).

    Raises `ConfigError` naming ``method`` where it differs between layers.
    """
    scale = adapter.scale
    multipliers = {
        round(scale(f.rank) / scale(min(rank, f.rank)), 12) for f in adapter.layers.values()
    }
    if len(multipliers) > 1:
        raise ConfigError(
            f"method {method!r} with lora.scale_rule = {scale.kind!r} needs layers of one rank: "
            "leave lora.rank_pattern out, or use the constant rule"
        )
    return multipliers.pop()
