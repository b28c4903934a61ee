"""Rounds over clients that add noise: what is sent, what is aggregated, what is left out."""

from __future__ import annotations

import itertools
import weakref
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from prelort import methods
from prelort.adapters import LoraAdapter
from prelort.config import MethodConfig
from prelort.errors import ConfigError, PrelortError, QuorumError
from prelort.events import ClientFailed, ClientFinished, RoundFinished, RoundStarted
from prelort.federation import wire
from prelort.federation.flower import Context, Error, Message, RecordDict
from prelort.federation.messages import TrainRequest
from prelort.federation.transport import Transport
from prelort.methods.interface import Aggregator, Broadcast, Client, ServerState, Update
from random_adapters import same_bits
from small_federation import (
    App,
    PlannedGrid,
    SmallRun,
    blob_of,
    clients_of,
    header_of,
    make_adapter,
    make_config,
    make_run,
    make_state,
    small_client_app,
)

CLIENTS = clients_of([2, 4, 8, 4])
ONE_ROUND = make_config(rounds=1)


def by_hand(*order: int, name: str = "prelort") -> LoraAdapter:
    """The global adapter after round 1, aggregated from these clients in this order."""
    state = replace(make_state(), levels=(2, 4, 8))
    aggregator = methods.build(MethodConfig(name=name), 0).aggregator(state)
    for i in order:
        received = state.adapter.prefix(CLIENTS[i].rank)
        noise = make_adapter(CLIENTS[i].rank, seed=1000 * i).tensors()
        trained = {n: tensor + noise[n] for n, tensor in received.tensors().items()}
        adapter = LoraAdapter.from_tensors(trained, received.scale)
        aggregator.add(Update(CLIENTS[i], adapter, CLIENTS[i].examples))
    return aggregator.result().adapter


def fails_in(number: int, index: int) -> App:
    """Clients of which one raises in a round (from 1)."""
    usual = small_client_app(CLIENTS)

    def app(message: Message, context: Context) -> Message:
        if wire.header(message.content, TrainRequest).round == number - 1:
            raise OSError("network is gone")
        return usual(message, context)

    return small_client_app(CLIENTS, instead={index: app})


class TestRequests:
    def test_each_client_gets_its_prefix_and_how_to_train_it(self) -> None:
        seen: dict[str, tuple[TrainRequest, LoraAdapter]] = {}

        def app(message: Message, context: Context) -> Message:
            request = wire.header(message.content, TrainRequest)
            client = CLIENTS[int(context.node_config["partition-id"])]
            seen[client.name] = request, wire.adapter(message.content, request)[0]
            return small_client_app(CLIENTS)(message, context)

        make_run(small_client_app(CLIENTS, instead=dict.fromkeys(range(4), app)), ONE_ROUND).train()
        for client in CLIENTS:
            request, received = seen[client.name]
            assert same_bits(received, make_state().adapter.prefix(client.rank))
            assert request.rank == request.levels[-1] == client.rank
            assert (request.round, request.rounds, request.seed) == (0, 1, 0)

    def test_bytes_are_those_of_the_messages(self) -> None:
        sizes = {"down": 0, "up": 0}

        def travelled(message: Message) -> int:
            return len(header_of(message.content).encode()) + len(blob_of(message.content))

        def app(message: Message, context: Context) -> Message:
            reply = small_client_app(CLIENTS)(message, context)
            sizes["down"] += travelled(message)
            sizes["up"] += travelled(reply)
            return reply

        run = make_run(small_client_app(CLIENTS, instead=dict.fromkeys(range(4), app)), ONE_ROUND)
        run.train()
        (finished,) = run.of(RoundFinished)
        assert finished.stats.bytes_down == sizes["down"]
        assert finished.stats.bytes_up == sizes["up"]
        assert sum(one.bytes_up for one in run.of(ClientFinished)) == sizes["up"]


