"""The strategy over clients that add noise: what it asks, what it adds, what it leaves out."""

import itertools
import json
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from prelort.federation.strategy import AdapterStrategy

from prelort import methods
from prelort.adapters import LoraAdapter
from prelort.config import MethodConfig
from prelort.errors import QuorumError
from prelort.federation import wire
from prelort.federation.flower import (
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Message,
    RecordDict,
)
from prelort.federation.transport import Engine
from prelort.methods.interface import Aggregator, ServerState, Update
from small_federation import (
    blob_of,
    clients_of,
    header_of,
    in_process,
    make_config,
    make_reply_header,
    make_strategy,
    raw_content,
    run_rounds,
    same_bits,
    small_client_app,
)

CLIENTS = clients_of([2, 4, 8, 4])
Answering = Callable[[Message, Context], Message]


def engine_of(app: Answering, count: int = 4) -> Engine:
    return Engine(in_process(app, count), 1, float("inf"))


def replies_of_round(strategy: AdapterStrategy, app: Answering | None = None) -> list[Message]:
    """All replies of round 1, in the clients' order."""
    grid = in_process(app or small_client_app(CLIENTS), len(CLIENTS))
    messages = strategy.configure_train(1, ArrayRecord(), ConfigRecord(), grid)
    return list(grid.send_and_receive(messages))


def failing(index: int, how: Answering) -> Answering:
    """Everyone as usual, but the client ``index`` answers ``how``."""
    usual = small_client_app(CLIENTS)

    def app(message: Message, context: Context) -> Message:
        if context.node_config["partition-id"] == index:
            return how(message, context)
        return usual(message, context)

    return app


def without(index: int) -> LoraAdapter:
    """The global adapter after round 1 as aggregated by hand from all clients but one."""
    strategy, _ = make_strategy(CLIENTS)
    aggregator = strategy.method.aggregator(strategy.state)
    for i, reply in enumerate(replies_of_round(strategy)):
        if i != index:
            head = wire.header(reply.content, wire.TrainReply)
            adapter, _ = wire.adapter(reply.content, head)
            aggregator.add(Update(CLIENTS[i], adapter, head.examples))
    return aggregator.result().adapter


class TestAsking:
    def test_each_client_gets_a_content_of_its_own_at_its_rank(self) -> None:
        strategy, _ = make_strategy(CLIENTS)
        grid = in_process(small_client_app(CLIENTS), 4)
        messages = list(strategy.configure_train(1, ArrayRecord(), ConfigRecord(), grid))

        assert len({id(message.content) for message in messages}) == 4
        for message, client in zip(messages, CLIENTS, strict=True):
            request = wire.header(message.content, wire.TrainRequest)
            assert request.rank == client.rank
            received, _ = wire.adapter(message.content, request)
            assert same_bits(received, strategy.state.adapter.prefix(client.rank))
            assert request.levels[-1] == client.rank
            assert (request.round, request.rounds, request.seed) == (0, 2, 0)

    def test_only_the_sampled_clients_are_asked(self) -> None:
        strategy, events = make_strategy(CLIENTS, make_config(clients_per_round=2))
        run_rounds(strategy, engine_of(small_client_app(CLIENTS)), lambda state: None)
        asked = [e["clients"] for e in events if e["event"] == "round_started"]
        done = [e["client"] for e in events if e["event"] == "client_finished"]
        assert [len(names) for names in asked] == [2, 2]
        assert done == [name for names in asked for name in names]

    def test_bytes_are_those_of_the_messages(self) -> None:
        strategy, events = make_strategy(CLIENTS)
        grid = in_process(small_client_app(CLIENTS), 4)
        messages = list(strategy.configure_train(1, ArrayRecord(), ConfigRecord(), grid))
        replies = list(grid.send_and_receive(messages))
        strategy.aggregate_train(1, replies)

        def travelled(message: Message) -> int:
            return len(header_of(message.content).encode()) + len(blob_of(message.content))

        (event,) = [e for e in events if e["event"] == "aggregated"]
        assert event["bytes_down"] == sum(map(travelled, messages))
        assert event["bytes_up"] == sum(map(travelled, replies))

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_halved_types_halve_the_bytes(self, dtype: str) -> None:
        def bytes_of(config: Any) -> int:
            strategy, events = make_strategy(CLIENTS, config)
            run_rounds(strategy, engine_of(small_client_app(CLIENTS)), lambda state: None)
            assert strategy.state.adapter.layers["model.q_proj"].A.dtype == torch.float32
            return sum(e["bytes_up"] for e in events if e["event"] == "aggregated")

        full, half = bytes_of(make_config()), bytes_of(make_config(wire_dtype=dtype))
        numbers = sum(make_reply_adapter(c.rank).num_parameters for c in CLIENTS)
        assert abs((full - half) - 2 * 2 * numbers) < 0.05 * full  # 2 rounds, 2 bytes a number


