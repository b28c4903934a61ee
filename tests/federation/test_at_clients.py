"""Measuring where the rows are: every client at its own rank, on its own rows."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from prelort.federation.strategy import AdapterStrategy

from prelort import methods
from prelort.adapters import LoraAdapter
from prelort.config import Config, MethodConfig, check
from prelort.federation import wire
from prelort.federation.flower import Context, Error, Message, MessageType, RecordDict
from prelort.federation.transport import Engine
from prelort.methods import Broadcast, Client, PrefixMethod, ServerState
from small_federation import (
    AGREEMENT,
    clients_of,
    in_process,
    make_strategy,
    run_rounds,
    small_client_app,
)

CLIENTS = clients_of([2, 4, 8, 4])
Answering = Callable[[Message, Context], Message]


def config_of(at_clients: bool = True, every: int = 0, **federation: Any) -> Config:
    return check(
        {
            "federation": {"rounds": 4, "clients_per_round": 2, **federation},
            "evaluation": {"at_clients": at_clients, "every": every, "batch_size": 7},
        }
    )


def reply_of(
    client: Client, request: wire.EvaluateRequest, /, **changes: Any
) -> wire.EvaluateReply:
    values = {
        **AGREEMENT.header(request.rank).model_dump(),
        "client": client.name,
        "round": request.round,
        "examples": client.examples,
        "weight": client.examples,
        "metrics": {"loss": float(client.name[-1])},
        **changes,
    }
    return wire.EvaluateReply.model_construct(**values)


class Measuring:
    """Clients that answer, and the requests and adapters that they got."""

    def __init__(self, **changes: dict[str, Any] | Exception | str) -> None:
        self.usual = small_client_app(CLIENTS)
        self.changes = changes
        self.asked: list[tuple[str, wire.EvaluateRequest, LoraAdapter, LoraAdapter | None]] = []

    def __call__(self, message: Message, context: Context) -> Message:
        if message.metadata.message_type != MessageType.EVALUATE:
            return self.usual(message, context)
        client = CLIENTS[int(context.node_config["partition-id"])]
        request = wire.header(message.content, wire.EvaluateRequest)
        self.asked.append((client.name, request, *wire.adapter(message.content, request)))
        change = self.changes.get(client.name.replace("-", "_"), {})
        if isinstance(change, Exception):
            raise change
        if isinstance(change, str):
            return Message(Error(100, change), reply_to=message)
        return Message(wire.pack(reply_of(client, request, **change)), reply_to=message)


def run(strategy: AdapterStrategy, app: Answering) -> list[ServerState]:
    states: list[ServerState] = []
    run_rounds(strategy, Engine(in_process(app, len(CLIENTS)), 1, float("inf")), states.append)
    return states


def measured(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [event for event in events if event["event"] == "evaluated_at_clients"]


@pytest.mark.parametrize("every, rounds", [(0, [4]), (1, [1, 2, 3, 4]), (2, [2, 4]), (3, [3, 4])])
def test_it_is_done_when_the_server_measures_too(every: int, rounds: list[int]) -> None:
    strategy, events = make_strategy(CLIENTS, config_of(every=every))
    run(strategy, Measuring())
    assert [event["round"] for event in measured(events)] == rounds


def test_it_is_not_done_unless_it_is_asked_for() -> None:
    strategy, events = make_strategy(CLIENTS, config_of(at_clients=False, every=1))
    app = Measuring()
    run(strategy, app)
    assert measured(events) == []
    assert app.asked == []


def test_every_client_is_asked_once_whether_it_has_trained_or_not() -> None:
    strategy, events = make_strategy(CLIENTS, config_of())
    app = Measuring()
    (state,) = run(strategy, app)[-1:]

    assert [name for name, *_ in app.asked] == [client.name for client in CLIENTS]
    for (_, request, adapter, frozen), client in zip(app.asked, CLIENTS, strict=True):
        expected = state.adapter.prefix(client.rank).tensors()
        assert adapter.tensors().keys() == expected.keys()
        assert all(torch.equal(t, expected[n]) for n, t in adapter.tensors().items())
        assert frozen is None
        assert (request.rank, request.round, request.batch_size) == (client.rank, 4, 7)
    (event,) = measured(events)
    assert event["clients"] == {
        client.name: {
            "rank": client.rank,
            "examples": client.examples,
            "metrics": {"loss": float(client.name[-1])},
        }
        for client in CLIENTS
    }
    assert list(event["clients"]) == sorted(event["clients"])
    assert event["failed"] == {}
    assert event["seconds"] >= 0


def test_each_is_measured_at_the_rank_that_it_has_by_now() -> None:
    strategy, events = make_strategy(CLIENTS, config_of())
    strategy.state = ServerState(strategy.state.adapter, 0, ranks={"site-0": 8, "site-2": 1})
    run(strategy, Measuring())
    (event,) = measured(events)
    ranks = {name: row["rank"] for name, row in event["clients"].items()}
    assert ranks == {"site-0": 8, "site-1": 4, "site-2": 1, "site-3": 4}


def test_the_rounds_do_not_depend_on_it() -> None:
    adapters = []
    for at_clients in (False, True):
        strategy, _ = make_strategy(CLIENTS, config_of(at_clients, every=1))
        run(strategy, Measuring())
        adapters.append(strategy.state.adapter.tensors())
    assert all(torch.equal(tensor, adapters[1][name]) for name, tensor in adapters[0].items())


@pytest.mark.parametrize(
    "change, reason",
    [
        ("has no test rows of its own", "has no test rows of its own"),
        (OSError("disk"), "OSError: disk"),
        ({"examples": 0}, "malformed header: examples"),
        ({"metrics": {"loss": "low"}}, "malformed header: metrics"),
        ({"protocol": 1}, "speaks protocol 1, expected 3"),
        ({"base": "base-9"}, "another base model"),
        ({"scale": 9.0}, "another scale rule"),
        ({"layers": "none"}, "adapts other layers"),
        ({"client": "site-0"}, "answers for 'site-0'"),
        ({"round": 3}, "answers for round 3, asked was 4"),
    ],
)
def test_who_cannot_or_answers_wrongly_is_named_with_the_reason(change: Any, reason: str) -> None:
    strategy, events = make_strategy(CLIENTS, config_of())
    run(strategy, Measuring(site_1=change))
    (event,) = measured(events)
    assert list(event["clients"]) == ["site-0", "site-2", "site-3"]
    ((who, why),) = event["failed"].items()
    assert who == "site-1"
    assert reason in why


def test_an_answer_without_a_header_is_named_too() -> None:
    def app(message: Message, context: Context) -> Message:
        if message.metadata.message_type == MessageType.EVALUATE:
            return Message(RecordDict(), reply_to=message)
        return small_client_app(CLIENTS)(message, context)

    strategy, events = make_strategy(CLIENTS, config_of())
    run(strategy, app)
    (event,) = measured(events)
    assert event["failed"] == {client.name: "carries no header" for client in CLIENTS}
    assert event["clients"] == {}


class Folding(PrefixMethod):
    """A method with everything that a broadcast may have."""

    name = "folding"
    summary = paper = ""

    def broadcast(self, state: ServerState, client: Client) -> Broadcast:
        sent = super().broadcast(state, client).trainable
        frozen = LoraAdapter(sent.scaled(2.0).prefix(1).layers, sent.scale)
        return Broadcast(
            sent,
            frozen=frozen,
            scale_multiplier=2.5,
            seeded_factors="nothing",
            factor_seed=state.round,
        )


class Personal(PrefixMethod):
    """A method without a global model."""

    name = "personal"
    summary = paper = ""
    personal = True


def test_they_receive_what_they_would_train_now() -> None:
    method = Folding(MethodConfig(), [2, 4, 8], 0)
    strategy, _ = make_strategy(CLIENTS, config_of(rounds=1), method=method)
    app = Measuring()
    run(strategy, app)
    for _, request, adapter, frozen in app.asked:
        assert (request.scale_multiplier, request.factor_seed) == (2.5, 1)
        assert frozen is not None
        assert all(torch.equal(frozen.layers[n].A, f.A[:1]) for n, f in adapter.layers.items())


def test_a_method_without_a_global_model_is_always_measured_there() -> None:
    method = Personal(MethodConfig(), [2, 4, 8], 0)
    assert methods.trait(method, "personal")
    strategy, events = make_strategy(CLIENTS, config_of(at_clients=False), method=method)
    run(strategy, Measuring())
    assert [event["round"] for event in measured(events)] == [4]
