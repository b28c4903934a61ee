"""Replies that come late, twice, never, or in another's name; on a clock of the test's own."""

import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import httpx
import pytest

from prelort.federation import transport as module
from prelort.federation.content import content_of
from prelort.federation.flower import Error, Message, MessageType, RecordDict
from prelort.federation.transport import NO_ANSWER, PULL_BYTES, Engine, exchange, portions
from small_federation import PlannedGrid


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


Start = Callable[..., PlannedGrid]


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Start:
    def make(arrivals: object) -> PlannedGrid:
        grid = PlannedGrid(arrivals)  # type: ignore[arg-type]
        monkeypatch.setattr(module, "time", grid)
        return grid

    return make


def messages_to(*nodes: int) -> Iterator[Message]:
    for node in nodes:
        yield Message(RecordDict(), dst_node_id=node, message_type=MessageType.TRAIN)


def outcomes(engine: Engine, *nodes: int) -> list[tuple[int, str]]:
    return [
        (r.metadata.src_node_id, r.error.reason if r.has_error() else "good")
        for r in exchange(engine, messages_to(*nodes))
    ]


def large_to(*nodes: int, size: int) -> Iterator[Message]:
    for node in nodes:
        content = content_of("{}", b"x" * size)
        yield Message(content, dst_node_id=node, message_type=MessageType.TRAIN)


@pytest.mark.parametrize(
    "sizes, parts",
    [
        ([], []),
        ([0, 0, 0], [3]),
        ([4, 4, 2], [3]),
        ([4, 4, 3], [2, 1]),
        ([11, 1, 10, 10], [1, 1, 1, 1]),
        ([1, 11, 0, 1], [1, 1, 2]),
        ([10, 0, 0, 1], [3, 1]),
    ],
)
def test_portions_keep_the_order_and_the_bound(sizes: list[int], parts: list[int]) -> None:
    found = portions({f"m{i}": size for i, size in enumerate(sizes)}, max_rank=10)
    assert [len(part) for part in found] == parts
    assert [name for part in found for name in part] == [f"m{i}" for i in range(len(sizes))]


