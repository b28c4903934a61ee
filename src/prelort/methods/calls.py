"""Calling a method, which may be the user's own: its mistakes become one sentence."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TypeVar

from prelort import extensions
from prelort.adapters import LoraAdapter
from prelort.errors import PrelortError
from prelort.methods.interface import Method, ServerState

T = TypeVar("T")


def calling(method: Method, part: str) -> AbstractContextManager[None]:
    """`extensions.calling` for ``part`` of the method."""
    return extensions.calling(f"method {type(method).__name__}", part)


def expect(method: Method, part: str, value: object, kind: type[T]) -> T:
    """What ``part`` of the method returned. Raises `PrelortError` if it is of another type."""
    if not isinstance(value, kind):
        raise PrelortError(
            f"method {type(method).__name__}: {part} must return a {kind.__name__}, "
            f"but returned {value!r}"
        )
    return value


def global_adapter(method: Method, state: ServerState, rank: int | None = None) -> LoraAdapter:
    """The method's global adapter. Raises `PrelortError` if it returns none, or raises."""
    with calling(method, "global_adapter()"):
        return expect(method, "global_adapter()", method.global_adapter(state, rank), LoraAdapter)
