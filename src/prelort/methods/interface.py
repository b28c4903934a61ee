"""What a method is. One published method, one file, one class that follows `Method`.

A method says what a client of rank r receives (`broadcast`), how it trains (`objective`), how the
server folds the replies in (`aggregator`), and what the global adapter of a rank is (`global_adapter`).
Everything else is the same for every method.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Protocol

from torch import Tensor

from prelort.adapters import LoraAdapter, Trained
from prelort.config import MethodConfig
from prelort.methods.objective import Objective


@dataclass(frozen=True, slots=True)
class Client:
    """What the server knows of a client. Its rank may change from round to round."""

    name: str
    rank: int
    examples: int


@dataclass(frozen=True, slots=True)
class Broadcast:
    """What one client receives for one round, and which part of it learns.

    The reply holds the trained factors of ``trainable``, in its shapes (the prefix shapes of one
    rank), and the extras.
    """

    trainable: LoraAdapter
    frozen: LoraAdapter | None = None
    """A second adapter beside the base that does not learn: what is folded into it this round."""
    trains: Trained = "AB"
    scale_multiplier: float = 1.0
    """Multiplies the scale of ``trainable`` while it trains."""
    seeded_factors: Literal["nothing", "A", "A and B"] = "nothing"
    """Which factors need not travel: A is `draw_a` of ``factor_seed`` at the global rank, B zero."""
    factor_seed: int = 0
    personal: bool = False
    """B and the extras stay with the client, from round to round; they neither come nor go."""


@dataclass(frozen=True, slots=True)
class Update:
    """A client's checked reply: its trained adapter and the number of examples it stands for.

    Where only one factor was trained the other is as it was broadcast. ``client.rank`` is the rank
    that the client had when it was asked; a client that prunes itself answers with fewer slots.
    """

    client: Client
    adapter: LoraAdapter
    examples: int


@dataclass(frozen=True, slots=True)
class ServerState:
    """What the server keeps between rounds; all of it is checkpointed.

    ``round`` counts finished rounds. ``memory`` is the method's own (server momentum, say).
    ``ranks``: the clients whose rank is no longer the one that they introduced themselves with.
    ``levels``: all ranks that have been in use. The server keeps these two, not the method.
    """

    adapter: LoraAdapter
    round: int = 0
    memory: Mapping[str, Tensor] = field(default_factory=dict)
    ranks: Mapping[str, int] = field(default_factory=dict)
    levels: tuple[int, ...] = ()

    def advanced(
        self, adapter: LoraAdapter, memory: Mapping[str, Tensor] | None = None
    ) -> ServerState:
        """The state one round later; without ``memory`` the method's own stays as it is."""
        kept = self.memory if memory is None else memory
        return replace(self, adapter=adapter, round=self.round + 1, memory=kept)


class RoundObserver(Protocol):
    """Looks at a round without changing it (`prelort.diagnostics`)."""

    seconds: float
    """Time that it has taken so far."""

    def add(self, sent: Broadcast, update: Update) -> None:
        """A reply that counts, and what its client had received."""
        ...

    def result(self, after: ServerState) -> dict[str, Any]:
        """What the round did, as plain numbers by name; ``{"failed": reason}`` instead."""
        ...


class Aggregator(Protocol):
    """Folds one round's replies into the global adapter, one at a time and in a fixed order."""

    def add(self, update: Update) -> None:
        """Fold in one reply; afterwards the update can be freed."""
        ...

    def result(self) -> ServerState:
        """The state after the round. Needs at least one reply."""
        ...


class Method(Protocol):
    """A published algorithm for clients of mixed ranks. `PrefixMethod` has the usual answers."""

    name: ClassVar[str]
    summary: ClassVar[str]
    """One line for `prelort methods`."""
    paper: ClassVar[str]
    """Authors or title, and arXiv number."""

    def __init__(self, config: MethodConfig, seed: int) -> None:
        """Built once for a run: what changes from round to round is in the `ServerState`."""
        ...

    def check(self, state: ServerState, clients: Sequence[Client]) -> None:
        """Raise `ConfigError` if the method cannot serve these clients."""
        ...

    def broadcast(self, state: ServerState, client: Client) -> Broadcast:
        """What the client receives and trains: views into the state where that is possible.

        A pure function of its arguments: it is asked again when the reply has come.
        """
        ...

    def objective(self, state: ServerState, client: Client) -> Objective:
        """What the client optimises."""
        ...

    def aggregator(self, state: ServerState) -> Aggregator:
        """An aggregator for one round that starts from ``state``."""
        ...

    def global_adapter(self, state: ServerState, rank: int | None = None) -> LoraAdapter:
        """The global adapter of this rank (None: the whole), as measured and exported.

        Layer by layer: diagnostics ask it of a state that holds some of the layers only.
        """
        ...
