"""How far a message is, of which many megabytes are on their way."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Literal, Protocol

REPORT_SECONDS = 30.0
"""Time before the first report on a transfer, and between two."""
LARGE_BYTES = 10_000_000
"""Bytes of a message that are worth a report when it is complete."""

Direction = Literal["down", "up"]
"""From the server to a client, or back."""


class Clock(Protocol):
    """What waits: the module `time`, or a test's clock."""

    def monotonic(self) -> float:
        """Seconds that never go back."""
        ...

    def sleep(self, seconds: float, /) -> None:
        """Wait."""
        ...


Told = Callable[[int, float, float], None]
"""Is told the bytes so far, the share of the parts, and the seconds since the beginning."""


class Progress:
    """Counts the parts of one message, from any thread.

    Args:
        report: called every `REPORT_SECONDS`, and when a message is complete that is large or has
            been reported before.
        clock: returns the time.
    """

    def __init__(self, report: Told, clock: Clock) -> None:
        self._report, self._clock = report, clock
        self._lock = threading.Lock()
        self._total = self._parts = self._bytes = 0
        self._started = self._reported = clock.monotonic()

    def expect(self, parts: int) -> None:
        """So many parts are to come."""
        self._total = parts

    def count(self, size: int) -> None:
        """A part of ``size`` bytes has arrived."""
        with self._lock:
            self._parts += 1
            self._bytes += size
            now = self._clock.monotonic()
            worth_it = self._bytes >= LARGE_BYTES or self._reported > self._started
            complete = self._parts == self._total and worth_it
            if complete or now - self._reported >= REPORT_SECONDS:
                self._reported = now
                share = self._parts / max(self._total, self._parts)
                self._report(self._bytes, share, now - self._started)
