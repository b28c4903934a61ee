"""What ``[privacy]`` means for a configuration, before anything is trained."""

from __future__ import annotations

from prelort.config import Config
from prelort.data.ranks import assign
from prelort.errors import ConfigError
from prelort.privacy.run import ledger_of, mechanism_of


def sentences(config: Config) -> list[str]:
    """The noise that the budget asks for, in clip norms, and on which rank dimensions.

    Raises `ConfigError` where the number of clients is not configured.
    """
    clients, federation = config.partition.clients, config.federation
    if clients is None:
        raise ConfigError("privacy.epsilon needs partition.clients to be planned with")
    ledger = ledger_of(config.privacy, clients, federation.clients_per_round, federation.rounds)
    budget = ledger.budget
    noise, _ = mechanism_of(config.privacy, ledger).multipliers()
    ranks = assign(config.ranks, [0] * clients, config.seed)
    lines = [
        f"Privacy: epsilon = {budget.epsilon:g} at delta = {budget.delta:g} over "
        f"{budget.releases} rounds in which each of {clients} clients takes part with probability "
        f"{budget.rate:.3g} ({budget.rate * clients:.3g} are expected) needs noise of {noise:.3g} "
        "clip norms on every number of the sum."
    ]
    for rank in sorted(set(ranks)):
        holders = sum(own >= rank for own in ranks)
        lines.append(
            f"A mean over the {holders} holders of rank dimension {rank} has noise of "
            f"{noise / (budget.rate * holders):.2g} clip norms on every number."
        )
    return lines
