"""Reports of a long transfer: how much of a message is there, at the server."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

from flwr.proto.message_pb2 import ObjectTree

from prelort.events import Transferring
from prelort.federation.flower import Message, MessageType, RecordDict
from prelort.federation.progress import Progress
from prelort.federation.transport import Transport
from small_federation import PlannedGrid, clients_of, in_process, make_run, small_client_app

PARTS, PART = 4, 5_000_000
SECONDS = 20.0
"""Of each part."""


class SlowClient:
    """What a Flower grid sends and fetches the parts of messages with."""

    def __init__(self, clock: Any) -> None:
        self.clock = clock

    def PushMessages(self, request: Any) -> Any:
        return SimpleNamespace(objects_to_push=["part"] * PARTS)

    def PushObject(self, request: Any) -> None:
        self.clock.now += SECONDS

    def PullMessages(self, request: Any) -> Any:
        children = [ObjectTree(object_id=str(number)) for number in range(PARTS - 1)]
        return SimpleNamespace(message_object_trees=[ObjectTree(children=children)])

    def PullObject(self, request: Any) -> Any:
        self.clock.now += SECONDS
        return SimpleNamespace(object_available=True, object_content=b"x" * PART)


class SlowGrid(PlannedGrid):
    """Each part of its messages takes a while."""

    def __init__(self) -> None:
        super().__init__({2000: [(0.0, lambda message: Message(RecordDict(), reply_to=message))]})
        self._runtime_client = SlowClient(self)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        client = self._runtime_client
        client.PushMessages(None)
        for _ in range(PARTS):
            client.PushObject(SimpleNamespace(object_content=b"x" * PART))
        return super().push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        self._runtime_client.PullMessages(None)
        for _ in range(PARTS):
            self._runtime_client.PullObject(None)
        return super().pull_messages(message_ids)


def test_a_transfer_is_reported_every_half_minute_until_it_is_complete() -> None:
    told: list[tuple[int, str, int, float]] = []

    def report(request: Message, direction: str, size: int, share: float) -> None:
        told.append((request.metadata.dst_node_id, direction, size, share))

    grid = SlowGrid()
    messages = iter([Message(RecordDict(), dst_node_id=2000, message_type=MessageType.TRAIN)])
    (reply,) = Transport(grid, clock=grid, report=report).send_and_receive(messages)
    assert not reply.has_error()
    # Of 20, 40, 60 and 80 s.
    assert told == [
        (2000, way, parts * PART, parts / PARTS) for way in ("down", "up") for parts in (2, PARTS)
    ]
    assert not vars(grid._runtime_client).keys() & {"PushObject", "PullObject"}


def test_the_server_says_whose_message_it_is() -> None:
    clients = clients_of([2, 4])
    grid: Any = in_process(small_client_app(clients), len(clients))
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    client = grid._runtime_client = SlowClient(clock)
    push_messages = grid.push_messages

    def slowly(messages: Any) -> Any:
        client.PushMessages(None)
        for _ in range(PARTS):
            client.PushObject(SimpleNamespace(object_content=b"x" * PART))
        return push_messages(messages)

    grid.push_messages = slowly
    run = make_run(None, transport=Transport(grid, 1, clock=clock))
    run.train()
    told = [(event.round, event.client, event.direction) for event in run.of(Transferring)]
    assert told == [
        (n, name, "down") for n in (1, 2) for name in ("site-0", "site-1") for _ in range(2)
    ]


def test_a_large_message_that_is_complete_is_reported_once() -> None:
    told: list[tuple[int, float, float]] = []
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    progress = Progress(lambda *values: told.append(values), clock)
    progress.expect(3)
    for size in (4_000_000, 4_000_000, 4_000_000):
        clock.now += 1.0
        progress.count(size)
    assert told == [(12_000_000, 1.0, 3.0)]


def test_small_messages_are_not_reported() -> None:
    told: list[Any] = []
    progress = Progress(lambda *values: told.append(values), SimpleNamespace(monotonic=lambda: 0.0))
    progress.expect(1)
    progress.count(1000)
    assert told == []