def make_reply_adapter(rank: int) -> LoraAdapter:
    strategy, _ = make_strategy(CLIENTS)
    return strategy.state.adapter.prefix(rank)


class TestOrder:
    @pytest.mark.parametrize("name", ["prelort", "zero-padding"])
    def test_replies_in_any_order_give_the_same_bits(self, name: str) -> None:
        strategy, _ = make_strategy(CLIENTS, name=name)
        replies = replies_of_round(strategy)
        results = []
        for order in itertools.permutations(range(4)):
            fresh, events = make_strategy(CLIENTS, name=name)
            fresh.aggregate_train(1, [replies[i] for i in order])
            results.append(fresh.state.adapter)
            (aggregated,) = [e for e in events if e["event"] == "aggregated"]
            assert aggregated["replies"] == 4

        assert len(results) == 24
        assert all(same_bits(results[0], other) for other in results[1:])
        assert not same_bits(results[0], strategy.state.adapter)

    def test_the_order_would_matter_without_it(self) -> None:
        """Guards the test above: adding in another order does give other bits."""
        strategy, _ = make_strategy(CLIENTS)
        replies = replies_of_round(strategy)
        results = []
        for order in itertools.permutations(range(4)):
            aggregator = strategy.method.aggregator(strategy.state)
            for i in order:
                head = wire.header(replies[i].content, wire.TrainReply)
                adapter, _ = wire.adapter(replies[i].content, head)
                aggregator.add(Update(CLIENTS[i], adapter, head.examples))
            results.append(aggregator.result().adapter)
        assert not all(same_bits(results[0], other) for other in results[1:])

    def test_in_any_order_with_a_failure_among_them(self) -> None:
        def how(message: Message, context: Context) -> Message:
            return Message(Error(100, "tired"), reply_to=message)

        strategy, _ = make_strategy(CLIENTS)
        replies = replies_of_round(strategy, failing(1, how))
        expected = without(1)
        for order in itertools.permutations(range(4)):
            fresh, _ = make_strategy(CLIENTS)
            fresh.aggregate_train(1, [replies[i] for i in order])
            assert same_bits(fresh.state.adapter, expected)


def raises(message: Message, context: Context) -> Message:
    raise ValueError("tokenizer went missing")


def says_why(message: Message, context: Context) -> Message:
    return Message(Error(100, "timed out after 5 s"), reply_to=message)


def empty(message: Message, context: Context) -> Message:
    return Message(RecordDict(), reply_to=message)


def changed(header: dict[str, Any], cut: int | None = None) -> Answering:
    """The usual answer of client 1 with another header, or its adapter cut short."""
    usual = small_client_app(CLIENTS)

    def app(message: Message, context: Context) -> Message:
        content = usual(message, context).content
        text = json.dumps(json.loads(header_of(content)) | header)
        return Message(raw_content(text, blob_of(content)[:cut]), reply_to=message)

    return app


def poisoned(value: float) -> Answering:
    usual = small_client_app(CLIENTS)

    def app(message: Message, context: Context) -> Message:
        reply = usual(message, context)
        head = wire.header(reply.content, wire.TrainReply)
        adapter, _ = wire.adapter(reply.content, head)
        adapter.layers["model.q_proj"].B[0, 0] = value
        return Message(wire.pack(head, adapter), reply_to=message)

    return app


