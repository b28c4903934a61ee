"""Clients that state their properties, come, go, fail and come back, on a clock of the test's."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from prelort.errors import QuorumError
from prelort.events import (
    ClientFailed,
    ClientFinished,
    ClientJoined,
    ClientLeft,
    ClientRefused,
    RoundRepeated,
    RoundStarted,
    Waiting,
)
from prelort.federation.client_manager import (
    GRACE_SECONDS,
    RETRY_SECONDS,
    START_SECONDS,
    ClientManager,
    ConnectedClient,
)
from prelort.federation.flower import Context, Error, Message, MessageType, RecordDict
from prelort.federation.transport import Transport
from prelort.methods.interface import Client
from small_federation import (
    SPEC,
    PlannedGrid,
    SmallRun,
    clients_of,
    in_process,
    make_config,
    make_run,
    make_state,
    small_client_app,
)

CLIENTS = clients_of([2, 8, 4, 4])


# Properties


def connected(grid: Any) -> tuple[list[ConnectedClient], dict[str, str]]:
    """Who is connected where all are there from the start, and who is refused and why."""
    refused: dict[str, str] = {}
    manager = ClientManager(Transport(grid, 1), SPEC, refused.__setitem__, 10**7)
    return manager.gather(1), refused


def test_clients_are_known_by_their_properties_in_the_order_of_their_names() -> None:
    for clients in (CLIENTS, CLIENTS[::-1]):
        grid = in_process(small_client_app(clients), len(clients))
        found, _ = connected(grid)
        assert [one.client for one in found] == CLIENTS
        nodes = {one.client: one.node_id for one in found}
        assert [nodes[client] for client in clients] == list(grid.get_node_ids())


@pytest.mark.parametrize("stated, known", [(4, 4), (6, 6), (8, 8), (9, 8), (1000, 8)])
def test_the_maximum_rank_is_known_up_to_the_global_one(stated: int, known: int) -> None:
    app = small_client_app(CLIENTS, properties={2: {"max_rank": stated}})
    assert [one.max_rank for one in connected(in_process(app, 4))[0]] == [2, 8, known, 4]


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"base": "base-9"}, "another base model: fingerprint base-9, expected base-0"),
        ({"layers": "none"}, "adapts other layers"),
        ({"scale": 16.0}, "uses another scale rule: constant 16"),
        ({"protocol": 2}, "speaks protocol 2"),
        ({"rank": 9}, "offers rank 9, but the global adapter has 8"),
        ({"examples": 10**8}, "claims 100000000 examples, allowed are 1 to"),
        ({"client": ""}, "malformed header: client"),
        ({"client": "n" * 201}, "malformed header: client"),
        ({"client": "site-0"}, "a client of this name is connected already"),
    ],
)
def test_who_does_not_fit_is_refused_with_the_reason(changes: dict[str, Any], reason: str) -> None:
    found, refused = connected(in_process(small_client_app(CLIENTS, properties={1: changes}), 4))
    assert [one.client.name for one in found] == ["site-0", "site-2", "site-3"]
    ((name, why),) = refused.items()
    assert reason in why
    assert name in ("site-0", "site-1", "node 1001")


@pytest.mark.parametrize("error", [RuntimeError("no data here"), None])
def test_a_node_without_properties_is_refused(error: Exception | None) -> None:
    def app(message: Message, context: Context) -> Message:
        if context.node_config["partition-id"] != 3:
            return small_client_app(CLIENTS)(message, context)
        if error is not None:
            raise error
        return Message(RecordDict(), reply_to=message)

    found, refused = connected(in_process(app, 4))
    assert len(found) == 3
    reason = "carries no header" if error is None else "RuntimeError: no data here"
    assert refused == {"node 1003": reason}


# Over time


@dataclass
class Node:
    """A client, when its node is online, how long it takes, and when its training fails."""

    client: Client
    online: Callable[[float], bool] = lambda now: True
    delay: float = 1.0
    properties: dict[str, Any] = field(default_factory=dict)
    fails: Callable[[float], bool] = lambda now: False


class ChangingGrid(PlannedGrid):
    """Nodes that are online at times. Node ids are 2000 and up."""

    def __init__(self, *nodes: Node) -> None:
        super().__init__({})
        self.nodes = {2000 + index: node for index, node in enumerate(nodes)}
        self.asked: list[tuple[str, str]] = []

    def get_node_ids(self) -> list[int]:
        return [number for number, node in self.nodes.items() if node.online(self.now)]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids: list[str] = []
        for message in messages:
            number = message.metadata.dst_node_id
            node = self.nodes[number]
            self.asked.append((message.metadata.message_type, node.client.name))
            self.arrivals = {number: [(node.delay, lambda m, node=node: self.answer(node, m))]}
            ids += super().push_messages([message])
        return ids

    def answer(self, node: Node, message: Message) -> Message:
        if message.metadata.message_type == MessageType.TRAIN and node.fails(self.now):
            return Message(Error(2, "it broke"), reply_to=message)
        app = small_client_app([node.client], properties={0: node.properties})
        return app(message, Context(1, 1, {"partition-id": 0}, RecordDict(), {}))

    def transport(self, patience: float | None = 100.0, **more: Any) -> Transport:
        return Transport(self, deadline=20.0, patience=patience, clock=self, **more)


def client(name: str, rank: int = 4) -> Client:
    return Client(name, rank, 10)


class TestClientManager:
    def gather(
        self, grid: ChangingGrid, needed: int, patience: float | None = 100.0, **more: Any
    ) -> tuple[ClientManager, list[str]]:
        self.refused: list[tuple[str, str]] = []
        self.waiting: list[tuple[float, list[str]]] = []
        manager = ClientManager(
            grid.transport(patience, **more), SPEC, lambda *said: self.refused.append(said), 10**7
        )
        names = lambda: [one.client.name for one in manager.connected]  # noqa: E731
        manager.gather(needed, lambda left: self.waiting.append((left, names())))
        return manager, names()

    def test_it_begins_as_soon_as_enough_are_connected(self) -> None:
        grid = ChangingGrid(Node(client("a")), Node(client("b"), online=lambda now: now >= 30.0))
        assert self.gather(grid, 2)[1] == ["a", "b"]
        assert 30.0 <= grid.now < 33.0
        ((left, connected),) = self.waiting  # and not at every look
        assert connected == ["a"]
        assert 97.0 < left <= 100.0

    def test_one_that_hangs_does_not_keep_the_others_for_long(self) -> None:
        grid = ChangingGrid(Node(client("a")), Node(client("b"), delay=1e9))
        assert self.gather(grid, 1)[1] == ["a"]
        assert GRACE_SECONDS <= grid.now < GRACE_SECONDS + 1

    def test_one_that_is_gone_is_missed_by_name_and_its_name_is_free(self) -> None:
        first = Node(client("b"), online=lambda now: now < 10.0)
        second = Node(client("b"), online=lambda now: now > 100.0)
        grid = ChangingGrid(Node(client("a")), first, second)
        manager, names = self.gather(grid, 2)
        assert (names, manager.missing) == (["a", "b"], [])
        grid.now = 11.0
        assert [one.client.name for one in manager.gather(1)] == ["a"]
        assert manager.missing == ["b"]
        grid.now = 101.0
        assert [one.node_id for one in manager.gather(2)] == [2000, 2002]

    def test_one_that_is_refused_is_reported_once_and_asked_again(self) -> None:
        node = Node(client("b"), properties={"base": "other"})
        grid = ChangingGrid(Node(client("a")), node)
        self.gather(grid, 2, patience=3 * RETRY_SECONDS + 10)
        assert len(self.refused) == 1
        assert grid.asked.count((MessageType.QUERY, "b")) == 4
        node.properties = {}
        assert self.gather(grid, 2)[1] == ["a", "b"]

    def test_a_disconnected_one_is_asked_again_and_may_have_another_rank(self) -> None:
        node = Node(client("b", 8))
        grid = ChangingGrid(Node(client("a")), node)
        manager, _ = self.gather(grid, 2)
        for _ in range(3):
            manager.gather(2)
        assert len(grid.asked) == 2  # who is connected is not asked again
        manager.disconnect("b")
        assert [one.client.name for one in manager.connected] == ["a"]
        node.client = client("b", 2)
        assert [one.client.rank for one in manager.gather(2)] == [4, 2]

    @pytest.mark.parametrize("late, seconds", [(40.0, 42.0), (1e9, START_SECONDS + 2)])
    def test_nodes_of_this_machine_that_are_just_starting_are_waited_for(
        self, late: float, seconds: float
    ) -> None:
        grid = ChangingGrid(Node(client("a")), Node(client("b"), online=lambda now: now >= late))
        _, names = self.gather(grid, 1, patience=None, nodes=2)
        assert names == (["a", "b"] if late < seconds else ["a"])
        assert grid.now < seconds


class TestRun:
    def train(self, grid: ChangingGrid, patience: float = 100.0, **more: Any) -> SmallRun:
        names = {"method", "state"} & more.keys()
        given = {name: more.pop(name) for name in names}
        settings = {"clients_per_round": 1.0, "min_clients": 1, "quorum": 1, **more}
        transport = grid.transport(patience)
        self.run = make_run(
            small_client_app([]), make_config(**settings), transport=transport, **given
        )
        self.run.train()
        return self.run

    def test_one_joins_and_its_level_stays_when_it_leaves(self) -> None:
        guest = Node(client("b", 8), online=lambda now: 1.5 <= now < 4.0)
        run = self.train(ChangingGrid(Node(client("a", 2)), guest), rounds=6)
        started = [event.clients for event in run.of(RoundStarted)]
        assert started[-1] == ("a",)
        assert ("a", "b") in started
        (joined,), (left,) = run.of(ClientJoined), run.of(ClientLeft)
        assert (joined.client, joined.rank, left.client) == ("b", 8, "b")
        assert left.round > joined.round
        assert run.state.levels == (2, 8)

    def test_one_that_fails_and_is_back_with_another_rank_trains_at_it(self) -> None:
        """Whatever rank it has been given before."""
        node = Node(client("a", 8))

        def fails(now: float) -> bool:
            if 2.0 < now < 4.0:
                node.client = client("a", 4)
                return True
            return False

        node.fails = fails
        state = replace(make_state(), ranks={"a": 6})
        run = self.train(ChangingGrid(node, Node(client("b", 2))), rounds=4, state=state)
        assert [(e.client, e.rank) for e in run.of(ClientFailed)] == [("a", 6)]
        assert [(e.client, e.rank) for e in run.of(ClientJoined)] == [("a", 4)]
        assert {e.rank for e in run.of(ClientFinished) if e.client == "a"} == {4}
        assert run.state.ranks == {}
        assert run.state.levels == (2, 4, 8)

    def test_a_round_that_fails_is_tried_again(self) -> None:
        grid = ChangingGrid(Node(client("a"), fails=lambda now: 2.0 < now < 5.0), Node(client("b")))
        run = self.train(grid, rounds=2, quorum=2)
        assert run.state.round == 2
        first = run.of(RoundRepeated)[0]
        assert first.attempt == 2
        assert "a: it broke" in first.reason

    def test_it_is_not_tried_for_ever(self) -> None:
        grid = ChangingGrid(Node(client("a"), fails=lambda now: now > 2.0), Node(client("b")))
        with pytest.raises(QuorumError, match="round 1 has 1 usable replies of"):
            self.train(grid, quorum=2, attempts=3, clients_per_round=2, min_clients=2)
        assert len(self.run.of(RoundStarted)) == 3
        assert [event.attempt for event in self.run.of(RoundRepeated)] == [2, 3]

    def test_all_leave_and_the_run_ends_with_a_sentence(self) -> None:
        grid = ChangingGrid(Node(client("a"), online=lambda now: now < 4.0))
        with pytest.raises(QuorumError) as raised:
            self.train(grid, patience=60.0, rounds=9)
        assert "0 clients are connected after waiting 60 s (federation.wait), 1 are needed" in str(
            raised.value
        )
        assert "missing: a" in str(raised.value)
        (waiting,) = self.run.of(Waiting)
        assert (waiting.connected, waiting.missing, waiting.needed) == ((), ("a",), 1)
        assert self.run.state.round >= 1  # what was finished is kept

    def test_everyone_who_is_connected_hears_of_the_end(self) -> None:
        grid = ChangingGrid(Node(client("a")), Node(client("b")))
        self.train(grid, rounds=1)
        assert {name for kind, name in grid.asked if kind == "query.end"} == {"a", "b"}

    def test_one_that_cannot_be_served_does_not_count_and_is_not_asked_each_round(self) -> None:
        guest = Node(client("b", 8), online=lambda now: now >= 1.5)
        leaving = Node(client("c", 2), online=lambda now: now < 3.0)
        grid = ChangingGrid(Node(client("a", 2)), guest, leaving)
        with pytest.raises(QuorumError, match=r"1 clients are connected .* 2 are needed"):
            self.train(grid, patience=2 * RETRY_SECONDS, rounds=9, method="fedit", min_clients=2)
        assert [event.client for event in self.run.of(ClientRefused)] == ["b"]
        assert grid.asked.count((MessageType.QUERY, "b")) <= 3
