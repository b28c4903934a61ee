"""Rounds without a model: clients whose training adds noise to what the method lets them train."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from prelort.adapters import Factors, LoraAdapter, ScaleRule
from prelort.adapters.initial import fresh
from prelort.methods import Broadcast, Client, Method, ServerState, Update
from random_adapters import dense, random_adapter

DIMENSIONS = {"wide": (14, 9), "tall": (10, 13), "square": (11, 11)}
"""Layer -> (d_in, d_out): every dimension is above the ranks, so that cutting a rank tells."""
R = 8
"""The global rank."""
RULES = [ScaleRule("constant", 2.0), ScaleRule("rslora", 3.0)]


LEVELS = (2, 5, 8)


def start(
    rank: int | Sequence[int] = R, rule: ScaleRule = RULES[0], levels: Sequence[int] = LEVELS
) -> ServerState:
    """A global adapter in which neither factor is zero, as after some rounds."""
    adapter = random_adapter(rank, 1, scale=rule, dimensions=DIMENSIONS)
    return ServerState(adapter, levels=tuple(levels))


def untrained(
    rank: int | Sequence[int] = R, rule: ScaleRule = RULES[0], levels: Sequence[int] = LEVELS
) -> ServerState:
    """A true first state: B is zero."""
    first = start(rank, rule, levels)
    return replace(first, adapter=fresh(first.adapter, 7))


def clients_of(ranks: Sequence[int], examples: Sequence[int] = (3, 1, 10, 4, 7)) -> list[Client]:
    """Clients of these ranks with unequal numbers of examples."""
    return [Client(f"site-{k}", rank, examples[k]) for k, rank in enumerate(ranks)]


def trained(sent: Broadcast, seed: int, dtype: torch.dtype = torch.float32) -> LoraAdapter:
    """The adapter of a reply: what was trained has moved a lot, all else is as it was sent."""
    generator = torch.Generator().manual_seed(seed)

    def moved(tensor: Tensor) -> Tensor:
        return (tensor + torch.randn(tensor.shape, generator=generator)).to(dtype)

    a = "A" in sent.trains
    b = "B" in sent.trains and not sent.personal
    # By name: what comes from a checkpoint has its layers in any order.
    layers = {
        name: Factors(moved(f.A) if a else f.A, moved(f.B) if b else f.B)
        for name, f in sorted(sent.trainable.layers.items())
    }
    modules_to_save = sent.trainable.modules_to_save
    if not sent.personal:
        modules_to_save = {name: moved(tensor) for name, tensor in sorted(modules_to_save.items())}
    return replace(sent.trainable, layers=layers, modules_to_save=modules_to_save)


def replies(
    method: Method,
    state: ServerState,
    clients: Sequence[Client],
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> list[Update]:
    """A reply of each client to what it is sent in this state."""
    return [
        Update(client, trained(method.broadcast(state, client), seed + k, dtype), client.examples)
        for k, client in enumerate(clients)
    ]


def aggregate(method: Method, state: ServerState, updates: Sequence[Update]) -> ServerState:
    """The state after a round of these replies."""
    aggregator = method.aggregator(state)
    for update in updates:
        aggregator.add(update)
    return aggregator.result()


def function_of(sent: Broadcast, adapter: LoraAdapter | None = None) -> dict[str, Tensor]:
    """The dense matrices that the client adds to its base: its adapter and what is frozen.

    ``adapter``: what the client trained, or what it was sent.
    """
    own = dense(adapter if adapter is not None else sent.trainable)
    frozen = dense(sent.frozen) if sent.frozen is not None else {}
    return {name: sent.scale_multiplier * p + frozen.get(name, 0.0) for name, p in own.items()}


def assert_near(
    found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5
) -> None:
    """Equal matrices, layer by layer, up to this share of the expected norm."""
    assert found.keys() == expected.keys()
    for name, matrix in expected.items():
        error = float((found[name] - matrix).norm())
        assert error <= tolerance * max(float(matrix.norm()), 1.0), f"{name}: off by {error}"
