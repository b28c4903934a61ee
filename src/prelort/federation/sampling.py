"""Sampling the clients of a round by the seed, so that every engine has the same cohorts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

from prelort.config import FederationConfig
from prelort.errors import ConfigError
from prelort.seeds import numpy_generator

T = TypeVar("T")

CLIENTS_PER_ROUND = 6
"""How many clients train in a round, if there are so many and no number is configured."""


def count_of(number: int | float, available: int) -> int:
    """An int as it is; a float as that share of ``available``, rounded up, at least 1."""
    if isinstance(number, int):
        return number
    return max(1, math.ceil(number * available - 1e-9))


def cohort_size(per_round: int | float | None, clients: int) -> int:
    """How many of the clients train in a round, for ``federation.clients_per_round``."""
    return min(count_of(CLIENTS_PER_ROUND if per_round is None else per_round, clients), clients)


def sample(
    clients: Sequence[T], per_round: int | float | None, *, seed: int, round_index: int
) -> list[T]:
    """The clients of one round, in the order of ``clients`` (which must not vary)."""
    count = cohort_size(per_round, len(clients))
    generator = numpy_generator(seed, "clients", round_index)
    chosen = generator.choice(len(clients), size=count, replace=False)
    return [clients[index] for index in sorted(chosen)]


def min_connected(federation: FederationConfig) -> int:
    """The number of clients that must be connected before a round begins."""
    per_round, quorum = federation.clients_per_round, federation.quorum
    needed = federation.min_clients
    if needed is None:
        needed = per_round if isinstance(per_round, int) else 1
    # With fewer than the quorum a round could only fail.
    return max(needed, quorum if isinstance(quorum, int) else 1)


def check_numbers(clients: int, per_round: int | float | None, quorum: int | float) -> None:
    """Raise `ConfigError` for a cohort or a quorum that this number of clients cannot fill."""
    if isinstance(per_round, int) and per_round > clients:
        raise ConfigError(
            f"federation.clients_per_round = {per_round}, but there are {clients} clients: set it "
            f"to {clients} or fewer, or to a share such as 1.0"
        )
    cohort = cohort_size(per_round, clients)
    needed = count_of(quorum, cohort)
    if needed > cohort:
        raise ConfigError(
            f"federation.quorum = {quorum} needs {needed} replies, but a round trains {cohort} of "
            f"{clients} clients: lower the quorum or raise federation.clients_per_round"
        )
