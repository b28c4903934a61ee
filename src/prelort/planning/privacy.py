"""What ``[privacy]`` means for a configuration, before anything is trained."""

from __future__ import annotations

from prelort.config import Config
from prelort.data.ranks import assign
from prelort.errors import ConfigError
from prelort.privacy.run import ledger_of


def sentences(config: Config) -> list[str]:
    """The noise that the budget asks for, in clip norms, and on which rank dimensions.

    Raises `ConfigError` where the number of clients is not configured.
    """
    clients, federation = config.partition.clients, config.federation
    if clients is None:
        raise ConfigError("privacy.epsilon needs partition.clients to be planned with")
    ledger = ledger_of(config.privacy, clients, federation.clients_per_round, federation.rounds)
    expected = ledger.rate * clients
    ranks = assign(config.ranks, [0] * clients, config.seed)
    lines = [
        f"Privacy: epsilon = {ledger.epsilon:g} at delta = {ledger.delta:g} over "
        f"{ledger.max_releases} rounds in which each of {clients} clients takes part with "
        f"probability {ledger.rate:.3g} ({expected:.3g} are expected) needs noise of "
        f"{ledger.noise_multiplier:.3g} clip norms on every number of the sum."
    ]
    for rank in sorted(set(ranks)):
        holders = sum(own >= rank for own in ranks)
        noise = ledger.noise_multiplier / (ledger.rate * holders)
        lines.append(
            f"Mean over the {holders} holders of rank dimension {rank}: noise of {noise:.2g} clip "
            "norms on every number."
        )
    return lines
