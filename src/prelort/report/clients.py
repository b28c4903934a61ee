"""What each client of a run did, read off the events."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from prelort.report.events import Event, settled


@dataclass(slots=True)
class ClientRow:
    """One client so far. ``losses`` is round -> mean training loss of its reply, in nats.

    Bytes and seconds are sums over its replies; ``bytes_down`` is None where no event tells it.
    """

    name: str
    ranks: list[int] = field(default_factory=list)
    """The ranks that it had, in order, each once in a row."""
    examples: int | None = None
    asked: int = 0
    losses: dict[int, float] = field(default_factory=dict)
    answered: int = 0
    failed: list[int] = field(default_factory=list)
    """The rounds in which its reply was left out."""
    bytes_up: int = 0
    bytes_down: int | None = None
    seconds: float = 0.0

    @property
    def last_loss(self) -> float | None:
        """Of its last reply; None before the first."""
        return self.losses[max(self.losses)] if self.losses else None

    def has_rank(self, rank: object) -> None:
        """Note the rank that an event tells."""
        if isinstance(rank, int) and self.ranks[-1:] != [rank]:
            self.ranks.append(rank)


def client_rows(events: Iterable[Event]) -> list[ClientRow]:
    """A row for each client that was asked or named, lowest rank first, then by name."""
    rows: dict[str, ClientRow] = {}

    def row(name: object) -> ClientRow:
        return rows.setdefault(str(name), ClientRow(str(name)))

    for event in settled(events):
        kind, number = event["event"], event.get("round", 0)
        if kind == "round_started":
            for name in event.get("clients", ()):
                row(name).asked += 1
        elif kind == "client_finished":
            _answered(row(event["client"]), number, event)
        elif kind == "client_failed":
            client = row(event.get("client", "?"))
            client.has_rank(event.get("rank"))
            client.failed.append(number)
        elif kind == "client_joined":
            row(event.get("client", "?")).has_rank(event.get("rank"))
        elif kind == "rank_changed":
            client = row(event.get("client", "?"))
            client.has_rank(event.get("from"))
            client.has_rank(event.get("to"))
        elif kind == "evaluated_at_clients":
            for name, found in event.get("clients", {}).items():
                row(name).has_rank(found.get("rank"))
    return sorted(rows.values(), key=lambda r: (r.ranks[-1] if r.ranks else math.inf, r.name))


@dataclass(frozen=True, slots=True)
class Spread:
    """A number by round over the clients of one rank: its mean, least and greatest."""

    mean: dict[float, float]
    low: dict[float, float]
    high: dict[float, float]


def losses_by_rank(events: Iterable[Event]) -> dict[int, Spread]:
    """Rank -> the training losses of its clients by round (nats); each client counts the same.

    Losses that are not finite are left out.
    """
    found: dict[int, dict[int, dict[str, float]]] = {}
    for event in settled(events):
        loss, rank = event.get("loss"), event.get("rank")
        if event["event"] != "client_finished" or loss is None or not isinstance(rank, int):
            continue
        if math.isfinite(loss):  # by client: of a round that was repeated its last attempt counts
            found.setdefault(rank, {}).setdefault(event["round"], {})[event["client"]] = loss
    return {rank: _spread(found[rank]) for rank in sorted(found)}


def _spread(rounds: Mapping[int, Mapping[str, float]]) -> Spread:
    values = {at: list(losses.values()) for at, losses in sorted(rounds.items())}
    return Spread(
        {at: sum(some) / len(some) for at, some in values.items()},
        {at: min(some) for at, some in values.items()},
        {at: max(some) for at, some in values.items()},
    )


def _answered(client: ClientRow, number: int, event: Event) -> None:
    client.has_rank(event.get("rank"))
    client.answered += 1
    client.examples = event.get("examples", client.examples)
    client.bytes_up += event.get("bytes_up", 0)
    if event.get("bytes_down") is not None:
        client.bytes_down = (client.bytes_down or 0) + event["bytes_down"]
    client.seconds += event.get("seconds", 0.0)
    loss = event.get("loss")
    client.losses[number] = math.nan if loss is None else float(loss)
