"""Reading the event logs of runs while they are written."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from prelort.errors import PrelortError
from prelort.report.events import Event

EVERY_SECONDS = 0.5
"""How often a log is looked at."""

_REMEMBERED = 1024
"""Bytes before the place read up to by which a log is known again."""

Dated = tuple[Event, float]
"""An event and when it was written, in seconds since the epoch."""


@dataclass(frozen=True, slots=True)
class Look:
    """What one look at a run's log has found.

    ``name``: the run's. ``afresh``: the events are those of the whole log, since it is read for
    the first time, or again because it is another one than before (``again``).
    """

    name: str
    events: Sequence[Dated]
    afresh: bool
    again: bool


class Log:
    """A log that grows, may be cut to an earlier length, and may not be there yet."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset = 0
        self._before = b""
        self._lines = 0

    def look(self, now: float) -> tuple[list[Dated], bool]:
        """The events that are new, and whether these are all, since the log was cut.

        A resumed run cuts the log back to its checkpoint; it may even have grown beyond the old
        length since. The last line is left for the next look while it has no end. Raises
        `PrelortError` for a line that is no event, and where the log cannot be read.
        """
        written = self._read()
        cut = written is None
        if written is None:
            self._offset, self._before, self._lines = 0, b"", 0
            written = self._read() or (b"", 0.0)
        data, changed = written
        whole = data[: data.rfind(b"\n") + 1]
        first = self._offset == 0
        events = self._parsed(whole)
        self._offset += len(whole)
        self._before = (self._before + whole)[-_REMEMBERED:]
        return (dated(events, min(changed, now)) if first else [(e, now) for e in events]), cut

    def _read(self) -> tuple[bytes, float] | None:
        """What stands after the place read up to, and the file's time; None if it was cut."""
        try:
            with self.path.open("rb") as file:
                file.seek(self._offset - len(self._before))
                if file.read(len(self._before)) != self._before:
                    return None
                return file.read(), self.path.stat().st_mtime
        except FileNotFoundError:
            return None if self._offset else (b"", 0.0)
        except OSError as error:
            raise PrelortError(
                f"metrics file {str(self.path)!r} cannot be read: {error.strerror}"
            ) from None

    def _parsed(self, whole: bytes) -> list[Event]:
        events: list[Event] = []
        for line in whole.splitlines():
            self._lines += 1
            if not line.strip():
                continue
            try:
                event = json.loads(line)
                if not isinstance(event, dict) or "event" not in event:
                    raise ValueError
            except ValueError:  # also what bad JSON and bad UTF-8 raise
                raise PrelortError(
                    f"{str(self.path)!r}, line {self._lines}, is not an event of a run"
                ) from None
            events.append(event)
        return events


def dated(events: Sequence[Event], last: float) -> list[Dated]:
    """When each of a log's events was written, reckoned back from the last one.

    Events do not say when they were, but what ends a phase says how long that took. Of a round
    that is still open only the longest answer is known, which is the least it has taken.
    """
    found: list[Dated] = []
    now, ended, longest = last, False, 0.0
    for event in reversed(events):
        kind, seconds = event["event"], event.get("seconds")
        if kind == "client_finished" and not ended and isinstance(seconds, int | float):
            longest = max(longest, float(seconds))
        if kind == "round_started":
            now, ended, longest = now - longest, False, 0.0
        found.append((event, now))
        if kind == "aggregated":
            total = seconds.get("total", 0.0) if isinstance(seconds, dict) else 0.0
            now, ended = now - float(total or 0.0), True
        elif kind in ("evaluated", "evaluated_at_clients") and isinstance(seconds, int | float):
            now -= float(seconds)
    return found[::-1]


def follow(
    logs: Callable[[], Mapping[str, Path]],
    clock: Callable[[], float],
    sleep: Callable[[float], None],
) -> Iterator[list[Look]]:
    """Look at the logs of a run or several, one after the other, until the last is finished.

    ``logs`` is asked each time, since a folder may not be there yet. Yields at every look, also
    when there is nothing new.
    """
    finished: set[str] = set()
    name, log = "", None
    while True:
        looks: list[Look] = []
        paths = logs()
        waiting = [other for other in paths if other not in finished]
        while waiting:
            afresh = log is None or name != waiting[0]
            if log is None or afresh:
                name = waiting[0]
                log = Log(paths[name])
            events, cut = log.look(clock())
            looks.append(Look(name, events, afresh or cut, cut))
            if not any(event["event"] == "run_finished" for event, _ in events):
                break
            finished.add(waiting.pop(0))
        yield looks
        if not waiting:
            return
        sleep(EVERY_SECONDS)
