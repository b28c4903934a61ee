"""Reading a run's log while it is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from prelort.errors import PrelortError
from prelort.events import Event, decode
from prelort.history import RunHistory

_REMEMBERED = 1024
"""Bytes before the position that identify the log."""


@dataclass(frozen=True, slots=True)
class NewEvents:
    """What one poll has found. ``truncated``: the log was cut, and these are all its events."""

    events: Sequence[Event]
    truncated: bool = False


class LogFollower:
    """A log that grows, may be truncated by a resumed run, and may not exist yet.

    ``history`` is what its events tell so far.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.history = RunHistory()
        self._offset = 0
        self._before = b""
        self._lines = 0

    def poll(self) -> NewEvents:
        """Read what is new; an unfinished last line is left for the next poll.

        Raises `PrelortError` for a line that is no event, and where the log cannot be read.
        """
        data = self._read()
        truncated = data is None
        if data is None:
            self.history = RunHistory()
            self._offset, self._before, self._lines = 0, b"", 0
            data = self._read() or b""
        data = data[: data.rfind(b"\n") + 1]
        events = [self._decoded(line) for line in data.splitlines()]
        self._offset += len(data)
        self._before = (self._before + data)[-_REMEMBERED:]
        for event in events:
            self.history.apply(event)
        return NewEvents(events, truncated)

    def _read(self) -> bytes | None:
        """What follows the position read up to; None if what precedes it has changed.

        A log may have been truncated and have grown beyond its old length since.
        """
        try:
            with self.path.open("rb") as file:
                file.seek(self._offset - len(self._before))
                return file.read() if file.read(len(self._before)) == self._before else None
        except FileNotFoundError:
            return None if self._offset else b""
        except OSError as error:
            raise PrelortError(
                f"metrics file {str(self.path)!r} cannot be read: {error.strerror}"
            ) from None

    def _decoded(self, line: bytes) -> Event:
        self._lines += 1
        try:
            return decode(line)
        except ValueError:  # also what bad JSON and bad UTF-8 raise
            raise PrelortError(
                f"{str(self.path)!r}, line {self._lines}, is not an event of a run"
            ) from None