FAILURES = {
    "raises": (raises, "ValueError: tokenizer went missing"),
    "says why": (says_why, "timed out after 5 s"),
    "sends nothing": (empty, "carries no header"),
    "other base": (changed({"base": "x"}), "another base model"),
    "other layers": (changed({"layers": "x"}), "adapts other layers"),
    "other scale": (changed({"scale": 16.0}), "another scale rule"),
    "scale of zero": (changed({"scale": 0.0}), "malformed header: scale"),
    "other rank": (changed({"rank": 2}), "answers with rank 2, expected 4"),
    "other round": (changed({"round": 1}), "answers for round 2, asked was 1"),
    "other client": (changed({"client": "site-0"}), "answers for 'site-0'"),
    "no examples": (changed({"examples": 0}), "claims 0 examples"),
    "negative examples": (changed({"examples": -3}), "claims -3 examples"),
    "absurd weight": (changed({"examples": 10**12}), "claims 1000000000000 examples"),
    "truncated": (changed({}, cut=-1), "adapter cannot be read"),
    "a NaN": (poisoned(float("nan")), "not finite"),
    "an infinity": (poisoned(float("inf")), "not finite"),
    "a huge number": (poisoned(1e30), "above federation.max_abs_value"),
}


class TestFailures:
    @pytest.mark.parametrize("how, reason", FAILURES.values(), ids=FAILURES)
    def test_a_failing_client_is_left_out_and_the_rest_counts(
        self, how: Answering, reason: str
    ) -> None:
        strategy, events = make_strategy(CLIENTS, make_config(rounds=1))

        run_rounds(strategy, engine_of(failing(1, how)), lambda state: None)

        assert same_bits(strategy.state.adapter, without(1))
        (failed,) = [e for e in events if e["event"] == "client_failed"]
        assert (failed["client"], failed["rank"], failed["round"]) == ("site-1", 4, 1)
        assert reason in failed["reason"]
        (aggregated,) = [e for e in events if e["event"] == "aggregated"]
        assert (aggregated["replies"], aggregated["failed"]) == (3, 1)

    def test_the_mean_loss_is_that_of_the_usable_replies(self) -> None:
        strategy, events = make_strategy(CLIENTS, make_config(rounds=1))
        run_rounds(strategy, engine_of(failing(0, changed({"loss": 7.0}))), lambda state: None)
        (aggregated,) = [e for e in events if e["event"] == "aggregated"]
        weights = [client.examples for client in CLIENTS]
        expected = (7.0 * weights[0] + 1.5 * sum(weights[1:])) / sum(weights)
        assert aggregated["loss"] == pytest.approx(expected, rel=1e-12)

    def test_a_failure_in_one_round_does_not_bar_the_next(self) -> None:
        def at_first(message: Message, context: Context) -> Message:
            if wire.header(message.content, wire.TrainRequest).round == 0:
                raise OSError("disk")
            return small_client_app(CLIENTS)(message, context)

        strategy, events = make_strategy(CLIENTS)
        run_rounds(strategy, engine_of(failing(1, at_first)), lambda state: None)
        counts = [(e["replies"], e["failed"]) for e in events if e["event"] == "aggregated"]
        assert counts == [(3, 1), (4, 0)]

    def test_a_client_that_answers_twice_counts_once(self) -> None:
        strategy, _ = make_strategy(CLIENTS)
        replies = replies_of_round(strategy)
        strategy.aggregate_train(1, replies)
        twice, events = make_strategy(CLIENTS)
        twice.aggregate_train(1, [replies[0], replies[0], replies[2], *replies])

        assert same_bits(strategy.state.adapter, twice.state.adapter)
        assert sum(e["event"] == "client_finished" for e in events) == 4

    def test_a_node_that_was_not_asked_counts_for_nothing(self) -> None:
        strategy, _ = make_strategy(CLIENTS)
        replies = replies_of_round(strategy)
        strategy.aggregate_train(1, replies)
        fresh, _ = make_strategy(CLIENTS)
        stranger = Message(replies[0].content, reply_to=replies[0])
        stranger.metadata.__dict__["_src_node_id"] = 5555
        fresh.aggregate_train(1, [stranger, *replies])
        assert same_bits(strategy.state.adapter, fresh.state.adapter)

    @pytest.mark.parametrize("silent", [0, 1, 3])
    def test_a_client_whose_reply_never_came_holds_nobody_back(self, silent: int) -> None:
        """Flower's own loops hand on only the replies that came."""
        strategy, events = make_strategy(CLIENTS)
        replies = replies_of_round(strategy)
        del replies[silent]
        strategy.aggregate_train(1, replies)

        assert same_bits(strategy.state.adapter, without(silent))
        (failed,) = [e for e in events if e["event"] == "client_failed"]
        assert (failed["client"], failed["reason"]) == (f"site-{silent}", "did not answer")


