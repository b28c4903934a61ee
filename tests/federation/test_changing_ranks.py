"""Ranks that change between rounds: offered by a client, scheduled, or given to the best."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prelort import methods
from prelort.config import Config, MethodConfig
from prelort.events import ClientFailed, ClientFinished, RankChanged, RoundStarted
from prelort.federation import wire
from prelort.federation.allocation import Allocation, ByLoss
from prelort.federation.flower import Context, Message
from prelort.federation.messages import TrainRequest
from prelort.methods.interface import Client, ServerState
from prelort.methods.objective import Objective, TailPenalty
from random_adapters import same_bits
from small_federation import (
    SmallRun,
    clients_of,
    make_config,
    make_run,
    make_state,
    small_client_app,
)

CLIENTS, LOW = clients_of([2, 4, 8, 4]), clients_of([2, 2, 2, 2])
Replies = Mapping[tuple[str, int], dict[str, Any]]


def rounds(
    replies: Replies | None = None,
    config: Config | None = None,
    *,
    clients: list[Client] = CLIENTS,
    max_rank: int = 0,
    **more: Any,
) -> SmallRun:
    """A finished run of these clients, which can be raised to ``max_rank``."""
    app = small_client_app(clients, max_rank=max_rank, replies=replies)
    run = make_run(app, config, **more)
    run.train()
    return run


def ranks_asked(run: SmallRun) -> dict[int, dict[str, int]]:
    """Round -> client -> the rank at which it was asked and has answered."""
    found: dict[int, dict[str, int]] = {}
    for event in run.of(ClientFinished):
        found.setdefault(event.round, {})[event.client] = event.rank
    return found


def usual(**changed: int) -> dict[str, int]:
    """The ranks of all clients, some of them changed."""
    named = {name.replace("_", "-"): rank for name, rank in changed.items()}
    return {client.name: client.rank for client in CLIENTS} | named


# Offers


@pytest.mark.parametrize("offer", [1, 3, 5, 8])
@pytest.mark.parametrize("max_rank", [0, 8])
def test_an_offered_rank_is_used_from_the_next_round_on(offer: int, max_rank: int) -> None:
    """Whether smaller or larger, and whatever the client stated as its maximum rank."""
    replies = {("site-1", 2): {"next_rank": offer}}
    run = rounds(replies, make_config(rounds=4), max_rank=max_rank)
    assert ranks_asked(run) == {
        1: usual(),
        2: usual(),
        3: usual(site_1=offer),
        4: usual(site_1=offer),
    }
    assert run.rank_changes() == [(2, "site-1", 4, offer)]
    assert run.of(RankChanged)[0].reason == "the client's offer"
    assert run.state.ranks == {"site-1": offer}


def test_a_reply_counts_at_the_rank_that_its_client_had() -> None:
    """The aggregate of a round with offers is that of the same round without them."""
    replies = {("site-1", 1): {"next_rank": 8}, ("site-2", 1): {"next_rank": 2}}
    offering, plain = rounds(replies, make_config(rounds=1)), rounds({}, make_config(rounds=1))
    assert same_bits(offering.state.adapter, plain.state.adapter)
    assert offering.state.ranks == {"site-1": 8, "site-2": 2}


def test_a_refused_reply_offers_nothing() -> None:
    replies = {
        ("site-0", 1): {"next_rank": 9},  # above the global rank
        ("site-1", 1): {"next_rank": 8, "base": "another"},
        ("site-2", 1): {"next_rank": 4},
    }
    run = rounds(replies)
    failed = {event.client: event.reason for event in run.of(ClientFailed)}
    assert failed.keys() == {"site-0", "site-1"}
    assert failed["site-0"] == "offers rank 9, but the global adapter has 8"
    assert ranks_asked(run)[2] == usual(site_2=4)


# Pruned replies


class Pruning(methods.PrefixMethod):
    """Every client may leave off the second half of its rank dimensions."""

    name = "pruning"
    summary = paper = ""

    def objective(self, state: ServerState, client: Client) -> Objective:
        return replace(super().objective(state, client), tail=TailPenalty(0.1, 0.5, 1))


def test_a_client_that_prunes_itself_continues_with_fewer_dimensions() -> None:
    replies = {("site-2", 1): {"rank": 4, "next_rank": 4}}
    run = rounds(replies, make_config(rounds=3), method=Pruning(MethodConfig(), 0))
    assert [asked["site-2"] for asked in ranks_asked(run).values()] == [8, 4, 4]
    assert run.rank_changes() == [(1, "site-2", 8, 4)]
    before = make_state().adapter
    for name, factors in run.state.adapter.layers.items():  # nobody else holds those from 4 on
        assert factors.A[4:].equal(before.layers[name].A[4:])
        assert not factors.A[:4].equal(before.layers[name].A[:4])


# A schedule

SCHEDULE = {2: usual(site_0=4), 4: usual(site_0=2, site_2=2)}


def test_a_schedule_is_followed_and_its_levels_are_known_at_once() -> None:
    run = rounds({}, make_config(rounds=5), max_rank=8, allocation=Allocation(SCHEDULE))
    assert ranks_asked(run) == {
        1: usual(),
        2: SCHEDULE[2],
        3: SCHEDULE[2],
        4: SCHEDULE[4],
        5: SCHEDULE[4],
    }
    changes = [(1, "site-0", 2, 4), (3, "site-0", 4, 2), (3, "site-2", 8, 2)]
    assert run.rank_changes() == changes
    assert {event.reason for event in run.of(RankChanged)} == {"the server's allocation"}
    plan = Allocation({2: {"site-0": 3, "site-3": 8}}, ByLoss(6, 0.5))
    assert rounds({}, max_rank=8, allocation=plan).state.levels == (2, 3, 4, 6, 8)


def test_nobody_is_raised_above_the_maximum_rank_that_it_stated() -> None:
    run = rounds({}, max_rank=4, allocation=Allocation({2: usual(site_0=8)}))
    assert run.rank_changes() == [(1, "site-0", 2, 4)]


def test_a_schedule_goes_before_an_offer_and_an_offer_raises_the_maximum() -> None:
    replies = {("site-0", 1): {"next_rank": 8}, ("site-1", 1): {"next_rank": 6}}
    plan = Allocation({2: {"site-0": 5}, 3: {"site-3": 8}})
    run = rounds(replies, make_config(rounds=3), allocation=plan)
    assert ranks_asked(run)[2] == usual(site_0=5, site_1=6)
    assert ranks_asked(run)[3] == usual(site_0=5, site_1=6)  # site-3 never stated more than 4


# By loss


def losses(*values: float) -> dict[tuple[str, int], dict[str, Any]]:
    return {(f"site-{i}", 1): {"validation_loss": value} for i, value in enumerate(values)}


def by_loss(replies: Replies, share: float, max_rank: int = 8, **federation: Any) -> SmallRun:
    plan = Allocation(by_loss=ByLoss(8, share))
    config = make_config(**federation)
    return rounds(replies, config, clients=LOW, max_rank=max_rank, allocation=plan)


def test_the_first_round_asks_everyone_for_their_loss_and_later_ones_do_not() -> None:
    wanted: dict[int, list[bool]] = {}

    def app(message: Message, context: Context) -> Message:
        request = wire.header(message.content, TrainRequest)
        wanted.setdefault(request.round + 1, []).append(request.with_validation)
        return small_client_app(LOW)(message, context)

    run = make_run(
        small_client_app(LOW, instead=dict.fromkeys(range(4), app)),
        make_config(rounds=3, clients_per_round=2),
        allocation=Allocation(by_loss=ByLoss(8, 0.5)),
    )
    run.train()
    assert wanted == {1: [True] * 4, 2: [False] * 2, 3: [False] * 2}
    assert [len(event.clients) for event in run.of(RoundStarted)] == [4, 2, 2]


@pytest.mark.parametrize("share, raised", [(0.25, {1}), (0.5, {1, 3}), (1.0, {0, 1, 2, 3})])
def test_the_best_are_raised_after_the_first_round(share: float, raised: set[int]) -> None:
    run = by_loss(losses(3.0, 1.0, 4.0, 2.0), share, rounds=3)
    later = {f"site-{i}": 8 if i in raised else 2 for i in range(4)}
    assert ranks_asked(run) == {1: dict.fromkeys(later, 2), 2: later, 3: later}
    assert run.rank_changes() == [(1, f"site-{i}", 2, 8) for i in sorted(raised)]
    stated = {e.client: e.validation_loss for e in run.of(ClientFinished) if e.round == 1}
    assert stated == {"site-0": 3.0, "site-1": 1.0, "site-2": 4.0, "site-3": 2.0}


def test_who_has_no_loss_is_not_raised() -> None:
    """Without validation rows, with one that is no number, or with a reply that was refused."""
    replies = losses(9.0, 1.0, math.nan)
    replies["site-1", 1] |= {"base": "another"}
    assert by_loss(replies, 1.0).rank_changes() == [(1, "site-0", 2, 8)]


@given(
    st.dictionaries(st.text(max_size=3), st.floats(), max_size=12),
    st.floats(0.01, 1.0),
    st.integers(0, 5),
)
def test_nobody_left_out_is_better_than_one_raised(
    losses: dict[str, float], share: float, silent: int
) -> None:
    clients = len(losses) + silent
    raised = ByLoss(8, share).select(losses, clients)
    finite = {name for name, loss in losses.items() if math.isfinite(loss)}
    assert set(raised) <= finite
    assert len(raised) == min(len(finite), max(1, round(share * clients)))
    worst = max(((losses[name], name) for name in raised), default=(-math.inf, ""))
    assert all((losses[name], name) > worst for name in finite - set(raised))  # equal: by name
    assert raised == ByLoss(8, share).select(dict(reversed(losses.items())), clients)


# From a state


@pytest.mark.parametrize("done", [1, 2, 3])
def test_a_run_from_a_state_has_the_same_ranks_and_bits(done: int) -> None:
    replies = {("site-1", 1): {"next_rank": 8}, ("site-3", 3): {"next_rank": 1}}
    app = small_client_app(CLIENTS, max_rank=4, replies=replies)
    plan = Allocation({2: {"site-0": 4}, 4: {"site-2": 2}})
    states: list[ServerState] = []
    whole = make_run(app, make_config(rounds=5), allocation=plan)
    whole.train(states.append)

    second = make_run(app, make_config(rounds=5), allocation=plan, state=states[done - 1])
    second.train()

    assert same_bits(second.state.adapter, whole.state.adapter)
    assert second.state.ranks == whole.state.ranks
    assert ranks_asked(second) == {n: r for n, r in ranks_asked(whole).items() if n > done}
    assert second.rank_changes() == [change for change in whole.rank_changes() if change[0] > done]
