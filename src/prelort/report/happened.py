"""What went other than planned in a run: who was left out, refused, waited for, and why."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from prelort.report.events import Event, settled
from prelort.report.wording import listed, plain

LONGEST = 400
"""Characters of a reason that are shown: a client may send a whole traceback."""


@dataclass(frozen=True, slots=True)
class Incident:
    """One thing that happened, once or in several rounds, to a client or (empty) to the run."""

    rounds: list[int]
    what: str
    client: str
    reason: str
    bad: bool
    """Whether something was lost: a client's work, an attempt."""

    @property
    def when(self) -> str:
        """The rounds in words: ``1, 3–5``."""
        return ranges(self.rounds)

    @property
    def times(self) -> int:
        """How often."""
        return len(self.rounds)


def incidents(events: Iterable[Event]) -> list[Incident]:
    """What happened, by first round; the same of the same client for the same reason once.

    Kinds of events that are not known are passed over.
    """
    found: dict[tuple[str, str, str], Incident] = {}
    for event in settled(events):
        reader = _READERS.get(str(event["event"]))
        for what, client, reason, bad in reader(event) if reader else ():
            client, reason = plain(client), _short(plain(reason))
            key = (what, client, reason)
            incident = found.setdefault(key, Incident([], what, client, reason, bad))
            incident.rounds.append(_round(event))
    return sorted(found.values(), key=lambda incident: incident.rounds[0])


def known(events: Iterable[Event]) -> list[Event]:
    """The events of a kind that the page knows; of others not even ``round`` can be relied on."""
    return [event for event in events if str(event["event"]) in KNOWN]


def unknown_kinds(events: Iterable[Event]) -> list[str]:
    """The kinds of events that this version of the page does not show, in alphabetical order."""
    return sorted({plain(e["event"]) for e in events if str(e["event"]) not in KNOWN})


def ranges(numbers: Iterable[int]) -> str:
    """Whole numbers in words, consecutive ones as a range: ``1, 3–5``."""
    spans: list[list[int]] = []
    for number in sorted(set(numbers)):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}{'–' if b > a + 1 else ', '}{b}" for a, b in spans)


Row = tuple[str, object, object, bool]
"""What happened, to which client, why, and whether something was lost."""


def _failed(event: Event) -> Iterator[Row]:
    yield "left out", event.get("client", ""), event.get("reason", "no reason given"), True


def _refused(event: Event) -> Iterator[Row]:
    yield "refused", event.get("client", ""), event.get("reason", "no reason given"), True


def _rank_changed(event: Event) -> Iterator[Row]:
    change = f"from rank {event.get('from', '?')} to {event.get('to', '?')}"
    why = event.get("reason")
    yield "rank changed", event.get("client", ""), change + (f": {why}" if why else ""), False


def _resumed(event: Event) -> Iterator[Row]:
    yield "resumed", "", f"went on from the checkpoint after round {_round(event)}", False


def _not_measured(event: Event) -> Iterator[Row]:
    failed = event.get("failed")
    for client, reason in failed.items() if isinstance(failed, dict) else ():
        yield "not measured", client, reason, True


def _measuring_failed(event: Event) -> Iterator[Row]:
    rank, why = event.get("rank", "?"), event.get("reason", "no reason given")
    yield "not measured", event.get("client", ""), f"the adapter of rank {rank}: {why}", True


def _not_diagnosed(event: Event) -> Iterator[Row]:
    numbers = event.get("diagnostics")
    if isinstance(numbers, dict) and "failed" in numbers:
        yield "not diagnosed", "", numbers["failed"], True


def _waiting(event: Event) -> Iterator[Row]:
    yield "waited", "", waited_for(event), False


def _joined(event: Event) -> Iterator[Row]:
    rank = event.get("rank")
    yield "joined", event.get("client", ""), "" if rank is None else f"with rank {rank}", False


def _left(event: Event) -> Iterator[Row]:
    yield "went away", event.get("client", ""), event.get("reason", ""), False


def _repeated(event: Event) -> Iterator[Row]:
    attempt, reason = event.get("attempt"), event.get("reason", "no reason given")
    yield "round repeated", "", f"attempt {attempt}: {reason}" if attempt else reason, True


_READERS: dict[str, Callable[[Event], Iterator[Row]]] = {
    "client_failed": _failed,
    "client_refused": _refused,
    "rank_changed": _rank_changed,
    "resumed": _resumed,
    "evaluated_at_clients": _not_measured,
    "measuring_failed": _measuring_failed,
    "aggregated": _not_diagnosed,
    "waiting": _waiting,
    "client_joined": _joined,
    "client_left": _left,
    "round_repeated": _repeated,
}

KNOWN = {
    *_READERS,
    "run_started",
    "round_started",
    "client_finished",
    "evaluated",
    "checkpointed",
    "run_finished",
}
"""The kinds of events that the page knows."""


def waited_for(event: Event) -> str:
    """A ``waiting`` event in words: ``needs 2 clients; present: a; missing: b; until ...``."""
    parts = []
    if event.get("needed") is not None:
        parts.append(f"needs {event['needed']} clients")
    for key in ("present", "missing"):
        names = event.get(key)
        if isinstance(names, list):
            parts.append(f"{key}: {listed(map(plain, names)) or 'none'}")
    if event.get("until"):
        parts.append(f"until {plain(event['until'])}")
    return "; ".join(parts)


def waits_for(event: Event) -> str:
    """A ``waiting`` event on the watch: ``1 more site until 14:05:00 (missing: a)``, local time."""
    present, needed = event.get("present"), event.get("needed")
    more = ""
    if isinstance(present, list) and isinstance(needed, int):
        count = max(needed - len(present), 0)
        more = f"{count} more site{'' if count == 1 else 's'}"
    until = f" until {_local_time(event['until'])}" if event.get("until") else ""
    missing = event.get("missing")
    names = ", ".join(map(plain, missing)) if isinstance(missing, list) else ""
    return (more or "sites") + until + (f" (missing: {names})" if names else "")


def lines(event: Event) -> Iterator[str]:
    """What an event of this module says, as lines of plain text; none for other kinds."""
    at = f"round {_round(event)}"
    if event["event"] == "waiting":
        yield f"{at}: waiting for {waits_for(event)}"
        return
    for incident in incidents([event]):
        what = f"{at}: {incident.client} {incident.what}" if incident.client else ""
        what = what or f"{at} {incident.what.removeprefix('round ')}"
        yield what + (f": {incident.reason}" if incident.reason else "")


def _local_time(until: object) -> str:
    """The time of day here; with the date where that is not today."""
    try:
        then = datetime.fromisoformat(str(until)).astimezone()
    except (ValueError, OverflowError, OSError):
        return plain(until)
    today = then.date() == datetime.now().astimezone().date()
    return then.strftime("%H:%M:%S" if today else "%Y-%m-%d %H:%M:%S")


def _round(event: Event) -> int:
    number: Any = event.get("round", 0)
    return number if isinstance(number, int) else 0


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else text[:LONGEST].rstrip() + " …"
