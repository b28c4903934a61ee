"""The Flower `Strategy` that drives any method."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from prelort import diagnostics
from prelort.adapters import LoraAdapter
from prelort.config import Config, TrainingConfig
from prelort.errors import QuorumError, UpdateRefused
from prelort.federation import wire
from prelort.federation.allocation import Allocation
from prelort.federation.client_manager import AdapterSpec, ConnectedClient
from prelort.federation.flower import (
    ArrayRecord,
    ConfigRecord,
    Grid,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
    Strategy,
)
from prelort.federation.pooled import PooledMetrics, together
from prelort.federation.reorder_buffer import ReorderBuffer
from prelort.federation.replies import checked, measured
from prelort.federation.sampling import count_of, sample
from prelort.federation.transport import Engine, exchange
from prelort.methods import trait
from prelort.methods.interface import (
    Aggregator,
    Broadcast,
    Client,
    Method,
    RoundObserver,
    ServerState,
    Update,
)

Emit = Callable[[dict[str, Any]], None]
"""Takes one event: a dictionary with ``event``, ``round`` and what belongs to it."""


@dataclass(slots=True)
class Tally:
    """What one round has cost and brought so far."""

    started: float = field(default_factory=time.monotonic)
    aggregating: float = 0.0
    diagnosing: float = 0.0
    bytes_down: int = 0
    bytes_up: int = 0
    examples: int = 0
    loss_sum: float = 0.0
    replies: int = 0
    failures: dict[str, str] = field(default_factory=dict)
    offers: dict[str, int] = field(default_factory=dict)
    """Client -> the rank that it goes on with."""
    validation: dict[str, float] = field(default_factory=dict)
    """Client -> its loss on its validation rows."""

    def event(self, server_round: int) -> dict[str, Any]:
        """The round's summary; the loss is the mean over the clients' examples."""
        total = time.monotonic() - self.started
        return {
            "event": "aggregated",
            "round": server_round,
            "replies": self.replies,
            "failed": len(self.failures),
            "loss": self.loss_sum / max(self.examples, 1),
            "bytes_up": self.bytes_up,
            "bytes_down": self.bytes_down,
            "seconds": {
                "train": total - self.aggregating - self.diagnosing,
                "aggregate": self.aggregating,
                "diagnose": self.diagnosing,
                "total": total,
            },
        }


class AdapterStrategy(Strategy):  # type: ignore[misc]
    """Rounds of broadcast, local training and aggregation, for whatever the method says.

    `state` changes only when a round has reached its quorum. `connected` and `method` may be
    exchanged between rounds, as clients come and go. `failed` gathers the names of clients that
    gave no usable answer. Flower's own ``start`` works too.
    """

    def __init__(
        self,
        config: Config,
        method: Method,
        connected: Sequence[ConnectedClient],
        state: ServerState,
        spec: AdapterSpec,
        emit: Emit,
        allocation: Allocation | None = None,
    ) -> None:
        self.config = config
        self.method = method
        self.connected = list(connected)
        self.state = state
        self.spec = spec
        self.emit = emit
        self.allocation = allocation or Allocation()
        self.failed: set[str] = set()
        self._tally = Tally()

    def run_round(self, server_round: int, engine: Engine) -> None:
        """Train and aggregate once, and let the clients measure where that is due.

        Raises `QuorumError` when there are too few usable replies; `state` is then as before.
        """
        messages = self.configure_train(server_round, ArrayRecord(), ConfigRecord(), engine.grid)
        self._fold_in(server_round, exchange(engine, messages))
        if self._measures_at_clients(server_round):
            self.evaluate_at_clients(server_round, engine)

    def measure_at_clients(
        self, adapters: Mapping[int, LoraAdapter], engine: Engine
    ) -> dict[int, PooledMetrics]:
        """Each adapter (by the rank it stands for) measured by every client on its own test rows.

        Prefixes of one adapter travel and are measured together, since a trip to a real site takes
        longer than the measuring. A client that fails is left out, with an event.
        """
        server_round = self.state.round
        clients = {p.node_id: p.client for p in self.connected}
        found = {rank: PooledMetrics() for rank in adapters}
        groups = together(adapters)
        messages = (
            Message(
                self._measurement(adapters[ranks[0]], ranks[1:]),
                dst_node_id=node_id,
                message_type=MessageType.EVALUATE,
                group_id=str(number),  # by which the reply is known to be of this group
            )
            for number, ranks in enumerate(groups)
            for node_id in clients
        )
        for reply in exchange(engine, messages):
            client = clients[reply.metadata.src_node_id]
            whole, *prefixes = groups[int(reply.metadata.group_id)]
            try:
                answer = measured(reply, client, server_round, self.spec)
                found[whole].add(answer, answer.metrics)
                for rank in prefixes:
                    found[rank].add(answer, answer.prefixes.get(rank, {}))
            except UpdateRefused as error:
                event = {"round": server_round, "client": client.name, "rank": whole}
                self.emit({"event": "measuring_failed", **event, "reason": str(error)})
        return found

    def evaluate_at_clients(self, server_round: int, engine: Engine) -> None:
        """Let every client measure what it would receive now, on its own test rows."""
        started = time.monotonic()
        clients = {p.node_id: self._now(p) for p in self.connected}
        messages = (
            self._message(
                node_id, self._evaluation(server_round, client), MessageType.EVALUATE, server_round
            )
            for node_id, client in clients.items()
        )
        found: dict[str, dict[str, Any]] = {}
        failed: dict[str, str] = {}
        for reply in exchange(engine, messages):
            client = clients[reply.metadata.src_node_id]
            try:
                head = measured(reply, client, server_round, self.spec)
                facts = {"rank": client.rank, "examples": head.examples}
                found[client.name] = {**facts, "metrics": head.metrics}
            except UpdateRefused as error:
                failed[client.name] = str(error)
        self.emit(
            {
                "event": "evaluated_at_clients",
                "round": server_round,
                "clients": dict(sorted(found.items())),
                "failed": dict(sorted(failed.items())),
                "seconds": time.monotonic() - started,
            }
        )

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterator[Message]:
        """One message for each client of the round, each with a content of its own."""
        asked = self._asked(server_round)
        self._tally = Tally()
        self.emit(
            {
                "event": "round_started",
                "round": server_round,
                "clients": [connected_client.client.name for connected_client in asked],
            }
        )
        for connected_client in asked:
            content = self._request(server_round, self._now(connected_client))
            self._tally.bytes_down += wire.size(content)
            message = self._message(
                connected_client.node_id, content, MessageType.TRAIN, server_round
            )
            del content
            yield message
            del message  # before the next one is made

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Fold the replies into `state`; the new global adapter and the mean training loss.

        Raises `QuorumError` where too few of them can be used.
        """
        loss = self._fold_in(server_round, replies)
        return wire.record(self.state.adapter.tensors()), MetricRecord({"loss": loss})

    def _fold_in(self, server_round: int, replies: Iterable[Message]) -> float:
        """Check and add each reply as it comes; move the state if there are enough of them.

        A reply that cannot be used is left out, with its reason in an event. Returns the mean
        training loss over the examples.
        """
        asked = {p.node_id: self._now(p) for p in self._asked(server_round)}
        aggregator = self.method.aggregator(self.state)
        observer = self._observer(list(asked.values()))
        in_order = self._adder(list(asked.values()), aggregator)
        for reply in replies:
            client = asked.pop(reply.metadata.src_node_id, None)
            if client is None:
                continue  # answers twice, or was not asked
            self._take(server_round, client, reply, in_order, observer)
            del reply  # before the next one is pulled
        for client in asked.values():  # only where another loop than `exchange` sent the messages
            self._leave_out(server_round, client, "did not answer", in_order)
        self._check_quorum(server_round)
        started = time.monotonic()
        self.state = replace(
            aggregator.result(),
            round=server_round,
            ranks=self._next_ranks(server_round),
            levels=self.state.levels,
        )
        self._tally.aggregating += time.monotonic() - started
        found = {} if observer is None else {"diagnostics": observer.result(self.state)}
        self._tally.diagnosing = 0.0 if observer is None else observer.seconds
        event = self._tally.event(server_round) | found
        self.emit(event)
        return float(event["loss"])

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """No messages: the metrics are measured where the test data are, after each round."""
        return []

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Nothing to aggregate."""
        return None

    def summary(self) -> None:
        """Nothing: the run's first event says what Flower would log here."""

    def _asked(self, server_round: int) -> list[ConnectedClient]:
        """The clients of a round, by the seed."""
        if self.allocation.asks_everyone(server_round):
            return self.connected
        wanted, seed = self.config.federation.clients_per_round, self.config.seed
        return sample(self.connected, wanted, seed=seed, round_index=server_round - 1)

    def _now(self, connected_client: ConnectedClient) -> Client:
        """The client at the rank that it has by now."""
        client = connected_client.client
        return replace(client, rank=self.state.ranks.get(client.name, client.rank))

    def _next_ranks(self, server_round: int) -> dict[str, int]:
        """The ranks after a round: what clients offered, then what the server decides."""
        ranks, tally = dict(self.state.ranks), self._tally
        planned = self.allocation.after(server_round, tally.validation, len(self.connected))
        for connected_client in self.connected:
            name, old = connected_client.client.name, self._now(connected_client).rank
            offered = tally.offers.get(name, old)
            new = min(planned.get(name, offered), max(connected_client.max_rank, offered))
            if new != old:
                ranks[name] = new
                why = "the server's allocation" if name in planned else "the client's offer"
                event = {"round": server_round, "client": name, "from": old, "to": new}
                self.emit({"event": "rank_changed", **event, "reason": why})
        return ranks

    def _measures_at_clients(self, server_round: int) -> bool:
        if not (self.config.evaluation.at_clients or trait(self.method, "personal")):
            return False
        every, last = self.config.evaluation.every, self.config.federation.rounds
        return server_round == last or (every > 0 and server_round % every == 0)

    def _request(self, server_round: int, client: Client) -> RecordDict:
        """The content of one client's message: what to train and how."""
        config, objective = self.config, self.method.objective(self.state, client)
        sent = self.method.broadcast(self.state, client)
        head = wire.TrainRequest(
            **self._delivery(server_round - 1, sent),
            rounds=config.federation.rounds,
            seed=config.seed,
            training=self._training(sent.trainable.rank),
            objective=objective.kind,
            levels=objective.levels,
            level_weights=objective.weights,
            tail=objective.tail,
            trains=sent.trains,
            with_validation=self.allocation.asks_everyone(server_round),
            timeout=config.federation.timeout,
        )
        return wire.pack(head, sent.trainable, sent.frozen, without=head.missing())

    def _training(self, rank: int) -> TrainingConfig:
        """What a client of this rank is told: its learning rate may depend on the rank."""
        training = self.config.training
        exponent = training.rank_exponent
        if exponent is None:
            exponent = float(getattr(self.method, "rank_exponent", 0.0))
        factor = (self.spec.schema.rank / rank) ** exponent
        rate = training.learning_rate * factor
        # The head has no rank: its rate is the one that was set, for all.
        head = training.head_learning_rate or training.learning_rate
        return training.model_copy(update={"learning_rate": rate, "head_learning_rate": head})

    def _message(self, node_id: int, content: RecordDict, kind: str, server_round: int) -> Message:
        return Message(content, dst_node_id=node_id, message_type=kind, group_id=str(server_round))

    def _evaluation(self, server_round: int, client: Client) -> RecordDict:
        """The content of one client's message: to measure what it would receive now."""
        return self._to_measure(server_round, self.method.broadcast(self.state, client))

    def _measurement(self, adapter: LoraAdapter, prefixes: Sequence[int]) -> RecordDict:
        """The content of every client's message: to measure this adapter and prefixes of it."""
        return self._to_measure(self.state.round, Broadcast(adapter), prefixes)

    def _to_measure(
        self, server_round: int, sent: Broadcast, prefixes: Sequence[int] = ()
    ) -> RecordDict:
        settings = self.config.evaluation
        head = wire.EvaluateRequest(
            **self._delivery(server_round, sent),
            prefixes=tuple(prefixes),
            metrics=settings.metrics,
            batch_size=settings.batch_size,
            max_new_tokens=settings.max_new_tokens,
            max_generated=settings.max_generated,
        )
        return wire.pack(head, sent.trainable, sent.frozen, without=head.missing())

    def _delivery(self, round_index: int, sent: Broadcast) -> dict[str, Any]:
        """The facts that every request states about the adapter that comes with it."""
        return {
            **self.spec.header(sent.trainable.rank).model_dump(),
            "dtype": self.config.federation.wire_dtype,
            "round": round_index,
            "seeded_factors": sent.seeded_factors,
            "factor_seed": sent.factor_seed,
            "personal": sent.personal,
            "scale_multiplier": sent.scale_multiplier,
        }

    def _observer(self, clients: Sequence[Client]) -> RoundObserver | None:
        observe = diagnostics.observer(self.config)
        return None if observe is None else observe(self.method, self.state, clients)

    def _adder(self, clients: Sequence[Client], aggregator: Aggregator) -> ReorderBuffer[Update]:
        def add(update: Update) -> None:
            started = time.monotonic()
            aggregator.add(update)
            self._tally.aggregating += time.monotonic() - started

        return ReorderBuffer([client.name for client in clients], add)

    def _take(
        self,
        server_round: int,
        client: Client,
        reply: Message,
        in_order: ReorderBuffer[Update],
        observer: RoundObserver | None,
    ) -> None:
        """Add one reply, or note why it is left out."""
        tally, sent = self._tally, self.method.broadcast(self.state, client)
        event: dict[str, Any] = {"round": server_round, "client": client.name, "rank": client.rank}
        try:
            update, head = checked(
                reply,
                client,
                server_round - 1,
                self.spec,
                self.config.federation,
                sent,
                may_prune=self.method.objective(self.state, client).tail is not None,
            )
        except UpdateRefused as error:
            self._leave_out(server_round, client, str(error), in_order)
            return
        size = wire.size(reply.content)
        tally.replies += 1
        tally.bytes_up += size
        tally.examples += head.examples
        tally.loss_sum += head.loss * head.examples
        if head.next_rank is not None:
            tally.offers[client.name] = head.next_rank
        if head.validation_loss is not None:
            tally.validation[client.name] = head.validation_loss
        details: Mapping[str, Any] = head.model_dump(
            include={"loss", "examples", "steps", "seconds", "validation_loss"}
        )
        details = {key: value for key, value in details.items() if value is not None}
        self.emit({"event": "client_finished", **event, **details, "bytes_up": size})
        if observer is not None:
            observer.add(sent, update)
        in_order.put(client.name, update)

    def _leave_out(
        self, server_round: int, client: Client, reason: str, in_order: ReorderBuffer[Update]
    ) -> None:
        self._tally.failures[client.name] = reason
        self.failed.add(client.name)
        event = {"round": server_round, "client": client.name, "rank": client.rank}
        self.emit({"event": "client_failed", **event, "reason": reason})
        in_order.skip(client.name)

    def _check_quorum(self, server_round: int) -> None:
        quorum, tally = self.config.federation.quorum, self._tally
        asked = len(self._asked(server_round))
        needed = count_of(quorum, asked)
        if tally.replies >= needed:
            return
        reasons = [f"{name}: {reason}" for name, reason in tally.failures.items()]
        raise QuorumError(
            f"round {server_round} has {tally.replies} usable replies of {asked}, but "
            f"federation.quorum = {quorum} needs {needed}; the global adapter is as it was after "
            f"round {server_round - 1} ({'; '.join(reasons[:3])})"
        )
