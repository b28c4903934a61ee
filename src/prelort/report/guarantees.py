"""What a run guaranteed to whom, and what it did not, in sentences for its page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prelort.history import RunHistory


def guarantees(config: Mapping[str, Any], history: RunHistory) -> tuple[list[str], list[str]]:
    """What was guaranteed, and what was not; both empty unless a run was to protect something.

    ``config``: the run's values; ``history``: with the epsilon that has been spent.
    """
    privacy, given, not_given = config.get("privacy", {}), list[str](), list[str]()
    masked, rule = privacy.get("secure_aggregation", False), _rule(config)
    if history.epsilon is not None:
        examples = privacy.get("unit") == "example"
        spent = f"({history.epsilon:.3g}, {privacy['delta']:g})-differential privacy"
        of = f"of the budget of {privacy['epsilon']:g}"
        if examples:
            given.append(
                f"{spent} {of} for each training example of the clients, less of those that have "
                "spent less: against whoever sees what a client sent, the server too."
            )
            not_given.append("What all of a client's examples have in common, and how many it has.")
        else:
            who = "the server too" if masked else "but the server, which adds the noise"
            given.append(
                f"{spent} {of} for each client: against whoever sees the adapters and what was "
                f"measured of them on rows that are no client's, {who}."
            )
            ranks = "" if privacy.get("hide_ranks") else ", ranks"
            stated = f"Who took part and failed{ranks} and numbers of examples"
            not_given.append(f"{stated}." if masked else f"{stated}, and losses: all on this page.")
        if _measured_at_clients(config):
            not_given.append("What was measured on the clients' rows, which is exact.")
        not_given.append("Other runs on the same clients: their budgets add up.")
    if masked:
        given.append(
            "Secure aggregation: the server got sums of the replies of "
            f"{privacy['min_holders']} clients or more, no single one."
        )
        if privacy.get("hide_ranks"):
            given.append(
                "Hidden ranks: the server learnt how many clients hold each rank dimension, and "
                "not which."
            )
            not_given.append("The rank of a client that was absent when the run was started again.")
        if history.epsilon is None:
            not_given.append("What the sums say of a client: they are exact.")
        not_given.append("A server that deviates from the protocol.")
    if rule is not None:
        given.append(f"Malicious clients: the rule {rule!r} worked on all changes.")
        not_given.append(
            "Poisoning within what honest clients do, and ranks with too few holders: see the "
            "incidents."
        )
    return given, not_given


def _rule(config: Mapping[str, Any]) -> str | None:
    rule = config.get("robustness", {}).get("rule", "none")
    return None if rule == "none" else str(rule)


def _measured_at_clients(config: Mapping[str, Any]) -> bool:
    """Whether metrics of the page are of rows that clients hold."""
    evaluation, data = config.get("evaluation", {}), config.get("data", {})
    at_clients = evaluation.get("at_clients", False) or evaluation.get("on") == "validation"
    return at_clients or data.get("test") is None
