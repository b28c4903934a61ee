"""Replies that come late, twice, never, or in another's name; on a clock of the test's own."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import httpx
import pytest

from prelort.federation.content import content_of
from prelort.federation.flower import Error, Message, MessageType, RecordDict
from prelort.federation.transport import (
    EARLY_BYTES,
    MARGIN_SECONDS,
    NO_ANSWER,
    NOT_SENT,
    PULL_BYTES,
    PULL_RATE,
    Transport,
)
from small_federation import PlannedGrid

Arrivals = Mapping[int, Sequence[tuple[float, Callable[[Message], Message]]]]


def good(message: Message) -> Message:
    return Message(RecordDict(), reply_to=message)


def from_superlink(message: Message) -> Message:
    """What a SuperLink says of a node that is gone: an error whose source is itself (node 1)."""
    reply = Message(Error(9, "node unavailable"), reply_to=message)
    reply.metadata.__dict__["_src_node_id"] = 1
    assert reply.metadata.src_node_id == 1
    return reply


def strange(message: Message) -> Message:
    reply = Message(RecordDict(), reply_to=message)
    reply.metadata.__dict__["_reply_to_message_id"] = "of another run"
    return reply


def messages_to(*nodes: int, size: int = 0) -> Iterator[Message]:
    for node in nodes:
        content = content_of("{}", b"x" * size) if size else RecordDict()
        yield Message(content, dst_node_id=node, message_type=MessageType.TRAIN)


def transport(
    grid: PlannedGrid, in_flight: int | None = None, deadline: float = 100.0
) -> Transport:
    return Transport(grid, in_flight, deadline, clock=grid)


def outcomes(
    arrivals: Arrivals | PlannedGrid,
    *nodes: int,
    in_flight: int | None = None,
    deadline: float = 100.0,
) -> list[tuple[int, str]]:
    """Each reply's node, and its error's reason or "good"."""
    grid = arrivals if isinstance(arrivals, PlannedGrid) else PlannedGrid(arrivals)
    over = transport(grid, in_flight, deadline)
    return [
        (r.metadata.src_node_id, r.error.reason if r.has_error() else "good")
        for r in over.send_and_receive(messages_to(*(nodes or grid.arrivals)))
    ]


@pytest.mark.parametrize("in_flight", [None, 1, 2, 10])
def test_every_message_gets_exactly_one_reply(in_flight: int | None) -> None:
    arrivals = {node: [(node % 3, good)] for node in range(2000, 2007)}
    assert sorted(outcomes(arrivals, in_flight=in_flight)) == [(node, "good") for node in arrivals]


def test_replies_are_taken_as_they_arrive_until_all_are_here() -> None:
    grid = PlannedGrid({2000: [(5.0, good)], 2001: [(1.0, good)], 2002: [(3.0, good)]})
    assert [node for node, _ in outcomes(grid)] == [2001, 2002, 2000]
    assert 5.0 <= grid.now < 5.5  # and not the deadline
    assert outcomes({}) == []


def test_no_more_messages_are_in_flight_than_allowed() -> None:
    grid = PlannedGrid({node: [(2.0, good)] for node in range(2000, 2006)})
    answered = 0
    for _ in transport(grid, 2).send_and_receive(messages_to(*grid.arrivals)):
        answered += 1
        assert len(grid.sent) <= answered + 2
    assert answered == 6


LATE = "did not answer within 10 s"


@pytest.mark.parametrize(
    "arrivals, in_flight, expected",
    [
        ({2000: [(1, good)], 2001: [], 2002: [(2, good)]}, None, ["good", "good", LATE]),
        ({2000: [(11.0, good)]}, None, [LATE]),
        ({node: [(6.0, good)] for node in (2000, 2001, 2002)}, 1, ["good", LATE, LATE]),
    ],
)
def test_who_does_not_answer_by_the_deadline_is_answered_for(
    arrivals: Arrivals, in_flight: int | None, expected: list[str]
) -> None:
    grid = PlannedGrid(arrivals)
    found = outcomes(grid, in_flight=in_flight, deadline=10.0)
    assert [reason for _, reason in found] == expected
    assert sorted(node for node, _ in found) == sorted(arrivals)
    assert 10.0 <= grid.now < 10.5


def test_what_is_under_way_expires_soon_after_the_deadline() -> None:
    grid = PlannedGrid({2000: []})
    (reply,) = transport(grid, deadline=1.0).send_and_receive(messages_to(2000))
    assert reply.error.code == NO_ANSWER
    assert grid.sent["m0"].metadata.ttl == 1.0 + MARGIN_SECONDS


def test_second_and_unknown_replies_are_ignored() -> None:
    arrivals: Arrivals = {
        2000: [(1.0, good), (1.0, good), (2.0, good)],
        2001: [(3.0, strange), (4.0, good)],
    }
    assert outcomes(arrivals) == [(2000, "good"), (2001, "good")]


def test_an_error_from_the_superlink_is_the_asked_nodes() -> None:
    found = outcomes({2000: [(1.0, from_superlink)], 2001: [(1.0, good)]})
    assert found == [(2000, "node unavailable"), (2001, "good")]


class TestMemory:
    def test_large_replies_are_pulled_one_by_one_in_the_order_asked(self) -> None:
        """The server holds one while the others wait at the SuperLink."""
        grid = PlannedGrid({node: [(0.0, good)] for node in range(2000, 2004)})
        messages = messages_to(*grid.arrivals, size=PULL_BYTES // 2 + 1)
        replies = transport(grid).send_and_receive(messages)
        assert [reply.metadata.src_node_id for reply in replies] == list(grid.arrivals)
        assert grid.pulled == [(1, 1)] * 4

    def test_a_reply_that_was_taken_is_free_before_the_next_is_pulled(self) -> None:
        seen: list[weakref.ref[RecordDict]] = []

        class Watching(PlannedGrid):
            def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
                assert all(reference() is None for reference in seen)
                return super().pull_messages(message_ids)

        grid = Watching({node: [(0.0, good)] for node in range(2000, 2004)})
        messages = messages_to(*grid.arrivals, size=PULL_BYTES)
        for reply in transport(grid).send_and_receive(messages):
            seen.append(weakref.ref(reply.content))
            del reply
        assert len(seen) == 4


class FailingGrid(PlannedGrid):
    """Its call of this name fails so often with this status of HTTP."""

    def __init__(self, call: str, status: int, times: int) -> None:
        super().__init__({2000: [(0.0, good)], 2001: [(0.0, good)]})
        self.call, self.status, self.left = call, status, times

    def fail(self, call: str) -> None:
        if call == self.call and self.left:
            self.left -= 1
            request = httpx.Request("POST", "http://superlink")
            answer = httpx.Response(self.status, request=request)
            raise httpx.HTTPStatusError("failed", request=request, response=answer)

    def push_messages(self, messages: Any) -> Any:
        self.fail("push")
        return super().push_messages(messages)

    def pull_messages(self, message_ids: Any) -> Any:
        self.fail("pull")
        return super().pull_messages(message_ids)


class TestBusySuperLink:
    """Its database is locked where several sites write much: it says that it has failed."""

    def test_replies_are_asked_for_again(self) -> None:
        found = outcomes(FailingGrid("pull", 500, times=3))
        assert found == [(2000, "good"), (2001, "good")]

    def test_a_message_is_sent_again(self) -> None:
        grid = FailingGrid("push", 500, times=3)
        assert outcomes(grid) == [(2000, "good"), (2001, "good")]
        assert 21.0 <= grid.now < 22.0

    def test_who_cannot_be_sent_anything_is_left_out(self) -> None:
        grid = FailingGrid("push", 503, times=4)
        first, second = transport(grid).send_and_receive(messages_to(*grid.arrivals))
        assert (first.error.code, first.error.reason) == (NOT_SENT, "cannot be reached")
        assert first.metadata.src_node_id == 2000
        assert not second.has_error()

    @pytest.mark.parametrize("call", ["pull", "push"])
    def test_other_errors_are_raised(self, call: str) -> None:
        with pytest.raises(httpx.HTTPStatusError):
            outcomes(FailingGrid(call, 403, times=1))


LARGE = EARLY_BYTES // 2
"""Bytes of an adapter of which two may be early."""


def large(message: Message) -> Message:
    return Message(content_of("{}", b"x" * LARGE), reply_to=message)


class TestEarlyReplies:
    """Who adds replies up in a fixed order keeps the early ones: the rest stay at the SuperLink."""

    def early(self, first: float, deadline: float) -> tuple[list[tuple[int, str]], PlannedGrid]:
        """Six large replies, the first after so many seconds; without their content."""
        arrivals = {node: [(0.0, large)] for node in range(2000, 2006)}
        grid = PlannedGrid({**arrivals, 2000: [(first, large)]})
        found = []
        for reply in transport(grid, deadline=deadline).send_and_receive(
            messages_to(*grid.arrivals, size=LARGE)
        ):
            reason = reply.error.reason if reply.has_error() else "good"
            found.append((reply.metadata.src_node_id, reason))
            if grid.now < min(first, deadline):
                assert len(found) <= 2
        return found, grid

    def test_only_so_many_are_pulled_before_the_first(self) -> None:
        found, grid = self.early(first=5.0, deadline=100.0)
        assert [node for node, _ in found] == [2001, 2002, 2000, 2003, 2004, 2005]
        assert grid.now < 5.5

    def test_they_are_pulled_after_the_deadline_if_the_first_does_not_come(self) -> None:
        found, grid = self.early(first=1000.0, deadline=10.0)
        late = (2000, "did not answer within 10 s")
        good = [(node, "good") for node in range(2001, 2006)]
        assert found == [*good[:2], late, *good[2:]]
        ttl = [message.metadata.ttl for message in grid.sent.values()]
        assert ttl == [10 + MARGIN_SECONDS + n * LARGE / PULL_RATE for n in range(6)]

    def test_small_ones_are_all_pulled(self) -> None:
        grid = PlannedGrid({node: [(float(2010 - node), good)] for node in range(2000, 2010)})
        assert [node for node, _ in outcomes(grid)] == list(range(2009, 1999, -1))