class TestQuorum:
    @pytest.mark.parametrize("quorum, enough", [(1, True), (3, True), (4, False), (0.75, True)])
    def test_is_counted_over_those_asked(self, quorum: int | float, enough: bool) -> None:
        strategy, _ = make_strategy(CLIENTS, make_config(rounds=1, quorum=quorum))
        if enough:
            run_rounds(strategy, engine_of(failing(1, says_why)), lambda state: None)
            assert strategy.state.round == 1
        else:
            with pytest.raises(QuorumError):
                run_rounds(strategy, engine_of(failing(1, says_why)), lambda state: None)

    def test_below_it_the_state_is_as_it_was_bit_for_bit(self) -> None:
        def in_second_round(message: Message, context: Context) -> Message:
            if wire.header(message.content, wire.TrainRequest).round == 1:
                raise OSError("network is gone")
            return small_client_app(CLIENTS)(message, context)

        strategy, events = make_strategy(CLIENTS, make_config(rounds=3, quorum=4))
        after: list[tuple[ServerState, dict[str, torch.Tensor]]] = []

        def keep(state: ServerState) -> None:
            after.append((state, {n: t.clone() for n, t in state.adapter.tensors().items()}))

        with pytest.raises(QuorumError) as raised:
            run_rounds(strategy, engine_of(failing(2, in_second_round)), keep)

        ((state, copies),) = after
        assert strategy.state is state
        assert strategy.state.round == 1
        for name, tensor in strategy.state.adapter.tensors().items():
            assert torch.equal(tensor, copies[name])
        text = str(raised.value)
        assert "round 2 has 3 usable replies of 4" in text
        assert "federation.quorum = 4 needs 4" in text
        assert "as it was after round 1" in text
        assert "site-2: OSError: network is gone" in text
        assert [e["round"] for e in events if e["event"] == "aggregated"] == [1]

    def test_nobody_at_all(self) -> None:
        strategy, _ = make_strategy(CLIENTS, make_config(quorum=1))

        with pytest.raises(QuorumError, match="0 usable replies of 4"):
            run_rounds(strategy, engine_of(raises), lambda state: None)
        assert strategy.state.round == 0


class Watching:
    """A method as `methods.build` gives it, whose aggregator watches what it was given."""

    def __init__(self, levels: list[int]) -> None:
        self.inner = methods.build(MethodConfig(), levels, 0)
        self.seen: list[list[weakref.ref[torch.Tensor]]] = []
        self.most_alive = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def alive(self) -> int:
        return sum(any(ref() is not None for ref in refs) for refs in self.seen)

    def aggregator(self, state: ServerState) -> Aggregator:
        inner, watching = self.inner.aggregator(state), self

        class Wrapped:
            def add(self, update: Update) -> None:
                watching.most_alive = max(watching.most_alive, watching.alive())
                tensors = update.adapter.tensors().values()
                watching.seen.append([weakref.ref(tensor) for tensor in tensors])
                inner.add(update)

            def result(self) -> ServerState:
                return inner.result()

        return Wrapped()


def test_updates_are_not_held_once_they_were_added() -> None:
    clients = clients_of([8] * 12)
    method = Watching([8])
    strategy, _ = make_strategy(
        clients,
        make_config(clients_per_round=12),
        method=method,  # type: ignore[arg-type]
    )
    run_rounds(strategy, engine_of(small_client_app(clients), 12), lambda state: None)

    assert len(method.seen) == 24
    assert method.most_alive <= 1  # the one before may still be in the caller's hands
    assert method.alive() == 0


