"""What ``[privacy]`` means for a configuration, before anything is trained."""

from __future__ import annotations

import math

from prelort.config import Config
from prelort.data.ranks import assign
from prelort.errors import ConfigError
from prelort.privacy.example import example_privacy
from prelort.privacy.run import clients_of_a_round, ledger_of, mechanism_of
from prelort.training.private import budget_of
from prelort.training.settings import LocalTraining

EXAMPLES = (100, 1000, 10_000)
"""Sizes of clients to plan examples' privacy for: the server does not know the sites'."""


def sentences(config: Config) -> list[str]:
    """The noise that the budget asks for, in clip norms, and on which numbers.

    Raises `ConfigError` where the number of clients is not configured, which examples' privacy does
    not depend on.
    """
    if config.privacy.of_examples:
        return _of_examples(config)
    clients, federation = config.partition.clients, config.federation
    if clients is None:
        raise ConfigError("privacy.epsilon needs partition.clients to be planned with")
    ledger = ledger_of(config.privacy, clients, federation.clients_per_round, federation.rounds)
    budget = ledger.budget
    noise, _ = mechanism_of(config.privacy, ledger).multipliers()
    ranks = assign(config.ranks, [0] * clients, config.seed)
    sampled = clients_of_a_round(clients, federation.clients_per_round)
    at_clients = config.privacy.secure_aggregation
    may_drop_out = sampled - math.ceil(config.privacy.threshold * sampled - 1e-9)
    who = (
        f"{sampled} of {clients} clients take part and add the noise (who does is no secret from "
        "the server, so it is calibrated to clients that always do)"
        if at_clients
        else f"each of {clients} clients takes part with probability {budget.rate:.3g} "
        f"({sampled} are expected)"
    )
    lines = [
        f"Privacy: epsilon = {budget.epsilon:g} at delta = {budget.delta:g} over "
        f"{budget.releases} rounds in which {who} needs noise of {noise:.3g} clip norms on every "
        "number of the sum."
    ]
    for rank in sorted(set(ranks)):
        holders = sum(own >= rank for own in ranks)
        expected = sampled / clients * holders
        total = noise
        if at_clients:  # those who stay have enough without those who may drop out
            adding = sampled if config.privacy.hide_ranks else expected
            fewest = max(adding - may_drop_out, config.privacy.min_holders)
            total *= math.sqrt(max(adding / fewest, 1.0))
        lines.append(
            f"A mean over the {holders} holders of rank dimension {rank} has noise of "
            f"{total / expected:.2g} clip norms on every number."
        )
    return lines


def _of_examples(config: Config) -> list[str]:
    private, training = example_privacy(config.privacy), LocalTraining.of(config.training)
    assert private is not None
    rounds = config.federation.rounds
    lines = [
        f"Privacy: epsilon = {private.epsilon:g} at delta = {private.delta:g} for each training "
        f"example, over {rounds} rounds as if its client took part in all of them."
    ]
    for examples in EXAMPLES:
        if private.delta >= 1 / examples:
            continue
        budget = budget_of(private, examples, training, rounds)
        noise = budget.noise_multiplier()
        lines.append(
            f"A client of {examples:,} examples draws each with probability {budget.rate:.3g} in "
            f"each of {budget.releases:,} steps: its mean gradient has noise of "
            f"{noise / (budget.rate * examples):.2g} clip norms on every number."
        )
    return lines
