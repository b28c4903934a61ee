from collections.abc import Callable
from typing import Any

import pytest
from prelort.federation.server import ServerPlan, make_server_app, serve

from prelort.config import Config
from prelort.errors import ConfigError, PrelortError
from prelort.federation import wire
from prelort.federation.allocation import Allocation, ByLoss
from prelort.federation.client_manager import PULL_AT_ONCE, ClientManager, ConnectedClient
from prelort.federation.flower import Context, Grid, Message, MessageType, RecordDict
from prelort.federation.transport import Engine
from prelort.methods.interface import ServerState
from small_federation import (
    AGREEMENT,
    clients_of,
    in_process,
    make_config,
    make_state,
    small_client_app,
)

CLIENTS = clients_of([2, 8, 4, 4])


def introducing(**facts_of: dict[str, Any]) -> Callable[[Message, Context], Message]:
    """Clients as in CLIENTS; ``node_1={...}`` changes what node 1 says of itself."""
    usual = small_client_app(CLIENTS)

    def app(message: Message, context: Context) -> Message:
        index = context.node_config["partition-id"]
        changes = facts_of.get(f"node_{index}")
        if changes is None or message.metadata.message_type != MessageType.QUERY:
            return usual(message, context)
        client = CLIENTS[index]
        facts = {
            **AGREEMENT.header(client.rank).model_dump(),
            "client": client.name,
            "examples": client.examples,
            "max_rank": client.rank,
            **changes,
        }
        intro = wire.ClientProperties.model_construct(**facts)
        return Message(wire.pack(intro), reply_to=message)

    return app


def introductions(
    engine: Engine, refused: Callable[[str, str], None] = lambda *_: None
) -> list[ConnectedClient]:
    return ClientManager(AGREEMENT, refused).gather(engine, 1)


def introduced(app: Callable[[Message, Context], Message]) -> tuple[list[str], dict[str, str]]:
    refused: dict[str, str] = {}
    engine = Engine(in_process(app, len(CLIENTS)), 1, float("inf"))
    found = introductions(engine, refused.__setitem__)
    return [p.client.name for p in found], refused


def test_everyone_is_known_by_name_rank_and_examples() -> None:
    grid = in_process(small_client_app(CLIENTS), len(CLIENTS))
    found = introductions(Engine(grid, 1, float("inf")))

    assert [p.client for p in found] == CLIENTS
    assert [p.node_id for p in found] == list(grid.get_node_ids())


def test_many_nodes_are_looked_at_once_and_not_once_for_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clients = clients_of([2, 8, 4] * 100)
    grid = in_process(small_client_app(clients), len(clients))
    looks, asked_for = [], []
    nodes, pulled = grid.get_node_ids, grid.pull_messages
    monkeypatch.setattr(grid, "get_node_ids", lambda: looks.append(1) or nodes())
    monkeypatch.setattr(
        grid, "pull_messages", lambda ids: asked_for.append(len(list(ids))) or pulled(ids)
    )
    found = introductions(Engine(grid, 1, float("inf")))
    assert {p.client.name: p.client for p in found} == {c.name: c for c in clients}
    assert len(looks) == 1
    assert max(asked_for) <= PULL_AT_ONCE
    assert len(asked_for) == len(clients)


def test_the_name_of_one_who_is_gone_is_free_again() -> None:
    app = introducing(node_1={"client": CLIENTS[0].name})
    grid = in_process(app, len(CLIENTS))
    engine = Engine(grid, 1, float("inf"), patience=0.0)
    refused: list[str] = []
    roster = ClientManager(AGREEMENT, lambda name, reason: refused.append(reason))
    first = roster.gather(engine, 1)
    assert refused == ["a client of this name is there already"]
    roster.doubt(first[0])
    assert roster.missing == [CLIENTS[0].name]
    assert [p.client.name for p in roster.gather(engine, 1)] == [p.client.name for p in first]


@pytest.mark.parametrize("said, known", [(4, 4), (6, 6), (8, 8), (9, 8), (1000, 8)])
def test_the_rank_that_one_can_be_raised_to_is_known_up_to_the_global_one(
    said: int, known: int
) -> None:
    app = introducing(node_2={"max_rank": said})
    engine = Engine(in_process(app, len(CLIENTS)), 1, float("inf"))
    found = introductions(engine)
    assert [p.client for p in found] == CLIENTS
    assert [p.max_rank for p in found] == [2, 8, known, 4]


