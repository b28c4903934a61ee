"""Flower's SuperNode with requests that are tried again: what the SuperLink has is not lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    ObjectPushError,
    ObjectUnavailableError,
)

from prelort.deployment.flower_commands import WAITS, patient

TREE = ObjectTree(object_id="root", children=[ObjectTree(object_id="part")])


def failed(status: int) -> httpx.HTTPStatusError:
    request = httpx.Request("POST", "http://superlink")
    response = httpx.Response(status, request=request)
    return httpx.HTTPStatusError("failed", request=request, response=response)


class SuperLink:
    """Stores objects; ``fails``: what the next calls of a function raise, instead or afterwards."""

    def __init__(self, *pending: str) -> None:
        self.stored: dict[str, bytes] = {}
        self.pending = set(pending)
        self.fails: dict[str, list[Exception]] = {}
        self.calls: list[str] = []
        self.waited = 0.0

    def fail(self, name: str) -> None:
        self.calls.append(name)
        if self.fails.get(name):
            raise self.fails[name].pop(0)

    def receive(self) -> Any:
        self.fail("receive")
        return "message", TREE

    def send(self, message: Any, tree: ObjectTree, seconds: float) -> tuple[set[str], str]:
        self.fail("send")
        return set(self.pending), "session"

    def pull_object(self, run_id: int, object_id: str) -> bytes:
        self.fail("pull")
        if object_id in self.pending:
            raise ObjectUnavailableError(object_id)
        if object_id not in self.stored:
            raise ObjectPullError(object_id, "not found")
        return self.stored[object_id]

    def push_object(self, run_id: int, session: str, object_id: str, content: bytes) -> None:
        if object_id not in self.pending:
            raise ObjectPushError(object_id, run_id, session)
        if self.fails.get("push before"):
            raise self.fails["push before"].pop(0)
        self.pending.remove(object_id)
        self.stored[object_id] = content
        self.fail("push")

    @contextmanager
    def connect(self, address: str) -> Iterator[tuple[Any, ...]]:
        other: Callable[..., None] = lambda *arguments: None  # noqa: E731
        yield (7, self.receive, self.send, other, other, self.pull_object, self.push_object, other)

    def connected(self) -> Any:
        clock = SimpleNamespace(monotonic=lambda: 0.0, sleep=self.sleep)
        return patient(self.connect, clock)("address")

    def sleep(self, seconds: float) -> None:
        self.waited += seconds


def test_a_busy_superlink_is_asked_again() -> None:
    link = SuperLink()
    link.fails = {"receive": [failed(500), failed(500)]}
    with link.connected() as (node_id, receive, *_):
        assert (node_id, receive()) == (7, ("message", TREE))
    assert link.waited == sum(WAITS[:2])


@pytest.mark.parametrize("status, calls", [(500, len(WAITS) + 1), (403, 1)])
def test_an_error_that_stays_or_is_another_is_raised(status: int, calls: int) -> None:
    link = SuperLink()
    link.fails = {"receive": [failed(status)] * 20}
    with link.connected() as (_, receive, *_), pytest.raises(httpx.HTTPStatusError):
        receive()
    assert link.calls == ["receive"] * calls


@pytest.mark.parametrize("when", ["push", "push before"])
def test_an_object_is_stored_whether_it_or_its_answer_was_lost(when: str) -> None:
    link = SuperLink("part")
    error = failed(500) if when == "push" else ObjectPushError("part", 1, "session")
    link.fails = {when: [error]}
    with link.connected() as (*_, push_object, _):
        push_object(1, "session", "part", b"content")
    assert link.stored == {"part": b"content"}


def test_an_object_that_the_superlink_has_dropped_is_an_error() -> None:
    """A connection that breaks for longer than Flower keeps an unfinished reply."""
    link = SuperLink()
    with link.connected() as (*_, push_object, _), pytest.raises(ObjectPullError):
        push_object(1, "session", "part", b"content")


def test_if_the_answer_to_the_reply_was_lost_all_objects_are_sent() -> None:
    link = SuperLink()
    with link.connected() as (_, _, send, *_):
        assert send("message", TREE, 1.0) == ({"root", "part"}, "")
    link.pending = {"part"}
    with link.connected() as (_, _, send, *_):
        assert send("message", TREE, 1.0) == ({"part"}, "session")
