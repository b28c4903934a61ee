"""Measuring a round's products beside it: timed apart, and never a reason for a run to stop."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from prelort.config import Config
from prelort.diagnostics.collector import Collector
from prelort.methods import trait
from prelort.methods.averaging import weighting
from prelort.methods.interface import Broadcast, Client, Method, RoundObserver, ServerState, Update

log = logging.getLogger(__name__)


class Diagnosis:
    """One round's `Collector`, if ``evaluation.diagnostics`` asks for it and it makes sense.

    It does not where clients keep their own factors: there is no global product to compare with.
    """

    def __init__(
        self, config: Config, method: Method, state: ServerState, clients: Sequence[Client]
    ) -> None:
        self.seconds = 0.0
        self._failure: str | None = None
        self._collector: Collector | None = None
        if config.evaluation.diagnostics and not trait(method, "personal"):
            with self._guarded():
                weight = weighting(config.method.weights)
                self._collector = Collector(
                    method, state, clients, state.levels, weight, config.seed
                )

    def add(self, sent: Broadcast, update: Update) -> None:
        """A reply that counts, and what the client had been sent."""
        if self._collector is not None:
            with self._guarded():
                self._collector.add(sent, update)

    def result(self, after: ServerState) -> dict[str, Any]:
        """``diagnostics`` for the round's event: nothing where not asked for, why where failed."""
        found: dict[str, Any] = {}
        if self._collector is not None:
            with self._guarded():
                found = self._collector.result(after)
        return found if self._failure is None else {"failed": self._failure}

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        except Exception as error:  # a user's own method may do anything
            log.exception("the round cannot be diagnosed")
            self._failure = f"{type(error).__name__}: {error}"
            self._collector = None
        finally:
            self.seconds += time.monotonic() - started


def observer(
    config: Config,
) -> Callable[[Method, ServerState, Sequence[Client]], RoundObserver] | None:
    """Begins to observe a round; None where `evaluation.diagnostics` is off."""
    if not config.evaluation.diagnostics:
        return None
    return lambda method, state, clients: Diagnosis(config, method, state, clients)
