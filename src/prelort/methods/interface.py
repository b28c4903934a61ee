"""What a method is. One published method, one file, one class that follows `Method`.

A method says what a client of rank r receives (`broadcast`), how it trains (`objective`), how the
server aggregates the replies (`aggregator`), and what the global adapter of a rank is
(`global_adapter`). Everything else is the same for every method.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Protocol

from torch import Tensor

from prelort.adapters import LoraAdapter, Trained
from prelort.config import MethodConfig
from prelort.methods.objective import Objective


@dataclass(frozen=True, slots=True)
class Client:
    """A client as the server knows it. Its rank may change from round to round."""

    name: str
    rank: int
    examples: int


@dataclass(frozen=True, slots=True)
class Broadcast:
    """What one client receives for one round, and which part of it learns.

    The reply holds the trained factors of ``trainable``, in its shapes (the prefix shapes of one
    rank), and the modules to save.
    """

    trainable: LoraAdapter
    frozen: LoraAdapter | None = None
    """A second adapter beside the base model that does not learn: folded into it this round."""
    trains: Trained = "AB"
    scale_multiplier: float = 1.0
    """Multiplies the scale of ``trainable`` while it trains."""
    magnitude_rate_ratio: float | None = None
    """Not None: the client trains unit directions (rows of A, columns of B) and a magnitude of each
    rank dimension, which learns at this many times the learning rate."""
    seeded_factors: Literal["nothing", "A", "A and B"] = "nothing"
    """Factors that do not travel: A is `draw_a` of ``factor_seed`` at the maximum rank, B zero."""
    factor_seed: int = 0
    personal: bool = False
    """B and the modules to save stay with the client from round to round and do not travel."""


@dataclass(frozen=True, slots=True)
class Update:
    """A client's checked reply: its trained adapter and its number of training examples.

    A factor that was not trained is as it was broadcast. ``client.rank`` is the rank of the
    request; a client that prunes its adapter replies with a lower rank.
    """

    client: Client
    adapter: LoraAdapter
    examples: int


@dataclass(frozen=True, slots=True)
class ServerState:
    """What the server keeps between rounds; all of it is checkpointed.

    Args:
        adapter: the global adapter, at the maximum rank.
        round: number of finished rounds.
        memory: the method's own tensors (server momentum, for example).
        ranks: client name -> rank, where it is no longer that of the client's properties.
        levels: all ranks that have been in use, rising. The server keeps ``ranks`` and ``levels``,
            not the method.
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
        memory = self.memory if memory is None else memory
        return replace(self, adapter=adapter, round=self.round + 1, memory=memory)


class Aggregator(Protocol):
    """Folds one round's replies into the global adapter, one at a time and in a fixed order."""

    def add(self, update: Update) -> None:
        """Fold in one reply; afterwards the update can be freed."""
        ...

    def result(self) -> ServerState:
        """The state after the round: with the old adapter where no reply had a weight."""
        ...


class RoundObserver(Protocol):
    """Measures one round beside its aggregation, changes nothing and never raises."""

    seconds: float
    """Time spent measuring so far."""

    def add(self, sent: Broadcast, update: Update) -> None:
        """Collect a usable reply and what the client was sent."""
        ...

    def result(self, after: ServerState) -> dict[str, Any]:
        """The round's numbers, ready for JSON; ``{"failed": reason}`` where measuring failed."""
        ...


class Method(Protocol):
    """A published algorithm for clients of mixed ranks; `PrefixMethod` has the usual behaviour."""

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

        A pure function: the server calls it again when the reply arrives.
        """
        ...

    def objective(self, state: ServerState, client: Client) -> Objective:
        """What the client optimises."""
        ...

    def aggregator(self, state: ServerState) -> Aggregator:
        """An aggregator for one round that starts from ``state``."""
        ...

    def global_adapter(
        self, state: ServerState, rank: int | None = None, layers: Collection[str] | None = None
    ) -> LoraAdapter:
        """The global adapter, as evaluated and exported.

        Args:
            state: after any round.
            rank: its maximum rank (None: the whole).
            layers: names of the layers to return (None: all). Diagnostics ask for a sample, since
                all layers may cost more than the round's aggregation.
        """
        ...


Observe = Callable[[Method, ServerState, Sequence[Client]], RoundObserver]
"""Starts to observe a round of these clients."""
