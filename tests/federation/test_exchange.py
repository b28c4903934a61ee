"""Replies that come late, twice, never, or in another's name; on a clock of the test's own."""

from collections.abc import Callable, Iterator

import pytest
from small_federation import PlannedGrid

from prelort.federation import exchange as module
from prelort.federation.exchange import NO_ANSWER, Engine, exchange
from prelort.federation.flower import Error, Message, MessageType, RecordDict


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
