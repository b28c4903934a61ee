"""Passing replies on in a fixed order, in whatever order they arrive."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Generic, TypeVar

T = TypeVar("T")

_SKIPPED = object()


class ReorderBuffer(Generic[T]):
    """Calls ``take`` for each item in the order of ``keys``; only early items wait.

    Floating-point sums depend on their order, so a fixed order gives the same bits whoever
    answers first.
    """

    def __init__(self, keys: Sequence[Hashable], take: Callable[[T], None]) -> None:
        self._keys = list(keys)
        self._take = take
        self._early: dict[Hashable, object] = {}
        self._next = 0

    def put(self, key: Hashable, item: T) -> None:
        """An item has arrived."""
        self._arrived(key, item)

    def skip(self, key: Hashable) -> None:
        """No usable item will come for this key."""
        self._arrived(key, _SKIPPED)

    def _arrived(self, key: Hashable, item: object) -> None:
        self._early[key] = item
        while self._next < len(self._keys) and self._keys[self._next] in self._early:
            ready = self._early.pop(self._keys[self._next])
            self._next += 1
            if ready is not _SKIPPED:
                self._take(ready)  # type: ignore[arg-type]
