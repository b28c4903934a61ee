"""Ranks that change between rounds: offered by a client, planned, or given to the best."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
from prelort.federation.strategy import AdapterStrategy

from prelort import methods
from prelort.config import MethodConfig
from prelort.errors import QuorumError
from prelort.federation import wire
from prelort.federation.allocation import Allocation, ByLoss
from prelort.federation.flower import Context, Message
from prelort.federation.transport import Engine
from prelort.methods.interface import Client, ServerState
from prelort.methods.objective import Objective, TailPenalty
from small_federation import (
    clients_of,
    in_process,
    make_config,
    make_reply_header,
    make_strategy,
    run_rounds,
    same_bits,
    small_client_app,
)

CLIENTS = clients_of([2, 4, 8, 4])
Answering = Callable[[Message, Context], Message]
Says = Mapping[tuple[str, int], dict[str, Any]]
"""Client and round (from 1) -> what its header says besides the usual."""


def app_of(says: Says | None = None, cut: Mapping[tuple[str, int], int] | None = None) -> Answering:
    """Clients as usual, some with more to say; ``cut``: to which rank some cut their adapter."""
    usual, more, cuts = small_client_app(CLIENTS), says or {}, cut or {}

    def app(message: Message, context: Context) -> Message:
        reply = usual(message, context)
        client = CLIENTS[int(context.node_config["partition-id"])]
        head = wire.header(reply.content, wire.TrainReply)
        key = (client.name, head.round + 1)
        adapter, _ = wire.adapter(reply.content, head)
        rank = cuts.get(key, head.rank)
        changes = {"rank": rank, "dtype": head.dtype, **more.get(key, {})}
        changed = make_reply_header(client, head.round, **changes)
        return Message(wire.pack(changed, adapter.prefix(rank)), reply_to=message)

    return app


def run(
    strategy: AdapterStrategy,
    app: Answering | None = None,
    after: Callable[..., None] | None = None,
) -> None:
    engine = Engine(in_process(app or app_of(), len(CLIENTS)), 1, float("inf"))
    run_rounds(strategy, engine, after or (lambda state: None))


def ranks_asked(events: list[dict[str, Any]]) -> dict[int, dict[str, int]]:
    """Round -> client -> the rank at which it was asked and has answered."""
    found: dict[int, dict[str, int]] = {}
    for event in events:
        if event["event"] == "client_finished":
            found.setdefault(event["round"], {})[event["client"]] = event["rank"]
    return found


def changes(events: list[dict[str, Any]]) -> list[tuple[int, str, int, int, str]]:
    return [
        (e["round"], e["client"], e["from"], e["to"], e["reason"])
        for e in events
        if e["event"] == "rank_changed"
    ]


def usual(**changed: int) -> dict[str, int]:
    """The ranks of all clients, some of them changed."""
    named = {f"site-{name.removeprefix('site_')}": rank for name, rank in changed.items()}
    return {client.name: client.rank for client in CLIENTS} | named


OFFER, PLAN = "the client's offer", "the server's allocation"


# Without any change


def test_ranks_are_the_introduced_ones_where_nobody_changes_them() -> None:
    strategy, events = make_strategy(CLIENTS, make_config(rounds=3))
    run(strategy)
    assert ranks_asked(events) == {number: usual() for number in (1, 2, 3)}
    assert strategy.state.ranks == {}
    assert changes(events) == []


def test_to_offer_the_rank_that_one_has_is_no_change() -> None:
    strategy, events = make_strategy(CLIENTS)
    run(strategy, app_of({("site-1", 1): {"next_rank": 4}}))
    assert strategy.state.ranks == {}
    assert changes(events) == []


# Offers


@pytest.mark.parametrize("offer", [1, 3, 5, 8])
@pytest.mark.parametrize("max_rank", [0, 8])
def test_an_offered_rank_is_used_from_the_next_round_on(offer: int, max_rank: int) -> None:
    """Whether smaller or larger, and whatever the client said at first that it can be raised to."""
    strategy, events = make_strategy(CLIENTS, make_config(rounds=4), max_rank=max_rank)
    run(strategy, app_of({("site-1", 2): {"next_rank": offer}}))

    asked = ranks_asked(events)
    assert asked == {1: usual(), 2: usual(), 3: usual(site_1=offer), 4: usual(site_1=offer)}
    assert changes(events) == [(2, "site-1", 4, offer, OFFER)]
    assert strategy.state.ranks == {"site-1": offer}


def test_what_it_is_sent_and_how_it_trains_follow_its_rank() -> None:
    strategy, _ = make_strategy(CLIENTS)
    strategy.state = replace(strategy.state, ranks={"site-1": 8})
    seen: dict[str, wire.TrainRequest] = {}
    shapes: dict[str, int] = {}

    def app(message: Message, context: Context) -> Message:
        name = CLIENTS[int(context.node_config["partition-id"])].name
        seen[name] = wire.header(message.content, wire.TrainRequest)
        shapes[name] = wire.adapter(message.content, seen[name])[0].rank
        return app_of()(message, context)

    run(strategy, app)
    assert {name: request.rank for name, request in seen.items()} == usual(site_1=8)
    assert shapes == usual(site_1=8)
    assert {name: request.levels[-1] for name, request in seen.items()} == usual(site_1=8)


def test_its_reply_counts_at_the_rank_that_it_had() -> None:
    """The aggregate of a round with offers is that of the same round without them."""
    offering, _ = make_strategy(CLIENTS, make_config(rounds=1))
    run(offering, app_of({("site-1", 1): {"next_rank": 8}, ("site-2", 1): {"next_rank": 2}}))
    plain, _ = make_strategy(CLIENTS, make_config(rounds=1))
    run(plain)
    assert same_bits(offering.state.adapter, plain.state.adapter)
    assert offering.state.ranks == {"site-1": 8, "site-2": 2}


def test_offers_may_follow_one_another_up_and_down() -> None:
    says = {("site-0", number): {"next_rank": rank} for number, rank in [(1, 6), (2, 3), (3, 8)]}
    strategy, events = make_strategy(CLIENTS, make_config(rounds=5))
    run(strategy, app_of(says))
    assert [asked["site-0"] for asked in ranks_asked(events).values()] == [2, 6, 3, 8, 8]
    assert [change[2:4] for change in changes(events)] == [(2, 6), (6, 3), (3, 8)]


def test_a_reply_that_is_refused_has_offered_nothing() -> None:
    says = {
        ("site-0", 1): {"next_rank": 9},  # above the global rank
        ("site-1", 1): {"next_rank": 8, "base": "another"},
        ("site-2", 1): {"next_rank": 4},
    }
    strategy, events = make_strategy(CLIENTS)
    run(strategy, app_of(says))
    failed = {e["client"]: e["reason"] for e in events if e["event"] == "client_failed"}
    assert failed.keys() == {"site-0", "site-1"}
    assert failed["site-0"] == "offers rank 9, but the global adapter has 8"
    assert ranks_asked(events)[2] == usual(site_2=4)


def test_a_round_without_a_quorum_changes_no_ranks() -> None:
    says = {("site-0", 1): {"next_rank": 8}, ("site-1", 1): {"base": "another"}}
    strategy, events = make_strategy(CLIENTS, make_config(quorum=4))
    with pytest.raises(QuorumError):
        run(strategy, app_of(says))
    assert strategy.state.ranks == {}
    assert changes(events) == []


# Pruned replies


class Pruning(methods.PrefixMethod):
    """Every client may leave off the second half of its slots."""

    name = "pruning"
    summary = paper = ""

    def objective(self, client: Client) -> Objective:
        return replace(super().objective(client), tail=TailPenalty(0.1, 0.5, 1))


def test_a_client_that_prunes_itself_goes_on_with_fewer_slots() -> None:
    says = {("site-2", 1): {"next_rank": 4}}
    method = Pruning(MethodConfig(), [2, 4, 8], 0)
    strategy, events = make_strategy(CLIENTS, make_config(rounds=3), method=method)
    before = strategy.state.adapter
    run(strategy, app_of(says, cut={("site-2", 1): 4}))

    assert [asked["site-2"] for asked in ranks_asked(events).values()] == [8, 4, 4]
    assert changes(events) == [(1, "site-2", 8, 4, OFFER)]
    # Nobody else holds the slots from 4 on, so that they have stayed.
    for name, factors in strategy.state.adapter.layers.items():
        assert factors.A[4:].equal(before.layers[name].A[4:])
        assert not factors.A[:4].equal(before.layers[name].A[:4])


def test_a_method_without_pruning_refuses_a_pruned_reply() -> None:
    strategy, events = make_strategy(CLIENTS, make_config(rounds=1))
    run(strategy, app_of(cut={("site-2", 1): 4}))
    (failed,) = [e for e in events if e["event"] == "client_failed"]
    assert failed["reason"] == "answers with rank 4, expected 8"


# A schedule


SCHEDULE = {2: usual(site_0=4), 4: usual(site_0=2, site_2=2)}


def test_a_schedule_is_followed() -> None:
    strategy, events = make_strategy(
        CLIENTS, make_config(rounds=5), max_rank=8, allocation=Allocation(SCHEDULE)
    )
    run(strategy)
    expected = {1: usual(), 2: SCHEDULE[2], 3: SCHEDULE[2], 4: SCHEDULE[4], 5: SCHEDULE[4]}
    assert ranks_asked(events) == expected
    assert changes(events) == [
        (1, "site-0", 2, 4, PLAN),
        (3, "site-0", 4, 2, PLAN),
        (3, "site-2", 8, 2, PLAN),
    ]


def test_a_schedule_counts_for_those_too_who_were_not_asked() -> None:
    config = make_config(rounds=6, clients_per_round=1)
    strategy, events = make_strategy(CLIENTS, config, max_rank=8, allocation=Allocation(SCHEDULE))
    run(strategy)
    for number, asked in ranks_asked(events).items():
        ((name, rank),) = asked.items()
        plan = usual() if number < 2 else SCHEDULE[2] if number < 4 else SCHEDULE[4]
        assert rank == plan[name]


def test_nobody_is_raised_above_what_it_said_at_first() -> None:
    strategy, events = make_strategy(
        CLIENTS, max_rank=4, allocation=Allocation({2: usual(site_0=8)})
    )
    run(strategy)
    assert ranks_asked(events)[2] == usual(site_0=4)
    assert changes(events) == [(1, "site-0", 2, 4, PLAN)]


def test_a_schedule_goes_before_an_offer() -> None:
    says = {("site-0", 1): {"next_rank": 8}, ("site-1", 1): {"next_rank": 8}}
    strategy, events = make_strategy(CLIENTS, max_rank=4, allocation=Allocation({2: {"site-0": 3}}))
    run(strategy, app_of(says))
    assert ranks_asked(events)[2] == usual(site_0=3, site_1=8)
    assert changes(events) == [(1, "site-0", 2, 3, PLAN), (1, "site-1", 4, 8, OFFER)]


def test_who_has_offered_more_than_it_said_at_first_can_be_raised_to_it() -> None:
    strategy, events = make_strategy(
        CLIENTS, make_config(rounds=3), allocation=Allocation({2: {"site-0": 6}, 3: {"site-1": 8}})
    )
    run(strategy, app_of({("site-0", 1): {"next_rank": 8}}))
    assert ranks_asked(events)[2] == usual(site_0=6)
    assert ranks_asked(events)[3] == usual(site_0=6)  # site-1 never said more than 4


# By loss


def losses(**values: float) -> Says:
    return {
        (f"site-{name.removeprefix('site_')}", 1): {"validation_loss": loss}
        for name, loss in values.items()
    }


def by_loss(share: float) -> Allocation:
    return Allocation(by_loss=ByLoss(8, share))


LOW = clients_of([2, 2, 2, 2])


def test_the_first_round_asks_everyone_for_their_loss_and_later_ones_do_not() -> None:
    config = make_config(rounds=3, clients_per_round=2)
    strategy, events = make_strategy(LOW, config, max_rank=8, allocation=by_loss(0.5))
    wanted: dict[int, list[bool]] = {}

    def app(message: Message, context: Context) -> Message:
        request = wire.header(message.content, wire.TrainRequest)
        wanted.setdefault(request.round + 1, []).append(request.with_validation)
        return app_of()(message, context)

    run(strategy, app)
    assert wanted == {1: [True] * 4, 2: [False] * 2, 3: [False] * 2}
    started = [e["clients"] for e in events if e["event"] == "round_started"]
    assert [len(names) for names in started] == [4, 2, 2]


@pytest.mark.parametrize("share, raised", [(0.25, {1}), (0.5, {1, 3}), (1.0, {0, 1, 2, 3})])
def test_the_best_are_raised_after_the_first_round(share: float, raised: set[int]) -> None:
    says = losses(site_0=3.0, site_1=1.0, site_2=4.0, site_3=2.0)
    strategy, events = make_strategy(
        LOW, make_config(rounds=3), max_rank=8, allocation=by_loss(share)
    )
    run(strategy, app_of(says))
    later = {f"site-{i}": 8 if i in raised else 2 for i in range(4)}
    assert ranks_asked(events)[1] == dict.fromkeys(later, 2)
    assert ranks_asked(events)[2] == ranks_asked(events)[3] == later
    assert [e[1:4] for e in changes(events)] == [(f"site-{i}", 2, 8) for i in sorted(raised)]


def test_losses_stand_in_the_events() -> None:
    says = losses(site_0=3.0, site_2=4.0)
    strategy, events = make_strategy(
        LOW, make_config(rounds=1), max_rank=8, allocation=by_loss(0.5)
    )
    run(strategy, app_of(says))
    told = {
        e["client"]: e.get("validation_loss") for e in events if e["event"] == "client_finished"
    }
    assert told == {"site-0": 3.0, "site-1": None, "site-2": 4.0, "site-3": None}


def test_who_has_no_loss_is_not_raised() -> None:
    """Without validation rows, with one that is no number, or with a reply that was refused."""
    says = dict(losses(site_0=9.0, site_2=math.nan, site_3=-1.0))
    says["site-3", 1] = {"validation_loss": -1.0, "base": "another"}
    strategy, events = make_strategy(LOW, max_rank=8, allocation=by_loss(1.0))
    run(strategy, app_of(says))
    assert [e[1:4] for e in changes(events)] == [("site-0", 2, 8)]


def test_nobody_who_cannot_be_raised_is() -> None:
    says = losses(site_0=1.0, site_1=1.0, site_2=1.0, site_3=1.0)
    strategy, events = make_strategy(LOW, max_rank=5, allocation=by_loss(0.25))
    run(strategy, app_of(says))
    assert changes(events) == [(1, "site-0", 2, 5, PLAN)]


# Going on from a state


@pytest.mark.parametrize("done", [1, 2, 3])
def test_going_on_from_a_state_gives_the_same_ranks_and_bits(done: int) -> None:
    says = {("site-1", 1): {"next_rank": 8}, ("site-3", 3): {"next_rank": 1}}
    plan = Allocation({2: {"site-0": 4}, 4: {"site-2": 2}})

    def begun() -> tuple[AdapterStrategy, list[dict[str, Any]]]:
        return make_strategy(CLIENTS, make_config(rounds=5), max_rank=4, allocation=plan)

    states: list[ServerState] = []
    whole, events = begun()
    run(whole, app_of(says), states.append)

    second, later = begun()
    second.state = states[done - 1]
    run(second, app_of(says))

    assert same_bits(second.state.adapter, whole.state.adapter)
    assert second.state.ranks == whole.state.ranks
    assert ranks_asked(later) == {n: r for n, r in ranks_asked(events).items() if n > done}
    assert changes(later) == [change for change in changes(events) if change[0] > done]


def test_a_finished_rounds_state_is_not_changed_by_the_next() -> None:
    states: list[tuple[ServerState, dict[str, int]]] = []
    strategy, _ = make_strategy(CLIENTS, make_config(rounds=3))
    says = {("site-1", number): {"next_rank": rank} for number, rank in [(1, 8), (2, 2)]}
    run(strategy, app_of(says), lambda state: states.append((state, dict(state.ranks))))
    assert [kept for _, kept in states] == [{"site-1": 8}, {"site-1": 2}, {"site-1": 2}]
    assert all(dict(state.ranks) == kept for state, kept in states)
