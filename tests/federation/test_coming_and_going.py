"""Clients that come, go, fail and come back, on a grid and a clock of the test's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from prelort.federation.server import ServerPlan, Standing, serve

from prelort.errors import QuorumError
from prelort.federation import client_manager, wire
from prelort.federation import transport as exchange_module
from prelort.federation.client_manager import GRACE_SECONDS, RETRY_SECONDS, ClientManager
from prelort.federation.flower import Context, Error, Message, MessageType, RecordDict
from prelort.federation.transport import Engine
from prelort.methods.interface import Client
from small_federation import (
    AGREEMENT,
    PlannedGrid,
    make_config,
    make_state,
    small_client_app,
)


@dataclass
class Node:
    """A client, when its node is online, how long it takes, and when its training fails."""

    client: Client
    online: Callable[[float], bool] = lambda now: True
    delay: float = 1.0
    says: dict[str, Any] = field(default_factory=dict)
    fails: Callable[[float], bool] = lambda now: False


class ChangingGrid(PlannedGrid):
    """Nodes that are there at times. Node ids are 2000 and up."""

    def __init__(self, nodes: list[Node]) -> None:
        super().__init__({})
        self.nodes = {2000 + index: node for index, node in enumerate(nodes)}
        self.asked: list[tuple[str, str]] = []

    def get_node_ids(self) -> list[int]:
        return [number for number, node in self.nodes.items() if node.online(self.now)]

    def push_messages(self, messages: Any) -> Any:
        ids = []
        for message in messages:
            number = message.metadata.dst_node_id
            node = self.nodes[number]
            self.asked.append((message.metadata.message_type, node.client.name))
            self.arrivals = {number: [(node.delay, self._answer(node))]}
            ids += super().push_messages([message])
        return ids

    def _answer(self, node: Node) -> Callable[[Message], Message]:
        usual = small_client_app([node.client])

        def answer(message: Message) -> Message:
            if message.metadata.message_type == MessageType.TRAIN and node.fails(self.now):
                return Message(Error(2, "it broke"), reply_to=message)
            if message.metadata.message_type == MessageType.QUERY:
                facts = AGREEMENT.header(node.client.rank).model_dump()
                facts |= {"client": node.client.name, "examples": node.client.examples}
                facts |= {"max_rank": node.client.rank, **node.says}
                intro = wire.ClientProperties.model_construct(**facts)
                return Message(wire.pack(intro), reply_to=message)
            context = Context(1, 1, {"partition-id": 0}, RecordDict(), {})
            return usual(message, context)

        return answer


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Callable[..., ChangingGrid]:
    def make(*nodes: Node) -> ChangingGrid:
        grid = ChangingGrid(list(nodes))
        monkeypatch.setattr(exchange_module, "time", grid)
        monkeypatch.setattr(client_manager, "time", grid)
        return grid

    return make


Start = Callable[..., ChangingGrid]


def client(name: str, rank: int = 4) -> Client:
    return Client(name, rank, 10)


def engine_of(grid: ChangingGrid, patience: float = 100.0, deadline: float = 20.0) -> Engine:
    return Engine(grid, None, deadline, patience=patience)


class TestRoster:
    def gather(self, grid: ChangingGrid, wanted: int, patience: float = 100.0) -> Any:
        self.refused: list[tuple[str, str]] = []
        self.told: list[tuple[float, list[str]]] = []
        roster = ClientManager(AGREEMENT, lambda name, why: self.refused.append((name, why)))
        found = roster.gather(
            engine_of(grid, patience),
            wanted,
            lambda left: self.told.append((left, [p.client.name for p in roster.present])),
        )
        return roster, [p.client.name for p in found]

    def test_it_begins_as_soon_as_enough_are_there(self, start: Start) -> None:
        late = Node(client("b"), online=lambda now: now >= 30.0)
        grid = start(Node(client("a")), late)
        _, found = self.gather(grid, 2)
        assert found == ["a", "b"]
        assert 30.0 <= grid.now < 33.0
        assert self.told[0][1] == ["a"]
        assert 97.0 < self.told[0][0] <= 100.0
        assert len(self.told) == 1  # and not at every look

    def test_its_patience_ends(self, start: Start) -> None:
        grid = start(Node(client("a")))
        _, found = self.gather(grid, 2, patience=50.0)
        assert found == ["a"]
        assert 50.0 <= grid.now < 51.0

    def test_one_that_hangs_does_not_keep_the_others_for_long(self, start: Start) -> None:
        grid = start(Node(client("a")), Node(client("b"), delay=1e9))
        _, found = self.gather(grid, 1)
        assert found == ["a"]
        assert GRACE_SECONDS <= grid.now < GRACE_SECONDS + 1

    def test_one_that_is_gone_is_missed_by_name(self, start: Start) -> None:
        grid = start(Node(client("a")), Node(client("b"), online=lambda now: now < 10.0))
        roster, found = self.gather(grid, 2)
        assert (found, roster.missing) == (["a", "b"], [])
        grid.now = 11.0
        assert [p.client.name for p in roster.gather(engine_of(grid), 1)] == ["a"]
        assert roster.missing == ["b"]

    def test_one_that_is_refused_is_told_once_and_asked_again(self, start: Start) -> None:
        node = Node(client("b"), says={"base": "other"})
        grid = start(Node(client("a")), node)
        self.gather(grid, 2, patience=3 * RETRY_SECONDS + 10)
        assert len(self.refused) == 1
        assert grid.asked.count((MessageType.QUERY, "b")) == 4
        node.says = {}
        _, found = self.gather(grid, 2)
        assert found == ["a", "b"]

    def test_doubted_it_introduces_itself_again_perhaps_with_another_rank(
        self, start: Start
    ) -> None:
        node = Node(client("b", 8))
        grid = start(Node(client("a")), node)
        roster, _ = self.gather(grid, 2)
        roster.doubt(roster.present[1])
        assert [p.client.name for p in roster.present] == ["a"]
        node.client = client("b", 2)
        assert [p.client.rank for p in roster.gather(engine_of(grid), 2)] == [4, 2]

    def test_who_is_known_is_not_asked_again(self, start: Start) -> None:
        grid = start(Node(client("a")))
        roster, _ = self.gather(grid, 1)
        for _ in range(3):
            roster.gather(engine_of(grid), 1)
        assert grid.asked == [(MessageType.QUERY, "a")]


class TestServe:
    def serve(self, grid: ChangingGrid, patience: float = 100.0, **federation: Any) -> Standing:
        self.events: list[dict[str, Any]] = []
        self.standings: list[Standing] = []
        settings = {"clients_per_round": 1.0, "min_clients": 1, "quorum": 1, **federation}
        plan = ServerPlan(
            config=make_config(**settings),
            state=make_state(),
            spec=AGREEMENT,
            emit=self.events.append,
            before_rounds=self.standings.append,
            after_round=self.standings.append,
            finished=self.standings.append,
        )
        serve(plan, engine_of(grid, patience))
        return self.standings[-1]

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["event"] == kind]

    def test_one_joins_and_its_level_stays_when_it_leaves(self, start: Start) -> None:
        guest = Node(client("b", 8), online=lambda now: 1.5 <= now < 4.0)
        grid = start(Node(client("a", 2)), guest)
        end = self.serve(grid, rounds=6)
        assert [e["clients"] for e in self.of("round_started")][-1] == ["a"]
        assert ["a", "b"] in [e["clients"] for e in self.of("round_started")]
        (joined,), (left,) = self.of("client_joined"), self.of("client_left")
        assert (joined["client"], joined["rank"]) == ("b", 8)
        assert left["client"] == "b"
        assert left["round"] > joined["round"]
        assert end.levels == (2, 8)
        assert end.state.levels == (2, 8)

    def test_a_round_that_fails_is_tried_again(self, start: Start) -> None:
        grid = start(Node(client("a"), fails=lambda now: 2.0 < now < 5.0), Node(client("b")))
        end = self.serve(grid, rounds=2, quorum=2)
        assert end.state.round == 2
        repeated = self.of("round_repeated")
        assert [e["attempt"] for e in repeated][:1] == [2]
        assert "a: it broke" in repeated[0]["reason"]

    def test_it_is_not_tried_for_ever(self, start: Start) -> None:
        grid = start(Node(client("a"), fails=lambda now: now > 2.0), Node(client("b")))
        with pytest.raises(QuorumError, match="round 1 has 1 usable replies of"):
            self.serve(grid, rounds=2, quorum=2, attempts=3, clients_per_round=2, min_clients=2)
        assert len(self.of("round_started")) == 3
        assert [e["attempt"] for e in self.of("round_repeated")] == [2, 3]

    def test_all_leave_and_the_run_ends_with_a_sentence(self, start: Start) -> None:
        grid = start(Node(client("a"), online=lambda now: now < 4.0))
        with pytest.raises(QuorumError) as raised:
            self.serve(grid, patience=60.0, rounds=9)
        assert "0 clients are there after waiting 60 s (federation.wait), 1 are needed" in str(
            raised.value
        )
        assert "missing are a" in str(raised.value)
        (waiting,) = self.of("waiting")
        assert (waiting["present"], waiting["missing"], waiting["needed"]) == ([], ["a"], 1)
        assert self.standings[-1].state.round >= 1  # what was finished was handed over

    def test_everyone_who_is_there_hears_of_the_end(self, start: Start) -> None:
        grid = start(Node(client("a")), Node(client("b")))
        self.serve(grid, rounds=1)
        assert {name for kind, name in grid.asked if kind == "query.end"} == {"a", "b"}

    def test_a_newcomer_that_the_method_cannot_serve_is_refused(
        self, start: Start, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        guest = Node(client("b", 8), online=lambda now: now >= 1.5)
        grid = start(Node(client("a", 2)), guest)
        config = make_config(rounds=3, clients_per_round=1.0, min_clients=1, quorum=1)
        method = config.method.model_copy(update={"name": "fedit"})  # needs one rank
        events: list[dict[str, Any]] = []
        plan = ServerPlan(
            config=config.model_copy(update={"method": method}),
            state=make_state(2),
            spec=AGREEMENT,
            emit=events.append,
            before_rounds=lambda now: None,
            after_round=lambda now: None,
            finished=lambda now: None,
        )
        serve(plan, engine_of(grid))
        assert all(e["clients"] == ["a"] for e in events if e["event"] == "round_started")
        assert any(e["event"] == "client_refused" and e["client"] == "b" for e in events)
