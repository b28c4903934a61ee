"""What a rule can protect with these clients, and which methods it works with: before training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from prelort.errors import ConfigError
from prelort.methods.interface import Client, Method, ServerState
from prelort.methods.parts import trained_part, without_zeros
from prelort.robustness import rules
from prelort.robustness.aggregator import parts


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
    probe = without_zeros(state)
    whole = method.broadcast(probe, max(clients, key=lambda client: client.rank)).trainable
    ranks = [
        len(trained_part(method, probe, client, whole, "robustness.rule")) for client in clients
    ]
    return [
        Uncovered(part.low, part.high, holders, needed)
        for part in parts(ranks)
        if (holders := len(part.holders) * cohort / len(clients)) < needed
    ]
