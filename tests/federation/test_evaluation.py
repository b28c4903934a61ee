"""Measuring where the rows are: each client at its own rank, or global adapters by everyone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prelort.adapters import LoraAdapter
from prelort.config import MethodConfig, check
from prelort.events import ClientMetrics, ClientsEvaluated, EvaluationFailed
from prelort.federation import wire
from prelort.federation.flower import Context, Error, Message
from prelort.federation.messages import EvaluateReply, EvaluateRequest
from prelort.federation.pooled import PooledMetrics, prefix_groups
from prelort.methods import Broadcast, Client, PrefixMethod, ServerState
from small_federation import (
    SPEC,
    App,
    SmallRun,
    clients_of,
    evaluate_reply,
    make_adapter,
    make_run,
    make_state,
    small_client_app,
)

CLIENTS = clients_of([2, 4, 8, 4])


class Measuring:
    """Clients that measure, with the requests and adapters that they got.

    ``changes``: what the client of an index raises, gives as an error, answers without a header, or
    says differently in its reply.
    """

    def __init__(self, **changes: Any) -> None:
        self.changes = changes
        self.asked: list[tuple[str, EvaluateRequest, LoraAdapter, LoraAdapter | None]] = []
        self.app: App = small_client_app(CLIENTS, instead=dict.fromkeys(range(4), self.answer))

    def answer(self, message: Message, context: Context) -> Message:
        client = CLIENTS[int(context.node_config["partition-id"])]
        request = wire.header(message.content, EvaluateRequest)
        self.asked.append((client.name, request, *wire.adapter(message.content, request)))
        change = self.changes.get(client.name.replace("-", "_"), {})
        if isinstance(change, Exception):
            raise change
        if isinstance(change, str):
            return Message(Error(100, change), reply_to=message)
        return Message(wire.pack(evaluate_reply(client, request, **change)), reply_to=message)


def connected(app: App, state: ServerState | None = None, **more: Any) -> SmallRun:
    config = check({"federation": {"clients_per_round": 4}, "evaluation": {"batch_size": 7}})
    run = make_run(app, config, state=state, **more)
    run.state = run.server.connect(run.method, run.state)
    return run


def evaluate_clients(app: App, state: ServerState | None = None, **more: Any) -> ClientsEvaluated:
    run = connected(app, state, **more)
    return run.server.evaluate_clients(run.method, run.state)


def test_every_client_measures_what_it_would_receive_at_the_rank_that_it_has_now() -> None:
    measuring = Measuring()
    state = ServerState(make_adapter(8), 4, ranks={"site-0": 8, "site-2": 1})
    event = evaluate_clients(measuring.app, state)
    ranks = {"site-0": 8, "site-1": 4, "site-2": 1, "site-3": 4}
    assert [name for name, *_ in measuring.asked] == list(ranks)
    for name, request, adapter, frozen in measuring.asked:
        expected = state.adapter.prefix(ranks[name]).tensors()
        assert adapter.tensors().keys() == expected.keys()
        assert all(torch.equal(t, expected[n]) for n, t in adapter.tensors().items())
        assert frozen is None
        assert (request.rank, request.round, request.batch_size) == (ranks[name], 4, 7)
    assert event.clients == {
        client.name: ClientMetrics(ranks[client.name], client.examples, {"loss": float(index)})
        for index, client in enumerate(CLIENTS)
    }
    assert list(event.clients) == sorted(event.clients)
    assert (event.round, event.failures) == (4, {})
    assert event.seconds >= 0


FAILURES = [
    ("has no test rows of its own", "has no test rows of its own"),
    (OSError("disk"), "OSError: disk"),
    ({"examples": 0}, "malformed header: examples"),
    ({"examples": 10**8}, "claims 100000000 examples"),
    ({"weight": 10**12}, "claims a weight of 1000000000000"),
    ({"base": "base-9"}, "another base model"),
    ({"client": "site-0"}, "answers for 'site-0'"),
    ({"round": 3}, "answers for round 3, expected 0"),
]


@pytest.mark.parametrize("change, reason", FAILURES)
def test_who_cannot_or_answers_wrongly_is_named_with_the_reason(change: Any, reason: str) -> None:
    event = evaluate_clients(Measuring(site_1=change).app)
    assert list(event.clients) == ["site-0", "site-2", "site-3"]
    ((who, why),) = event.failures.items()
    assert who == "site-1"
    assert reason in why


class Folding(PrefixMethod):
    """A method with everything that a broadcast may have."""

    name = "folding"
    summary = paper = ""

    def broadcast(self, state: ServerState, client: Client) -> Broadcast:
        sent = super().broadcast(state, client).trainable
        frozen = LoraAdapter(sent.scaled(2.0).prefix(1).layers, sent.scale)
        return Broadcast(sent, frozen=frozen, scale_multiplier=2.5, factor_seed=state.round)


def test_they_receive_all_that_the_method_broadcasts() -> None:
    measuring = Measuring()
    state = ServerState(make_adapter(8), 1)
    evaluate_clients(measuring.app, state, method=Folding(MethodConfig(), 0))
    assert len(measuring.asked) == 4
    for _, request, adapter, frozen in measuring.asked:
        assert (request.scale_multiplier, request.factor_seed) == (2.5, 1)
        assert frozen is not None
        assert all(torch.equal(frozen.layers[n].A, f.A[:1]) for n, f in adapter.layers.items())


# Global adapters


def test_global_adapters_are_pooled_over_the_clients_and_prefixes_travel_together() -> None:
    measuring = Measuring()
    run = connected(measuring.app)
    whole = make_state().adapter
    pools = run.server.evaluate(run.state, {0: whole, 2: whole.prefix(2), 8: whole})
    assert [(name, request.rank, request.prefixes) for name, request, *_ in measuring.asked] == [
        (client.name, 8, (2, 0)) for client in CLIENTS
    ]
    examples = [client.examples for client in CLIENTS]
    for rank, pool in pools.items():
        extra = 0 if rank == 8 else rank  # as the clients of these tests say of prefixes
        losses = [index + extra for index in range(4)]
        mean = sum(n * loss for n, loss in zip(examples, losses, strict=True)) / sum(examples)
        assert pool.metrics() == {"loss": pytest.approx(mean)}
        assert (pool.clients, pool.examples) == (4, sum(examples))


@pytest.mark.parametrize("change, reason", FAILURES)
def test_who_fails_is_left_out_of_the_pool_with_an_event(change: Any, reason: str) -> None:
    run = connected(Measuring(site_1=change).app)
    pools = run.server.evaluate(run.state, {8: make_state().adapter, 2: make_adapter(2)})
    assert {rank: pool.clients for rank, pool in pools.items()} == {2: 3, 8: 3}
    failed = run.of(EvaluationFailed)
    assert [(event.client, event.rank) for event in failed] == [("site-1", 8), ("site-1", 2)]
    assert all(reason in event.reason for event in failed)


# Pools


def reply(examples: int, weight: int) -> EvaluateReply:
    facts = SPEC.header(4).model_dump()
    return EvaluateReply(**facts, client="a", round=1, examples=examples, weight=weight, metrics={})


counts = st.integers(1, 50)


@given(
    st.lists(st.tuples(counts, counts, st.floats(0, 5), st.floats(0, 1)), min_size=1, max_size=6)
)
def test_a_pool_is_as_if_all_rows_lay_in_one_place(
    sites: list[tuple[int, int, float, float]],
) -> None:
    pool = PooledMetrics()
    for examples, weight, loss, accuracy in sites:
        metrics = {"loss": loss, "perplexity": math.exp(loss), "accuracy": accuracy}
        pool.add(reply(examples, weight), metrics)
    rows = sum(examples for examples, *_ in sites)
    tokens = sum(weight for _, weight, *_ in sites)
    loss = sum(weight * loss for _, weight, loss, _ in sites) / tokens
    found = pool.metrics()
    assert found["loss"] == pytest.approx(loss)
    assert found["perplexity"] == pytest.approx(math.exp(loss))
    assert found["accuracy"] == pytest.approx(sum(e * a for e, _, _, a in sites) / rows)
    assert (pool.examples, pool.clients) == (rows, len(sites))


def test_prefixes_of_one_adapter_form_a_group_and_the_base_goes_with_its_own_head() -> None:
    whole, other = make_adapter(8), make_adapter(2, seed=5)
    adapters = {0: whole, **{rank: whole.prefix(rank) for rank in (2, 4, 8)}}
    assert prefix_groups(adapters) == [[8, 4, 2, 0]]
    other = LoraAdapter(other.layers, other.scale, whole.modules_to_save)
    mixed = {1: other.prefix(1), 2: other, 4: whole.prefix(4), 8: whole}
    assert prefix_groups(mixed) == [[8, 4], [2, 1]]
    assert prefix_groups({0: make_adapter(8, seed=3), 4: whole.prefix(4)}) == [[4], [0]]
