"""What a rule can protect with these clients, and which methods it works with: before training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from prelort.adapters import Factors, LoraAdapter
from prelort.errors import ConfigError
from prelort.methods.interface import Client, Method, ServerState
from prelort.robustness import rules
from prelort.robustness.aggregator import parts
from prelort.seeds import torch_generator


@dataclass(frozen=True, slots=True)
class Uncovered:
    """The rank dimensions low < j <= high: too few of a round's clients hold them for the rule."""

    low: int
    high: int
    holders: float
    """In a round, on average."""
    needed: int


def check(
    rule: rules.Rule,
    method: Method,
    state: ServerState,
    clients: Sequence[Client],
    cohort: int,
    attackers: int,
) -> list[Uncovered]:
    """The rank segments that the rule does not cover in a usual round.

    Args:
        rule: of `rules`.
        method: its broadcasts must be prefixes of one adapter, so that changes can be compared.
        state: before the round.
        clients: of the federation.
        cohort: how many of them train in a round.
        attackers: how many of these may be malicious.

    Raises:
        ConfigError: where nothing is covered, or the method's clients train other things each.
    """
    needed = rules.needed(rule, attackers)
    if cohort < needed:
        raise ConfigError(
            f"robustness.rule = {rule!r} needs {needed} clients in a round of which {attackers} "
            f"may be malicious, but a round has {cohort}: raise federation.clients_per_round or "
            "lower robustness.attackers"
        )
    ranks = _ranks(method, state, clients)
    return [
        Uncovered(part.low, part.high, holders, needed)
        for part in parts(ranks)
        if (holders := len(part.holders) * cohort / len(clients)) < needed
    ]


def _ranks(method: Method, state: ServerState, clients: Sequence[Client]) -> list[int]:
    """The rank of each client's broadcast.

    Raises `ConfigError` unless all broadcasts are prefixes of one adapter, for some state in which
    no factor is zero.
    """
    probe = replace(state, adapter=_without_zeros(state.adapter))
    highest = max(clients, key=lambda client: client.rank)
    whole = method.broadcast(probe, highest).trainable
    ranks = []
    for client in clients:
        sent = method.broadcast(probe, client).trainable
        expected = whole.prefix(sent.rank).tensors() if sent.rank <= whole.rank else {}
        for name, tensor in sent.tensors().items():
            if name not in expected or not torch.equal(tensor, expected[name]):
                raise ConfigError(
                    f"robustness.rule is not possible with method {method.name!r} here: its "
                    "clients do not train prefixes of one adapter, so their changes cannot be "
                    "compared"
                )
        ranks.append(sent.rank)
    return ranks


def _without_zeros(adapter: LoraAdapter) -> LoraAdapter:
    """The adapter with another B: at the beginning it is zero, and zeros hide a factor on it."""
    generator = torch_generator(0, "probe")
    layers = {
        name: Factors(f.A, torch.randn(f.B.shape, generator=generator, dtype=f.B.dtype))
        for name, f in adapter.layers.items()
    }
    return replace(adapter, layers=layers)