class TestOrder:
    def run(self, delays: tuple[int, ...], app: App, name: str = "prelort") -> SmallRun:
        """One round in which client i answers after ``delays[i]`` seconds."""
        arrivals = {
            1000 + i: [(delay, partial(self.answer, app, i))] for i, delay in enumerate(delays)
        }
        grid = PlannedGrid(arrivals)
        run = make_run(app, ONE_ROUND, method=name, transport=Transport(grid, clock=grid))
        run.train()
        return run

    @staticmethod
    def answer(app: App, index: int, message: Message) -> Message:
        return app(message, Context(1, 1000 + index, {"partition-id": index}, RecordDict(), {}))

    @pytest.mark.parametrize("name", ["prelort", "zero-padding"])
    def test_replies_in_any_order_give_the_same_bits(self, name: str) -> None:
        for delays in itertools.permutations(range(4)):
            run = self.run(delays, small_client_app(CLIENTS), name)
            arrived = [event.client for event in run.of(ClientFinished)]
            assert arrived == [CLIENTS[delays.index(place)].name for place in range(4)]
            assert same_bits(run.state.adapter, by_hand(0, 1, 2, 3, name=name))

    def test_with_a_failure_among_them(self) -> None:
        for delays in itertools.permutations(range(4)):
            run = self.run(delays, small_client_app(CLIENTS, instead={1: gives_up}))
            assert same_bits(run.state.adapter, by_hand(0, 2, 3))

    def test_another_order_of_aggregation_would_give_other_bits(self) -> None:
        """Guards the tests above."""
        results = [by_hand(*order) for order in itertools.permutations(range(4))]
        assert not all(same_bits(results[0], other) for other in results[1:])


def raises(message: Message, context: Context) -> Message:
    raise ValueError("tokenizer went missing")


def gives_up(message: Message, context: Context) -> Message:
    return Message(Error(100, "timed out after 5 s"), reply_to=message)


def empty(message: Message, context: Context) -> Message:
    return Message(RecordDict(), reply_to=message)


class TestFailures:
    @pytest.mark.parametrize(
        "instead, header, reason",
        [
            (raises, {}, "ValueError: tokenizer went missing"),
            (gives_up, {}, "timed out after 5 s"),
            (empty, {}, "carries no header"),
            (None, {"base": "x"}, "another base model"),
            (None, {"rank": 2}, "answers with rank 2, expected 4"),
            (None, {"round": 1}, "answers for round 2"),
            (None, {"examples": 10**12}, "claims 1000000000000 examples"),
        ],
    )
    def test_a_client_is_left_out_and_the_rest_counts(
        self, instead: App | None, header: dict[str, Any], reason: str
    ) -> None:
        replaced = {1: instead} if instead is not None else {}
        app = small_client_app(CLIENTS, instead=replaced, replies={("site-1", 1): header})
        run = make_run(app, ONE_ROUND)
        run.train()

        assert same_bits(run.state.adapter, by_hand(0, 2, 3))
        (failed,) = run.of(ClientFailed)
        assert (failed.client, failed.rank, failed.round) == ("site-1", 4, 1)
        assert reason in failed.reason
        (finished,) = run.of(RoundFinished)
        assert (finished.stats.replies, finished.stats.failures) == (3, 1)


class TestQuorum:
    @pytest.mark.parametrize("quorum, enough", [(1, True), (3, True), (4, False), (0.75, True)])
    def test_is_counted_over_those_asked(self, quorum: int | float, enough: bool) -> None:
        app = small_client_app(CLIENTS, instead={1: gives_up})
        run = make_run(app, make_config(rounds=1, quorum=quorum))
        if enough:
            assert run.train().round == 1
        else:
            with pytest.raises(QuorumError):
                run.train()

    def test_below_it_the_state_is_as_it_was_bit_for_bit(self) -> None:
        run = make_run(fails_in(2, index=2), make_config(rounds=3, quorum=4))
        after: list[tuple[ServerState, dict[str, torch.Tensor]]] = []

        def keep(state: ServerState) -> None:
            after.append((state, {n: t.clone() for n, t in state.adapter.tensors().items()}))

        with pytest.raises(QuorumError) as raised:
            run.train(keep)

        ((state, copies),) = after
        assert run.state is state
        assert all(torch.equal(t, copies[n]) for n, t in state.adapter.tensors().items())
        text = str(raised.value)
        assert "round 2 has 3 usable replies of 4" in text
        assert "federation.quorum = 4 needs 4" in text
        assert "as it was after round 1" in text
        assert "site-2: OSError: network is gone" in text


class TestConnecting:
    def test_a_method_that_cannot_serve_these_clients_is_refused(self) -> None:
        run = make_run(small_client_app(CLIENTS), method="fedit")
        with pytest.raises(ConfigError, match=r"needs one rank .* \[2, 4, 8\]"):
            run.train()

    def test_too_few_clients_are_refused_before_any_training(self) -> None:
        app = small_client_app(CLIENTS, properties={1: {"base": "x"}})
        run = make_run(app, make_config(quorum=4))
        with pytest.raises(
            ConfigError, match="quorum = 4 needs 4 replies, but a round trains 3 of 3"
        ):
            run.train()
        assert not run.of(RoundStarted)


