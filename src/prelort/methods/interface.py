"""What a method is. One published method, one file, one class that follows `Method`.

A method says what a client of rank r receives (`broadcast`), how it trains (`objective`), and how
the server folds the replies in (`aggregator`). Everything else is the same for every method.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

from torch import Tensor

from prelort.adapters import LoraAdapter
from prelort.config import MethodConfig
from prelort.methods.objective import Objective


@dataclass(frozen=True, slots=True)
class Client:
    """What the server knows of a client."""

    name: str
    rank: int
    examples: int


@dataclass(frozen=True, slots=True)
class Update:
    """A client's checked reply: its trained adapter and the number of examples it stands for."""

    client: Client
    adapter: LoraAdapter
    examples: int


@dataclass(frozen=True, slots=True)
class ServerState:
    """What the server keeps between rounds; all of it is checkpointed.

    ``round`` counts finished rounds. ``memory`` is the method's own (server momentum, say).
    """

    adapter: LoraAdapter
    round: int = 0
    memory: Mapping[str, Tensor] = field(default_factory=dict)


class Aggregator(Protocol):
    """Folds one round's replies into the global adapter, one at a time and in a fixed order."""

    def add(self, update: Update) -> None:
        """Fold in one reply; afterwards the update can be freed."""
        ...

    def result(self) -> ServerState:
        """The state after the round. Needs at least one reply."""
        ...


class Method(Protocol):
    """A published algorithm for clients of mixed ranks."""

    name: ClassVar[str]
    summary: ClassVar[str]
    """One line for `prelort methods`."""
    paper: ClassVar[str]
    """Authors or title, and arXiv number."""

    def __init__(self, config: MethodConfig, levels: Sequence[int], seed: int) -> None:
        """``levels``: the distinct ranks of all clients, rising."""
        ...

    def check(self, clients: Sequence[Client]) -> None:
        """Raise `ConfigError` if the method cannot serve these clients."""
        ...

    def broadcast(self, state: ServerState, client: Client) -> LoraAdapter:
        """The adapter that the client receives and trains: views into the state, no copies."""
        ...

    def objective(self, client: Client) -> Objective:
        """What the client optimises."""
        ...

    def aggregator(self, state: ServerState) -> Aggregator:
        """An aggregator for one round that starts from ``state``."""
        ...
