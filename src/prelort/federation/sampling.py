"""Sampling the clients of a round by the seed, so that every engine has the same cohorts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from prelort.config import FederationConfig, cohort_size, count_of
from prelort.errors import ConfigError
from prelort.seeds import numpy_generator

T = TypeVar("T")


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
