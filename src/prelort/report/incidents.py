"""Describing the incidents of a run: clients that failed, were refused, joined or left."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from prelort.events import (
    BudgetSpent,
    ClientFailed,
    ClientJoined,
    ClientLeft,
    ClientRefused,
    ClientsEvaluated,
    DimensionsLeftOut,
    EvaluationFailed,
    Event,
    RankChanged,
    RanksUncovered,
    RoundFinished,
    RoundRepeated,
    RunResumed,
    Waiting,
)
from prelort.report.formatting import plain, plural, ranges

LONGEST = 400
"""Characters of a reason that are shown: a client may send a whole traceback."""


@dataclass(frozen=True, slots=True)
class Incident:
    """One incident of a client or (empty name) of the run, in one or several rounds.

    ``loss``: whether work was lost (a client's reply, an attempt).
    """

    rounds: list[int]
    what: str
    client: str
    reason: str
    loss: bool

    @property
    def when(self) -> str:
        """The rounds in words: ``1, 3–5``."""
        return ranges(self.rounds)


def incidents(events: Iterable[Event]) -> list[Incident]:
    """The incidents among the events, by first round.

    The same incident of the same client for the same reason in several rounds is one.
    """
    merged: dict[tuple[str, str, str], Incident] = {}
    for event in events:
        for what, name, text, loss in _described(event):
            client, reason = plain(name), _short(plain(text))
            new = Incident([], what, client, reason, loss)
            merged.setdefault((what, client, reason), new).rounds.append(event.round)
    return sorted(merged.values(), key=lambda incident: incident.rounds[0])


def _described(event: Event) -> Iterator[tuple[str, str, str, bool]]:
    """What happened, to which client, why, and whether work was lost."""
    match event:
        case ClientFailed():
            yield "failed", event.client, event.reason, True
        case ClientRefused():
            yield "refused", event.client, event.reason, True
        case RankChanged():
            change = f"from rank {event.old_rank} to {event.new_rank}"
            yield "rank changed", event.client, f"{change}: {event.reason}", False
        case RanksUncovered():
            reason = (
                f"{event.holders:.3g} clients of a round hold them, robustness.rule needs "
                f"{event.needed}: rounds with fewer {event.treatment} them"
            )
            yield f"ranks {event.low + 1} to {event.high} not protected", "", reason, False
        case RunResumed():
            yield "resumed", "", f"from the checkpoint after round {event.round}", False
        case ClientsEvaluated():
            for client, reason in event.failures.items():
                yield "not evaluated", client, reason, True
        case EvaluationFailed():
            reason = f"the adapter of rank {event.rank}: {event.reason}"
            yield "not evaluated", event.client, reason, True
        case RoundFinished() if "failed" in (event.stats.diagnostics or {}):
            yield "no diagnostics", "", str((event.stats.diagnostics or {})["failed"]), True
        case Waiting():
            yield "waiting", "", waits_for(event), False
        case ClientJoined():
            rank = f"with rank {event.rank}" if event.rank is not None else ""
            yield "joined", event.client, rank, False
        case ClientLeft():
            yield "left", event.client, "", False
        case BudgetSpent():
            reason = f"epsilon = {event.epsilon:.4g}: the run ends here"
            yield "privacy budget spent", "", reason, False
        case DimensionsLeftOut():
            which = f"{ranges(event.dimensions)} have fewer than {event.min_holders} holders"
            yield "rank dimensions left out", "", which, True
        case RoundRepeated():
            yield "repeated", "", f"attempt {event.attempt}: {event.reason}", True


def lines(event: Event) -> Iterator[str]:
    """An incident as lines of plain text for a terminal; none for other events."""
    for incident in incidents([event]):
        what = " ".join(filter(None, [incident.client, incident.what]))
        reason = f": {incident.reason}" if incident.reason else ""
        yield f"round {event.round}: {what}{reason}"


def waits_for(event: Waiting) -> str:
    """``1 more client until 14:05:00 (missing: a)``, in local time; with the date if it differs."""
    until, now = event.until.astimezone(), event.time.astimezone()
    clock = until.strftime("%H:%M:%S" if until.date() == now.date() else "%Y-%m-%d %H:%M:%S")
    missing = f" (missing: {', '.join(map(plain, event.missing))})" if event.missing else ""
    count = max(event.needed - len(event.connected), 0)
    return f"{plural(count, 'more client')} until {clock}{missing}"


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else text[:LONGEST].rstrip() + " …"
