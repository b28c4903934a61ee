"""Who is doing what in a run, told by its events: what `prelort watch` shows, undrawn."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any, Literal

from prelort.report.events import Event
from prelort.report.happened import lines
from prelort.report.state import RunState
from prelort.report.wording import listed, plain

KEPT = 20
"""Happenings that are remembered; a terminal shows fewer."""

Status = Literal["failed", "training", "answered", "not asked", "gone"]

URGENCY: tuple[Status, ...] = ("failed", "training", "answered", "not asked", "gone")
"""Who is shown first where there is no room for all."""


@dataclass
class Row:
    """One client as it stands. Numbers are those of its last answer."""

    name: str
    rank: int | None = None
    status: Status = "not asked"
    reason: str = ""
    loss: float | None = None
    examples: int | None = None
    seconds: float | None = None
    rounds: int = 0
    """In which its answer was added."""
    _counted: int = -1

    def answer(self, event: Event) -> None:
        """Take in a ``client_finished``."""
        self.status, self.reason = "answered", ""
        self.loss, self.examples = event.get("loss"), event.get("examples")
        self.seconds = event.get("seconds")
        if event.get("round") != self._counted:  # a repeated round counts once
            self.rounds, self._counted = self.rounds + 1, event.get("round", 0)


@dataclass
class Watched:
    """One run so far. Times are seconds on whatever clock `absorb` is given."""

    name: str
    run: RunState | None = None
    rows: dict[str, Row] = field(default_factory=dict)
    waiting: Event | None = None
    asked_at: float = 0.0
    """When the round's clients were asked."""
    last: float = 0.0
    """When the last event came."""
    bytes_up: int = 0
    bytes_down: int = 0
    happenings: deque[str] = field(default_factory=lambda: deque(maxlen=KEPT))

    def absorb(self, event: Event, now: float) -> None:
        """Take one event in; kinds that are not known change nothing."""
        kind, self.last = event["event"], now
        if self.run is None:
            self.run = RunState(self.name, began=now)
        if kind == "run_started":
            self.waiting = None
            self.name = self.run.name = plain(event.get("method", self.name))
        self.run.absorb(event, now)
        if kind == "round_started":
            self._ask([plain(name) for name in event.get("clients", ())], now)
        elif kind == "client_finished":
            self._row(event).answer(event)
        elif kind == "client_failed":
            row = self._row(event)
            row.status, row.reason = "failed", plain(event.get("reason", "no reason given"))
        elif kind == "client_joined":
            row = self._row(event)
            row.status, row.reason = "not asked", ""
        elif kind == "client_left":
            self._row(event).status = "gone"
        elif kind == "rank_changed":
            self._row(event | {"rank": event.get("to")})
        elif kind == "aggregated":
            self.bytes_up += int(event.get("bytes_up") or 0)
            self.bytes_down += int(event.get("bytes_down") or 0)
        elif kind == "waiting":
            self.waiting = event
        elif kind == "run_finished":
            self._finish(event)
        if kind != "waiting":  # that has a line of its own, as long as it lasts
            self.happenings.extend(lines(event))

    @property
    def finished(self) -> bool:
        """Whether the run has come to its end."""
        return self.run is not None and self.run.ended is not None

    def by_name(self) -> list[Row]:
        """All clients, in an order in which none moves."""
        return sorted(self.rows.values(), key=lambda row: row.name)

    def most_urgent(self, count: int) -> tuple[list[Row], str]:
        """As many clients as there is room for, and a line on the others (empty: all are shown).

        Where they do not all fit, those that failed or are training come first.
        """
        rows = self.by_name()
        if len(rows) <= count:
            return rows, ""
        rows.sort(key=lambda row: URGENCY.index(row.status))
        rest = rows[max(count, 0) :]
        doing = counts(rest) if len({row.status for row in rest}) > 1 else rest[0].status
        others = f"and {len(rest)} other{'' if len(rest) == 1 else 's'} ({doing})"
        return rows[: max(count, 0)], others

    def seconds(self, row: Row, now: float) -> float | None:
        """What a client's last answer took; of one that trains, seconds since it was asked."""
        return max(now - self.asked_at, 0.0) // 1 if row.status == "training" else row.seconds

    def _ask(self, names: list[str], now: float) -> None:
        self.waiting, self.asked_at = None, now
        for row in self.rows.values():
            row.status, row.reason = "gone" if row.status == "gone" else "not asked", ""
        for name in names:
            self.rows.setdefault(name, Row(name)).status = "training"

    def _finish(self, event: Event) -> None:
        self.waiting = None
        self.bytes_up = int(event.get("bytes_up", self.bytes_up))
        self.bytes_down = int(event.get("bytes_down", self.bytes_down))

    def _row(self, event: Event) -> Row:
        """The client of an event, with the rank that it says."""
        name: str = plain(event.get("client", "?"))
        row = self.rows.setdefault(name, Row(name))
        rank: Any = event.get("rank")
        row.rank = rank if isinstance(rank, int) else row.rank
        return row


def counts(rows: list[Row]) -> str:
    """How many do what: ``1 failed and 2 training``."""
    numbers = Counter(row.status for row in rows)
    return listed(f"{numbers[status]} {status}" for status in URGENCY if numbers[status])
