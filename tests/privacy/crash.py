"""A run that crashes when a round's adapter is known, and before it is saved."""

from __future__ import annotations

from collections.abc import Callable

from prelort.events import Event, RoundFinished


class Stopped(Exception):
    """Stands for a crash."""


def stop_after_round(number: int) -> Callable[[Event], None]:
    """A listener that raises `Stopped`."""

    def listener(event: Event) -> None:
        if isinstance(event, RoundFinished) and event.round == number:
            raise Stopped

    return listener
