"""Which slots a client trains where these are not simply the first ones."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from prelort.adapters import LoraAdapter, ScaleRule
from prelort.errors import ConfigError
from prelort.methods.interface import Client
from prelort.seeds import torch_generator

Order = Callable[[int, int, str, int], Tensor]
"""(seed, round from 0, client, number of slots) -> the slots in the order of preference."""


def uniform(seed: int, round_index: int, client: str, dimensions: int) -> Tensor:
    """Drawn anew for every client and round."""
    generator = torch_generator(seed, "slots", client, round_index)
    return torch.randperm(dimensions, generator=generator)


def in_turn(seed: int, round_index: int, client: str, dimensions: int) -> Tensor:
    """A window that moves on by one slot a round, from a place drawn for the client."""
    generator = torch_generator(seed, "slots", client)
    start = int(torch.randint(dimensions, (), generator=generator)) + round_index
    return (torch.arange(dimensions) + start) % dimensions


def prefix(seed: int, round_index: int, client: str, dimensions: int) -> Tensor:
    """The first ones: what the prefix methods train."""
    return torch.arange(dimensions)


ORDERS: Mapping[str, Order] = {"uniform": uniform, "in-turn": in_turn, "prefix": prefix}


def find(name: str) -> Order:
    """A rule by its name, or the user's own as ``package.module:function``."""
    if name in ORDERS:
        return ORDERS[name]
    module, colon, attribute = name.partition(":")
    if not colon:
        raise ConfigError(
            f"selection = {name!r} is not allowed: use {', '.join(ORDERS)} or 'module:function'"
        )
    try:
        found: Order = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"selection {name!r} cannot be imported: {error}") from None
    return found


def selected(
    order: Order, seed: int, round_index: int, client: Client, adapter: LoraAdapter
) -> dict[str, Tensor]:
    """Layer -> the client's slots, rising: min(rank of client, rank of layer) of them.

    One order serves all layers; a layer with fewer slots takes what it has of it.
    """
    preferred = order(seed, round_index, client.name, adapter.rank)
    return {
        name: preferred[preferred < factors.rank][: client.rank].sort().values
        for name, factors in adapter.layers.items()
    }


def rest(dimensions: Mapping[str, Tensor], adapter: LoraAdapter) -> dict[str, Tensor]:
    """Layer -> the slots that are not among ``dimensions``, rising."""
    remaining: dict[str, Tensor] = {}
    for name, factors in adapter.layers.items():
        chosen = torch.zeros(factors.rank, dtype=torch.bool)
        chosen[dimensions[name]] = True
        remaining[name] = (~chosen).nonzero().flatten()
    return remaining


def taken(
    adapter: LoraAdapter, dimensions: Mapping[str, Tensor], *, modules_to_save: bool = True
) -> LoraAdapter:
    """These slots of every layer, as copies; layers without any are left out."""
    layers = {
        name: factors.take(dimensions[name])
        for name, factors in adapter.layers.items()
        if len(dimensions[name])
    }
    return LoraAdapter(layers, adapter.scale, adapter.modules_to_save if modules_to_save else {})


def folded(adapter: LoraAdapter, dimensions: Mapping[str, Tensor]) -> LoraAdapter | None:
    """These slots as an adapter to freeze beside the base, None if there are none.

    They count at the scale that they have in ``adapter``, whatever their number.
    """
    part = taken(adapter, dimensions, modules_to_save=False)
    if not part.layers:
        return None
    layers = {
        name: type(f)(f.A, f.B * (adapter.scale(adapter.layers[name].rank) / part.scale(f.rank)))
        for name, f in part.layers.items()
    }
    return LoraAdapter(layers, part.scale)


def scale_multiplier_of(scale: ScaleRule, adapter: LoraAdapter, rank: int, name: str) -> float:
    """By what the scale of a part of ``rank`` slots is multiplied to count as in the whole.

    Raises `ConfigError` where that differs between layers.
    """
    scale_multipliers = {
        round(scale(f.rank) / scale(min(rank, f.rank)), 12) for f in adapter.layers.values()
    }
    if len(scale_multipliers) > 1:
        raise ConfigError(
            f"method {name!r} with lora.scale_rule = {scale.kind!r} needs layers of one rank: "
            "leave lora.rank_pattern out, or use the constant rule"
        )
    return scale_multipliers.pop()