def test_the_order_is_that_of_the_names_whatever_the_nodes() -> None:
    turned = CLIENTS[::-1]
    grid = in_process(small_client_app(turned), len(turned))
    found = introductions(Engine(grid, 1, float("inf")))
    assert [p.client for p in found] == CLIENTS


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"base": "base-9"}, "another base model: fingerprint base-9, expected base-0"),
        ({"layers": "none"}, "adapts other layers"),
        ({"scale_rule": "rslora"}, "uses another scale rule: rslora 2"),
        ({"scale": 16.0}, "uses another scale rule: constant 16"),
        ({"scale": 0.0}, "malformed header: scale"),
        ({"protocol": 2}, "speaks protocol 2, expected 3"),
        ({"rank": 0}, "malformed header: rank"),
        ({"rank": 9}, "offers rank 9, but the global adapter has 8"),
        ({"max_rank": 0}, "malformed header: max_rank"),
        ({"examples": 0}, "malformed header: examples"),
        ({"client": ""}, "malformed header: client"),
        ({"client": "n" * 201}, "malformed header: client"),
    ],
)
def test_who_does_not_fit_is_left_out_with_the_reason(changes: dict[str, Any], reason: str) -> None:
    names, refused = introduced(introducing(node_1=changes))

    assert names == ["site-0", "site-2", "site-3"]
    ((who, why),) = refused.items()
    assert reason in why
    assert who in ("site-1", "node 1001")


def test_two_of_one_name_are_not_both_taken() -> None:
    names, refused = introduced(introducing(node_2={"client": "site-0"}))
    assert names == ["site-0", "site-1", "site-3"]
    assert refused == {"site-0": "a client of this name is there already"}


def test_a_node_that_raises_is_left_out() -> None:
    usual = small_client_app(CLIENTS)

    def app(message: Message, context: Context) -> Message:
        if context.node_config["partition-id"] == 3:
            raise RuntimeError("no data here")
        return usual(message, context)

    names, refused = introduced(app)
    assert names == ["site-0", "site-1", "site-2"]
    assert refused == {"node 1003": "RuntimeError: no data here"}


def test_a_node_that_says_nothing_is_left_out() -> None:
    usual = small_client_app(CLIENTS)

    def app(message: Message, context: Context) -> Message:
        if context.node_config["partition-id"] == 3:
            return Message(RecordDict(), reply_to=message)
        return usual(message, context)

    assert introduced(app)[1] == {"node 1003": "carries no header"}


class TestServe:
    def serve(
        self,
        app: Callable[[Message, Context], Message],
        config: Config,
        allocation: Allocation | None = None,
    ) -> tuple[ServerState, list[dict[str, Any]]]:
        events: list[dict[str, Any]] = []
        ended: list[ServerState] = []
        plan = ServerPlan(
            config=config,
            state=make_state(),
            spec=AGREEMENT,
            emit=events.append,
            before_rounds=lambda now: events.append({"event": "before", "is": now.levels}),
            after_round=lambda now: events.append({"event": "after", "round": now.state.round}),
            finished=lambda now: ended.append(now.state),
            allocation=allocation or Allocation(),
        )
        serve(plan, Engine(in_process(app, len(CLIENTS)), 1, float("inf")))
        return ended[0], events

    def test_runs_the_rounds_with_those_that_fit(self) -> None:
        config = make_config(clients_per_round=3)
        state, events = self.serve(introducing(node_1={"base": "x"}), config)

        assert state.round == 2
        assert [e for e in events if e["event"] == "client_refused"] == [
            {
                "event": "client_refused",
                "round": 0,
                "client": "site-1",
                "reason": "has another base model: fingerprint x, expected base-0",
            }
        ]
        assert {"event": "before", "is": (2, 4)} in events
        assert [e["round"] for e in events if e["event"] == "after"] == [1, 2]

    def test_the_levels_are_the_offered_ranks_and_those_that_are_planned(self) -> None:
        plan = Allocation({2: {"site-0": 3, "site-3": 8}}, ByLoss(6, 0.5))
        _, events = self.serve(small_client_app(CLIENTS), make_config(), plan)
        assert {"event": "before", "is": (2, 3, 4, 6, 8)} in events

    def test_too_few_that_fit_is_told_before_any_training(self) -> None:
        config = make_config(clients_per_round=4)
        with pytest.raises(ConfigError, match="clients_per_round = 4, but there are 3 clients"):
            self.serve(introducing(node_1={"base": "x"}), config)

    def test_nobody_who_fits_is_told(self) -> None:
        changes = {f"node_{i}": {"scale": 8.0} for i in range(4)}
        with pytest.raises(ConfigError, match="no client can take part"):
            self.serve(introducing(**changes), make_config())

    def test_a_method_that_cannot_serve_these_clients_is_told(self) -> None:
        config = make_config()
        fedit = config.model_copy(
            update={"method": config.method.model_copy(update={"name": "fedit"})}
        )
        with pytest.raises(ConfigError, match=r"needs one rank .* \[2, 4, 8\]"):
            self.serve(small_client_app(CLIENTS), fedit)

    def test_the_server_app_is_a_flower_app(self) -> None:
        ended: list[ServerState] = []
        plan = ServerPlan(
            make_config(),
            make_state(),
            AGREEMENT,
            emit=lambda event: None,
            before_rounds=lambda now: None,
            after_round=lambda now: None,
            finished=lambda now: ended.append(now.state),
        )

        def engine(grid: Grid) -> Engine:
            return Engine(grid, 1, float("inf"))

        app = make_server_app(plan, engine)
        app(in_process(small_client_app(CLIENTS), 4), Context(1, 1, {}, RecordDict(), {}))
        assert ended[0].round == 2


def test_errors_a_user_can_put_right_share_a_base() -> None:
    assert issubclass(ConfigError, PrelortError)
