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
    """How many clients must stay, and the noise that the budget asks for, in clip norms.

    Raises `ConfigError` where the number of clients is not configured, which examples' privacy does
    not depend on.
    """
    privacy, lines = config.privacy, []
    if privacy.of_examples:
        lines += _of_examples(config)
    if privacy.of_clients:
        lines += _of_clients(config)
    if privacy.secure_aggregation:
        lines += _masked(config)
    return lines or [
        "Privacy: nothing is guaranteed, since privacy.epsilon and privacy.secure_aggregation are "
        "not set. The server sees the adapter of each client."
    ]


def _clients(config: Config) -> int:
    if config.partition.clients is None:
        raise ConfigError("[privacy] needs partition.clients to be planned with")
    return config.partition.clients


def _masked(config: Config) -> list[str]:
    """How many of a round's clients must stay, and which rank dimensions have too few holders."""
    privacy, clients = config.privacy, config.partition.clients
    of_holders = (
        f"(privacy.threshold), and {privacy.min_holders} of those that hold a rank dimension "
        "(privacy.min_holders): else its sum is not opened."
    )
    if clients is None:
        return [
            f"Secure aggregation: a share of {privacy.threshold:g} of a round's clients must stay "
            f"to its end {of_holders}"
        ]
    sampled = clients_of_a_round(clients, config.federation.clients_per_round)
    stay = max(math.ceil(privacy.threshold * sampled - 1e-9), privacy.min_holders)
    ranks = assign(config.ranks, [0] * clients, config.seed)
    if privacy.hide_ranks:  # whoever is gone may have held any dimension
        holders = [sum(own >= rank for own in ranks) for rank in set(ranks)]
        fewest = min((one for one in holders if one >= privacy.min_holders), default=clients)
        stay = max(stay, clients - fewest + privacy.min_holders)
        of_holders = (
            "(privacy.threshold, and privacy.min_holders even if all that are gone held the same "
            "rank dimension): else no sum is opened."
        )
    lines = [
        f"Secure aggregation: {stay} of a round's {sampled} clients must stay to its end "
        + of_holders
    ]
    for rank in sorted(set(ranks)):
        expected = sampled / clients * sum(own >= rank for own in ranks)
        if expected < privacy.min_holders:
            lines.append(
                f"A round has {expected:.3g} holders of rank dimension {rank} on average: those "
                f"with fewer than {privacy.min_holders} leave it as it is."
            )
    return lines


def _of_clients(config: Config) -> list[str]:
    clients, federation = _clients(config), config.federation
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