class Watched(methods.PreLort):
    """Counts how many updates are alive when the next one is added."""

    seen: list[list[weakref.ref[torch.Tensor]]]
    most_alive = 0

    def alive(self) -> int:
        return sum(any(ref() is not None for ref in refs) for refs in self.seen)

    def aggregator(self, state: ServerState) -> Aggregator:
        inner, watched = super().aggregator(state), self

        class Watching:
            result = inner.result

            def add(self, update: Update) -> None:
                watched.most_alive = max(watched.most_alive, watched.alive())
                watched.seen.append([weakref.ref(t) for t in update.adapter.tensors().values()])
                inner.add(update)

        return Watching()


def test_messages_replies_and_updates_are_freed_one_by_one() -> None:
    clients = clients_of([8] * 12)
    contents: list[weakref.ref[Any]] = []
    most = 0

    def app(message: Message, context: Context) -> Message:
        nonlocal most
        most = max(most, sum(ref() is not None for ref in contents))
        reply = small_client_app(clients)(message, context)
        contents.extend(weakref.ref(one.content) for one in (message, reply))
        return reply

    method = Watched(MethodConfig(), 0)
    method.seen = []
    instead = dict.fromkeys(range(12), app)
    run = make_run(
        small_client_app(clients, instead=instead),
        make_config(clients_per_round=12),
        clients=12,
        method=method,
    )
    run.train()
    assert (len(contents), len(method.seen)) == (48, 24)
    assert most <= 1
    assert method.most_alive <= 1  # the one before may still be in the caller's hands
    assert method.alive() == 0


class Counting(methods.PreLort):
    """Counts rounds in its memory, and says nothing of rounds, ranks and levels."""

    def aggregator(self, state: ServerState) -> Aggregator:
        inner = super().aggregator(state)

        class Forgetful:
            add = inner.add

            def result(self) -> ServerState:
                count = state.memory.get("count", torch.zeros(1)) + 1
                return ServerState(inner.result().adapter, memory={"count": count})

        return Forgetful()


class Diverging(methods.PreLort):
    """Its aggregate is not a number."""

    def aggregator(self, state: ServerState) -> Aggregator:
        inner = super().aggregator(state)

        class NotANumber:
            add = inner.add

            def result(self) -> ServerState:
                after = inner.result()
                return replace(after, adapter=after.adapter.scaled(float("nan")))

        return NotANumber()


def test_an_aggregate_that_is_not_finite_is_refused_before_it_is_kept() -> None:
    method = Diverging(MethodConfig(), 0)
    run = make_run(small_client_app(CLIENTS), make_config(rounds=1), method=method)
    before = run.state
    with pytest.raises(PrelortError, match=r"'prelort' made tensor .* not finite in round 1"):
        run.train()
    assert same_bits(run.state.adapter, before.adapter)


def test_the_server_keeps_round_and_levels_and_the_method_its_memory() -> None:
    method = Counting(MethodConfig(), 0)
    run = make_run(small_client_app(CLIENTS), make_config(rounds=3), method=method)
    rounds: list[int] = []
    state = run.train(lambda state: rounds.append(state.round))
    assert rounds == [1, 2, 3]
    assert state.levels == (2, 4, 8)
    assert state.memory["count"].item() == 3


class Broken(methods.PreLort):
    """A user's method of which one part is wrong."""

    part = ""

    def broadcast(self, state: ServerState, client: Client) -> Broadcast:
        return None if self.part == "broadcast" else super().broadcast(state, client)

    def aggregator(self, state: ServerState) -> Aggregator:
        inner, part = super().aggregator(state), self.part

        class Wrong:
            def add(self, update: Update) -> None:
                if part == "add":
                    raise KeyError("momentum")
                inner.add(update)

            def result(self) -> ServerState:
                return None if part == "result" else inner.result()

        return Wrong()


@pytest.mark.parametrize(
    "part, sentence",
    [
        ("broadcast", r"method Broken: broadcast\(\) must return a Broadcast, but returned None"),
        ("result", r"Broken: its aggregator's result\(\) must return a ServerState, but .* None"),
        ("add", r"aggregator's add\(\) raised KeyError: 'momentum' \(test_rounds.py, line \d+\)"),
    ],
)
def test_a_mistake_in_a_users_method_is_one_sentence(part: str, sentence: str) -> None:
    method = Broken(MethodConfig(), 0)
    method.part = part
    run = make_run(small_client_app(CLIENTS), ONE_ROUND, method=method)
    with pytest.raises(PrelortError, match=sentence):
        run.train()