def test_replies_are_not_held_once_they_were_taken() -> None:
    clients = clients_of([8] * 12)
    usual = small_client_app(clients)
    sent: list[weakref.ref[Any]] = []
    max_rank = 0

    def app(message: Message, context: Context) -> Message:
        nonlocal max_rank
        max_rank = max(max_rank, sum(ref() is not None for ref in sent))
        reply = usual(message, context)
        sent.append(weakref.ref(reply.content))
        return reply

    strategy, _ = make_strategy(clients, make_config(rounds=1, clients_per_round=12))
    run_rounds(strategy, engine_of(app, 12), lambda state: None)
    assert max_rank <= 1


class Counting:
    """A method that forgets the round, and remembers in its memory how often it was asked."""

    def __init__(self, levels: list[int]) -> None:
        self.inner = methods.build(MethodConfig(), levels, 0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def aggregator(self, state: ServerState) -> Aggregator:
        inner = self.inner.aggregator(state)

        class Forgetful:
            add = staticmethod(inner.add)

            def result(self) -> ServerState:
                count = state.memory.get("count", torch.zeros(1)) + 1
                return ServerState(inner.result().adapter, memory={"count": count})

        return Forgetful()


def test_the_round_is_counted_by_the_strategy_and_the_memory_kept() -> None:
    strategy, _ = make_strategy(CLIENTS, make_config(rounds=3), method=Counting([2, 4, 8]))  # type: ignore[arg-type]
    rounds: list[int] = []
    run_rounds(
        strategy, engine_of(small_client_app(CLIENTS)), lambda state: rounds.append(state.round)
    )
    assert rounds == [1, 2, 3]
    assert strategy.state.memory["count"].item() == 3


def test_going_on_from_a_state_gives_what_an_undisturbed_run_gives() -> None:
    states: list[ServerState] = []
    whole, _ = make_strategy(CLIENTS, make_config(rounds=4, clients_per_round=2))
    run_rounds(whole, engine_of(small_client_app(CLIENTS)), states.append)

    second, events = make_strategy(CLIENTS, make_config(rounds=4, clients_per_round=2))
    second.state = states[1]
    run_rounds(second, engine_of(small_client_app(CLIENTS)), lambda state: None)

    assert same_bits(second.state.adapter, whole.state.adapter)
    assert [e["round"] for e in events if e["event"] == "round_started"] == [3, 4]


def test_flowers_own_start_runs_it_too() -> None:
    ours, _ = make_strategy(CLIENTS)
    run_rounds(ours, engine_of(small_client_app(CLIENTS)), lambda state: None)

    theirs, events = make_strategy(CLIENTS)
    grid = in_process(small_client_app(CLIENTS), 4)
    measured: list[int] = []

    def evaluate(server_round: int, arrays: ArrayRecord) -> None:
        measured.append(server_round)

    result = theirs.start(
        grid, wire.record(theirs.state.adapter.tensors()), num_rounds=2, evaluate_fn=evaluate
    )

    assert same_bits(theirs.state.adapter, ours.state.adapter)
    sent = result.arrays["adapter"].data
    assert sent == wire.record(ours.state.adapter.tensors())["adapter"].data
    assert result.train_metrics_clientapp[2]["loss"] == pytest.approx(1.5)
    assert measured == [0, 1, 2]
    assert sum(e["event"] == "aggregated" for e in events) == 2


def test_messages_are_made_lazily_so_that_one_is_in_memory() -> None:
    strategy, _ = make_strategy(CLIENTS)
    grid = in_process(small_client_app(CLIENTS), 4)
    made: list[weakref.ref[Any]] = []

    def watched(messages: Iterator[Message]) -> Iterator[Message]:
        for message in messages:
            assert sum(ref() is not None for ref in made) <= 1
            made.append(weakref.ref(message.content))
            yield message
            del message

    from prelort.federation.transport import exchange

    messages = strategy.configure_train(1, ArrayRecord(), ConfigRecord(), grid)
    replies = exchange(Engine(grid, 1, float("inf")), watched(messages))
    strategy.aggregate_train(1, replies)
    assert len(made) == 4


def test_a_reply_header_made_by_hand_is_one_that_clients_send() -> None:
    """Guards the fakes of these tests against a schema that has moved on."""
    text = make_reply_header(CLIENTS[0]).model_dump_json()
    assert wire.TrainReply.model_validate_json(text).client == "site-0"
