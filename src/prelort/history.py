"""The state of a run, folded from its events; progress, pages and tables all read this fold."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Literal

from prelort.errors import PrelortError
from prelort.events import (
    BudgetSpent,
    ClientFailed,
    ClientFinished,
    ClientJoined,
    ClientLeft,
    ClientRefused,
    ClientsEvaluated,
    DimensionsLeftOut,
    Evaluated,
    Evaluating,
    EvaluationFailed,
    Event,
    Metrics,
    RankChanged,
    RanksUncovered,
    RoundFinished,
    RoundRepeated,
    RoundStarted,
    RoundStats,
    RunFinished,
    RunResumed,
    RunStarted,
    Transferring,
    Waiting,
)

if TYPE_CHECKING:
    import pandas as pd

Status = Literal["idle", "training", "answered", "failed", "left"]


@dataclass(slots=True)
class RoundRecord:
    """One round, or its last attempt. ``stats`` is None until the replies are aggregated."""

    number: int
    started: datetime
    clients: tuple[str, ...]
    replies: dict[str, ClientFinished] = field(default_factory=dict)
    failures: dict[str, ClientFailed] = field(default_factory=dict)
    stats: RoundStats | None = None

    @property
    def answers(self) -> int:
        """Number of clients that replied or failed."""
        return len(self.replies) + len(self.failures)

    @property
    def loss(self) -> float | None:
        """The mean training loss of the replies so far, weighted by examples; None: not known."""
        if self.stats is not None:
            loss = self.stats.loss
        else:
            examples = sum(reply.examples for reply in self.replies.values())
            total = sum(reply.loss * reply.examples for reply in self.replies.values())
            loss = total / examples if examples else math.nan
        return None if math.isnan(loss) else loss


@dataclass(slots=True)
class ClientRecord:
    """One client: its status now, and its last reply."""

    name: str
    rank: int | None = None
    status: Status = "idle"
    reason: str = ""
    transfer: Transferring | None = None
    """What is on its way to or from it, while it trains."""
    last: ClientFinished | None = None
    rounds: int = 0
    """Number of rounds in which its reply counted."""


@dataclass(slots=True, repr=False)
class RunHistory:
    """One run so far: apply its events in their order.

    ``time``: of the last event. ``resumed``: the round after which this process continued the run.
    ``evaluating``: the progress of the evaluation under way.
    """

    started: RunStarted | None = None
    time: datetime | None = None
    round: int = 0
    """The round under way, or the last one that is done."""
    rounds: dict[int, RoundRecord] = field(default_factory=dict)
    evaluations: dict[int, Evaluated] = field(default_factory=dict)
    client_evaluations: dict[int, ClientsEvaluated] = field(default_factory=dict)
    base: Metrics = field(default_factory=dict)
    """The untuned base model's metrics; empty where they were not measured."""
    clients: dict[str, ClientRecord] = field(default_factory=dict)
    incidents: list[Event] = field(default_factory=list)
    """What did not go as planned, in order; `prelort.report.incidents` describes it."""
    waiting: Waiting | None = None
    evaluating: Evaluating | None = None
    resumed: int | None = None
    finished: bool = False
    passes: int = 0
    """Forward and backward passes of a batch in training, of all replies."""
    client_seconds: float = 0.0
    """Training seconds, summed over clients."""

    @classmethod
    def of(cls, events: Iterable[Event]) -> RunHistory:
        """The history of these events."""
        history = cls()
        for event in events:
            history.apply(event)
        return history

    def __repr__(self) -> str:
        end = ", finished" if self.finished else ""
        return f"<RunHistory: round {self.done}, {len(self.clients)} clients{end}>"

    def apply(self, event: Event) -> None:
        """Take in the next event."""
        self.time = event.time
        self.evaluating = event if isinstance(event, Evaluating) else None
        of_round = isinstance(event, ClientFinished | ClientFailed | RoundFinished)
        if of_round and event.round not in self.rounds:
            raise PrelortError(f"the event log is damaged: round {event.round} has no start")
        match event:
            case RunStarted():
                self.started = event
            case RunResumed():
                self.resumed = self.round = event.round
            case RoundStarted():
                self._begin(event)
            case ClientFinished():
                self._reply(event)
            case ClientFailed():
                self.rounds[event.round].failures[event.client] = event
                record = self._client(event.client)
                record.rank, record.status, record.reason = event.rank, "failed", event.reason
                record.transfer = None
            case Transferring():
                self._client(event.client).transfer = event if event.share < 1 else None
            case RoundFinished():
                self.rounds[event.round].stats = event.stats
                self.round = event.round
            case Evaluated():
                self.base = event.base or self.base
                if event.prefixes:
                    self.evaluations[event.round] = event
            case ClientsEvaluated():
                self.client_evaluations[event.round] = event
            case RankChanged():
                self._client(event.client).rank = event.new_rank
            case ClientJoined():
                record = self._client(event.client)
                record.rank, record.status, record.reason = event.rank, "idle", ""
            case ClientLeft():
                self._client(event.client).status = "left"
            case Waiting():
                self.waiting = event
            case RunFinished():
                self.finished, self.waiting = True, None
        if _is_incident(event):
            self.incidents.append(event)

    @property
    def current(self) -> RoundRecord | None:
        """The round under way; None between rounds."""
        record = self.rounds.get(self.round)
        return record if record is not None and record.stats is None else None

    @property
    def done(self) -> int:
        """Number of the last round that is done."""
        return self.round - 1 if self.current is not None else self.round

    @property
    def final(self) -> Evaluated | None:
        """The last evaluation of the global adapter; None before the first."""
        return self.evaluations[max(self.evaluations)] if self.evaluations else None

    @property
    def bytes_up(self) -> int:
        """Bytes that clients sent, of the rounds that are done."""
        return sum(stats.bytes_up for stats in self._stats())

    @property
    def bytes_down(self) -> int:
        """Bytes that were sent to clients, of the rounds that are done."""
        return sum(stats.bytes_down for stats in self._stats())

    @property
    def seconds(self) -> dict[str, float]:
        """Wall seconds by phase: train (with all messages), aggregate, diagnose, evaluate."""
        stats = self._stats()
        evaluate = sum(event.seconds for event in self.evaluations.values())
        evaluate += sum(event.seconds for event in self.client_evaluations.values())
        return {
            "train": sum(one.seconds.train for one in stats),
            "aggregate": sum(one.seconds.aggregate for one in stats),
            "diagnose": sum(one.seconds.diagnose for one in stats),
            "evaluate": evaluate,
        }

    @property
    def epsilon(self) -> float | None:
        """What has been spent of the privacy budget, by any one; None where there is none."""
        spent = (one.epsilon for one in self._stats())
        return max((epsilon for epsilon in spent if epsilon is not None), default=None)

    def metrics(self) -> list[str]:
        """The metrics that were measured, in their order; ``loss`` only if there is no other."""
        rows = [self.base, *(row for e in self.evaluations.values() for row in e.prefixes.values())]
        names = list(dict.fromkeys(name for row in rows for name in row))
        return [name for name in names if name != "loss"] or names

    def to_pandas(self) -> pd.DataFrame:
        """Every value that was measured, a row each: round, rank, metric, value.

        Rank 0 is the untuned base model.
        """
        import pandas as pd

        rows = [(0, 0, metric, value) for metric, value in self.base.items()]
        for number, event in sorted(self.evaluations.items()):
            for rank, metrics in sorted(event.prefixes.items()):
                rows += [(number, rank, metric, value) for metric, value in metrics.items()]
        return pd.DataFrame(rows, columns=["round", "rank", "metric", "value"])

    def rounds_to_pandas(self) -> pd.DataFrame:
        """A row for each round that is done: its replies, loss, bytes and seconds by phase."""
        import pandas as pd

        rows: list[tuple[float, ...]] = []
        for number, record in sorted(self.rounds.items()):
            if (stats := record.stats) is not None:
                events = (self.evaluations.get(number), self.client_evaluations.get(number))
                evaluate = sum(event.seconds for event in events if event is not None)
                wall = stats.seconds
                counts = (number, stats.replies, stats.failures, stats.loss)
                traffic = (stats.bytes_up, stats.bytes_down)
                phases = (wall.train, wall.aggregate, wall.diagnose, evaluate)
                rows.append((*counts, *traffic, *phases, wall.total + evaluate))
        columns = ["round", "replies", "failures", "loss", "bytes_up", "bytes_down"]
        columns += [f"{phase}_seconds" for phase in ("train", "aggregate", "diagnose", "evaluate")]
        return pd.DataFrame(rows, columns=[*columns, "seconds"])

    def _stats(self) -> list[RoundStats]:
        return [record.stats for record in self.rounds.values() if record.stats is not None]

    def _begin(self, event: RoundStarted) -> None:
        self.round, self.waiting = event.round, None
        self.rounds[event.round] = RoundRecord(event.round, event.time, event.clients)
        for record in self.clients.values():
            record.transfer = None
            if record.status != "left":
                record.status, record.reason = "idle", ""
        for name in event.clients:
            self._client(name).status = "training"

    def _reply(self, event: ClientFinished) -> None:
        self.rounds[event.round].replies[event.client] = event
        record = self._client(event.client)
        if record.last is None or record.last.round != event.round:  # a repeated round counts once
            record.rounds += 1
        record.rank, record.status, record.reason = event.rank, "answered", ""
        record.transfer = None
        record.last = event
        self.passes += event.passes
        self.client_seconds += 0.0 if math.isnan(event.seconds) else event.seconds

    def _client(self, name: str) -> ClientRecord:
        return self.clients.setdefault(name, ClientRecord(name))


def _is_incident(event: Event) -> bool:
    if isinstance(event, RoundFinished):
        return "failed" in (event.stats.diagnostics or {})
    if isinstance(event, ClientsEvaluated):
        return bool(event.failures)
    return isinstance(
        event,
        ClientFailed
        | ClientRefused
        | RankChanged
        | RanksUncovered
        | RunResumed
        | EvaluationFailed
        | Waiting
        | ClientJoined
        | ClientLeft
        | DimensionsLeftOut
        | RoundRepeated
        | BudgetSpent,
    )
