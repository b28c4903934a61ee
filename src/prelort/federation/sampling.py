"""Which clients take part in a round: drawn by the seed, the same on every engine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

from prelort.config import FederationConfig
from prelort.errors import ConfigError
from prelort.seeds import numpy_generator

T = TypeVar("T")


def count_of(wanted: int | float, available: int) -> int:
    """A number of clients as it is, or a share of the available ones (rounded up, at least 1)."""
    if isinstance(wanted, int):
        return wanted
    return max(1, math.ceil(wanted * available - 1e-9))


def sample(clients: Sequence[T], wanted: int | float, *, seed: int, round_index: int) -> list[T]:
    """The clients of one round, in the order of ``clients`` (which must not vary)."""
    count = min(count_of(wanted, len(clients)), len(clients))
    generator = numpy_generator(seed, "clients", round_index)
    chosen = generator.choice(len(clients), size=count, replace=False)
    return [clients[index] for index in sorted(chosen)]


def min_connected(federation: FederationConfig) -> int:
    """The clients that must be there before a round begins, where they come and go."""
    per_round, quorum = federation.clients_per_round, federation.quorum
    wanted = federation.min_clients
    if wanted is None:
        wanted = per_round if isinstance(per_round, int) else 1
    # With fewer than the quorum a round could only fail.
    return max(wanted, quorum if isinstance(quorum, int) else 1)


def check_numbers(clients: int, per_round: int | float, quorum: int | float) -> None:
    """Raise `ConfigError` where the numbers of clients cannot work out."""
    if isinstance(per_round, int) and per_round > clients:
        raise ConfigError(
            f"federation.clients_per_round = {per_round}, but there are {clients} clients: set it "
            f"to {clients} or fewer, or to a share such as 1.0"
        )
    asked = min(count_of(per_round, clients), clients)
    needed = count_of(quorum, asked)
    if needed > asked:
        raise ConfigError(
            f"federation.quorum = {quorum} needs {needed} replies, but a round asks {asked} of "
            f"{clients} clients: lower the quorum or raise federation.clients_per_round"
        )