def test_large_replies_are_pulled_one_by_one_in_the_order_asked(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server holds one while the others wait at the SuperLink."""
    nodes = range(2000, 2004)
    grid = start({node: [(2004.0 - node, good)] for node in nodes})  # the last is there first
    grid.sleep = lambda seconds: setattr(grid, "now", 10.0)  # type: ignore[method-assign]
    found = exchange(Engine(grid, None, 100.0), large_to(*nodes, size=PULL_BYTES // 2 + 1))
    order = [next(found).metadata.src_node_id]
    assert grid.pulled == [(1, 0)] * 4 + [(1, 1)]
    order += [reply.metadata.src_node_id for reply in found]
    assert order == list(nodes)


def test_small_replies_are_pulled_together(start: Start) -> None:
    grid = start({node: [(0.0, good)] for node in range(2000, 2010)})
    assert len(outcomes(Engine(grid, None, 100.0), *range(2000, 2010))) == 10
    assert grid.pulled == [(10, 10)]


def test_a_reply_that_was_taken_is_free_before_the_next_is_pulled(start: Start) -> None:
    grid = start({node: [(0.0, good)] for node in range(2000, 2004)})
    seen: list[weakref.ref[RecordDict]] = []
    pull = grid.pull_messages

    def watched(ids: Iterable[str]) -> Iterable[Message]:
        assert all(reference() is None for reference in seen)
        return pull(ids)

    grid.pull_messages = watched  # type: ignore[method-assign]
    for reply in exchange(Engine(grid, None, 100.0), large_to(*range(2000, 2004), size=PULL_BYTES)):
        seen.append(weakref.ref(reply.content))
        del reply
    assert len(seen) == 4


def failing(status: int, times: int, call: Callable[..., Any]) -> Callable[..., Any]:
    """The call, when it has failed so often with this status of HTTP."""
    left = [None] * times

    def attempt(*arguments: Any) -> Any:
        if left:
            left.pop()
            request = httpx.Request("POST", "http://superlink")
            answer = httpx.Response(status, request=request)
            raise httpx.HTTPStatusError("failed", request=request, response=answer)
        return call(*arguments)

    return attempt


def test_replies_are_asked_for_again_where_the_superlink_is_busy(start: Start) -> None:
    """Its database is locked where several sites write much: it says that it has failed."""
    grid = start({2000: [(0.0, good)], 2001: [(0.0, good)]})
    grid.pull_messages = failing(500, 3, grid.pull_messages)  # type: ignore[method-assign]
    found = outcomes(Engine(grid, None, 100.0), 2000, 2001)
    assert found == [(2000, "good"), (2001, "good")]


def test_who_cannot_be_written_to_by_a_busy_superlink_is_left_out(start: Start) -> None:
    grid = start({2000: [(0.0, good)], 2001: [(0.0, good)]})
    grid.push_messages = failing(503, 1, grid.push_messages)  # type: ignore[method-assign]
    found = outcomes(Engine(grid, None, 100.0), 2000, 2001)
    assert found == [(2000, "cannot be reached"), (2001, "good")]


@pytest.mark.parametrize("call", ["pull_messages", "push_messages"])
def test_other_errors_of_the_superlink_are_raised(start: Start, call: str) -> None:
    grid = start({2000: [(0.0, good)]})
    setattr(grid, call, failing(403, 1, getattr(grid, call)))
    with pytest.raises(httpx.HTTPStatusError):
        outcomes(Engine(grid, None, 100.0), 2000)


@pytest.mark.parametrize("in_flight", [None, 1, 2, 10])
def test_every_message_gets_exactly_one_reply(start: Start, in_flight: int | None) -> None:
    grid = start({node: [(node % 3, good)] for node in range(2000, 2007)})
    found = outcomes(Engine(grid, in_flight, 100.0), *range(2000, 2007))
    assert sorted(found) == [(node, "good") for node in range(2000, 2007)]


def test_replies_are_taken_as_they_arrive(start: Start) -> None:
    grid = start({2000: [(5.0, good)], 2001: [(1.0, good)], 2002: [(3.0, good)]})
    found = outcomes(Engine(grid, None, 100.0), 2000, 2001, 2002)
    assert [node for node, _ in found] == [2001, 2002, 2000]


def test_no_more_messages_are_out_than_the_engine_allows(start: Start) -> None:
    grid = start({node: [(2.0, good)] for node in range(2000, 2006)})
    answered = 0
    for _ in exchange(Engine(grid, 2, 100.0), messages_to(*range(2000, 2006))):
        answered += 1
        assert len(grid.sent) <= answered + 2
    assert answered == 6


def test_who_does_not_answer_by_the_deadline_is_answered_for(start: Start) -> None:
    grid = start({2000: [(1.0, good)], 2001: [], 2002: [(2.0, good)]})
    found = outcomes(Engine(grid, None, 10.0), 2000, 2001, 2002)

    assert found == [(2000, "good"), (2002, "good"), (2001, "did not answer within 10 s")]
    assert 10.0 <= grid.now < 10.5


def test_the_code_of_no_answer_is_ours(start: Start) -> None:
    grid = start({2000: []})
    (reply,) = exchange(Engine(grid, None, 1.0), messages_to(2000))
    assert reply.error.code == NO_ANSWER


def test_a_late_reply_is_not_taken(start: Start) -> None:
    grid = start({2000: [(11.0, good)]})
    assert outcomes(Engine(grid, None, 10.0), 2000) == [(2000, "did not answer within 10 s")]


def test_a_round_ends_when_all_have_answered_and_not_at_the_deadline(start: Start) -> None:
    grid = start({2000: [(1.0, good)]})
    assert outcomes(Engine(grid, None, 1000.0), 2000) == [(2000, "good")]
    assert grid.now < 2.0


def test_messages_that_never_went_out_are_answered_for_too(start: Start) -> None:
    grid = start({2000: [(6.0, good)], 2001: [(6.0, good)], 2002: [(6.0, good)]})
    found = outcomes(Engine(grid, 1, 10.0), 2000, 2001, 2002)
    late = "did not answer within 10 s"
    assert found == [(2000, "good"), (2001, late), (2002, late)]


def test_a_second_answer_is_passed_over(start: Start) -> None:
    grid = start({2000: [(1.0, good), (1.0, good), (2.0, good)], 2001: [(4.0, good)]})
    found = outcomes(Engine(grid, None, 100.0), 2000, 2001)
    assert found == [(2000, "good"), (2001, "good")]


def test_a_reply_to_what_was_not_asked_is_passed_over(start: Start) -> None:
    grid = start({2000: [(1.0, strange), (2.0, good)]})
    assert outcomes(Engine(grid, None, 100.0), 2000) == [(2000, "good")]


def test_an_error_from_the_superlink_is_the_asked_nodes(start: Start) -> None:
    grid = start({2000: [(1.0, from_superlink)], 2001: [(1.0, good)]})
    found = outcomes(Engine(grid, None, 100.0), 2000, 2001)
    assert found == [(2000, "node unavailable"), (2001, "good")]


def test_nobody_to_ask_ends_at_once(start: Start) -> None:
    assert outcomes(Engine(start({}), None, float("inf"))) == []


def test_messages_are_made_one_by_one_after_the_deadline_too(start: Start) -> None:
    grid = start({node: [] for node in range(2000, 2005)})
    made = 0

    def messages() -> Iterator[Message]:
        nonlocal made
        for message in messages_to(*range(2000, 2005)):
            made += 1
            yield message

    for count, _reply in enumerate(exchange(Engine(grid, 1, 1.0), messages()), start=1):
        assert made == count
