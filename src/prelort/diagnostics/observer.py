"""The collector of a round, timed, whose failure never stops a run."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from prelort.diagnostics.collector import Collector
from prelort.methods.interface import Broadcast, ServerState, Update

log = logging.getLogger(__name__)


class Unavailable:
    """A `prelort.methods.interface.RoundObserver` that says why there is nothing to measure."""

    seconds = 0.0

    def __init__(self, reason: str) -> None:
        self._reason = reason

    def add(self, sent: Broadcast, update: Update) -> None:
        """Nothing is collected."""

    def result(self, after: ServerState) -> dict[str, Any]:
        """``{"failed": reason}``."""
        return {"failed": self._reason}


class SafeCollector:
    """A `prelort.methods.interface.RoundObserver`: a `Collector` that stops at its first error."""

    def __init__(self, collector: Callable[[], Collector]) -> None:
        """``collector``: makes the round's collector, which may fail."""
        self.seconds = 0.0
        self._failure = ""
        with self._guard():
            self._collector = collector()

    def add(self, sent: Broadcast, update: Update) -> None:
        """Collect a usable reply and what the client was sent."""
        if not self._failure:
            with self._guard():
                self._collector.add(sent, update)

    def result(self, after: ServerState) -> dict[str, Any]:
        """`Collector.result`, or ``{"failed": reason}``."""
        numbers: dict[str, Any] = {}
        if not self._failure:
            with self._guard():
                numbers = self._collector.result(after)
        return {"failed": self._failure} if self._failure else numbers

    @contextmanager
    def _guard(self) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        except Exception as error:  # a user's own method may raise anything
            log.exception("the round's diagnostics failed")
            self._failure = f"{type(error).__name__}: {error}"
        finally:
            self.seconds += time.monotonic() - started
