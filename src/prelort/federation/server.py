"""The server of a run: it trains rounds and lets clients measure adapters."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import Protocol, TypeVar

from prelort.adapters import LoraAdapter
from prelort.config import Config, cohort_size, count_of
from prelort.errors import ConfigError, QuorumError, UpdateRefused
from prelort.events import (
    ClientJoined,
    ClientLeft,
    ClientMetrics,
    ClientRefused,
    ClientsEvaluated,
    EvaluationFailed,
    Listener,
    RankChanged,
    RanksUncovered,
    RoundRepeated,
    RoundStarted,
    RoundStats,
    Transferring,
    Waiting,
    utc_now,
)
from prelort.federation import wire
from prelort.federation.allocation import Allocation
from prelort.federation.client_manager import Admit, ClientManager, ConnectedClient
from prelort.federation.flower import Message, MessageType, RecordDict
from prelort.federation.hidden_ranks import Holders, count_holders
from prelort.federation.messages import AdapterSpec
from prelort.federation.pooled import PooledMetrics, prefix_groups
from prelort.federation.progress import Direction
from prelort.federation.replies import checked_metrics
from prelort.federation.requests import evaluate_request, train_request
from prelort.federation.round import Round
from prelort.federation.sampling import check_numbers, min_connected, sample
from prelort.federation.secure_round import NoiseAtClients, SecureRound, check_clients
from prelort.federation.site_keys import SiteKeys
from prelort.federation.transport import Transport
from prelort.methods import trait
from prelort.methods.calls import calling, expect
from prelort.methods.interface import Aggregator, Broadcast, Client, Method, Observe, ServerState
from prelort.methods.objective import Objective
from prelort.robustness import coverage
from prelort.robustness.aggregator import RobustAggregator

log = logging.getLogger(__name__)

QUERY_SECONDS = 120.0
"""How long real sites may take for a query of secure aggregation, which needs no model."""
GOODBYE_SECONDS = 15.0
"""How long the end of a run waits for sites to take note of it."""

T = TypeVar("T")

Pools = dict[int, PooledMetrics]
"""Rank (0: the base) -> its metrics over the clients."""


class Private(NoiseAtClients, Protocol):
    """Differential privacy of a run (`prelort.privacy`).

    With secure aggregation the clients add the noise; else the server samples and adds it.
    """

    def sample(self, clients: Mapping[str, T]) -> list[T]:
        """The clients of a round, in their order; the same in each attempt at it."""
        ...

    def aggregator(
        self, method: Method, state: ServerState, clients: Sequence[Client]
    ) -> Aggregator:
        """In place of the method's own; ``clients``: all that are connected."""
        ...

    def epsilon(self) -> float:
        """What has been spent so far."""
        ...


class Server:
    """Trains rounds with whichever clients are connected, and lets them measure adapters.

    The run calls `connect` once, then `train` round by round, and `close` at the end. Engines
    differ in the ``transport`` alone.
    """

    def __init__(
        self,
        config: Config,
        transport: Transport,
        spec: AdapterSpec,
        log: Listener,
        *,
        allocation: Allocation | None = None,
        planned_ranks: Sequence[int] = (),
        observe: Observe | None = None,
        private: Private | None = None,
        site_keys: SiteKeys | None = None,
    ) -> None:
        """``planned_ranks``: rank levels that are expected whoever is connected."""
        self._config = config
        self._transport = transport = replace(transport, report=self._transferring)
        self._spec = spec
        self._log = log
        self._allocation = allocation or Allocation()
        self._planned = {*planned_ranks, *self._allocation.levels()}
        self._observe = observe
        self._private = private
        # Where clients add the noise instead, the server neither samples in secret nor adds any.
        self._central_privacy = None if config.privacy.secure_aggregation else private
        self._round = 0
        """The round under way; 0 before the first."""
        self._finished = 0
        """Number of finished rounds."""
        limit = config.federation.max_client_examples
        hide = config.privacy.hide_ranks
        self._manager = ClientManager(transport, spec, self._refuse, limit, site_keys, hide)
        self._holders: Holders | None = None
        """Where ranks are hidden: of each rank dimension, since `connect`."""
        self._failed: set[str] = set()
        """Clients without a usable reply in the last attempt."""
        self.clients: list[ConnectedClient] = []

    def connect(self, method: Method, state: ServerState) -> ServerState:
        """Wait for the clients and check that the method can serve them; the state with levels.

        Raises `ConfigError` for too few or unsuitable clients, `QuorumError` if none come in time.
        """
        self._round = self._finished = state.round
        self.clients = self._gather()
        if not self.clients:
            raise ConfigError("no client can take part: all were refused, see the log")
        if not self._transport.clients_change:
            federation, count = self._config.federation, len(self.clients)
            # With fewer clients than configured, a round trains all of them.
            cohort = cohort_size(federation.clients_per_round, count)
            check_numbers(count, cohort, federation.quorum)
        state = self._with_levels(state)
        self._check_method(method, state)
        self._check_robustness(method, state)
        if self._config.privacy.hide_ranks:
            self._holders = self._count_holders()
        return state

    def train(
        self, method: Method, state: ServerState, server_round: int
    ) -> tuple[ServerState, RoundStats]:
        """Train one round, repeatedly if replies are too few and clients may change meanwhile.

        Raises `QuorumError` after the last attempt; ``state`` is still valid then.
        """
        self._round, self._finished = server_round, state.round
        clients_change, attempt = self._transport.clients_change, 1
        while True:
            if clients_change:
                state = self._update_clients(method, state)
            try:
                return self._train_once(method, state, server_round)
            except QuorumError as error:
                if not clients_change or attempt == self._config.federation.attempts:
                    raise
                attempt += 1
                self._log(RoundRepeated(server_round, attempt, str(error)))

    def evaluate(self, state: ServerState, adapters: Mapping[int, LoraAdapter]) -> Pools:
        """Each adapter (by its rank; 0: the base) measured by every client on its own test rows.

        Prefixes of one adapter travel and are measured together, since a trip to a real site takes
        longer than the measuring. A client that fails is left out, with an event.
        """
        # An adapter of rank 1 whose B is zero stands for the base.
        adapters = {r: a.prefix(1) if r == 0 else a for r, a in adapters.items()}
        pools = {rank: PooledMetrics() for rank in adapters}
        groups = prefix_groups(adapters)
        clients = {connected.node_id: connected.client for connected in self.clients}
        messages = (
            Message(
                evaluate_request(
                    self._config, self._spec, Broadcast(adapters[rank]), state.round, prefixes
                ),
                dst_node_id=node_id,
                message_type=MessageType.EVALUATE,
                group_id=str(number),  # which the reply repeats
            )
            for number, (rank, *prefixes) in enumerate(groups)
            for node_id in clients
        )
        for reply in self._transport.send_and_receive(messages):
            client = clients[reply.metadata.src_node_id]
            whole, *prefixes = groups[int(reply.metadata.group_id)]
            try:
                head = checked_metrics(reply, client, state.round, self._spec, self._config)
                pools[whole].add(head, head.metrics)
                for rank in prefixes:
                    pools[rank].add(head, head.prefixes.get(rank, {}))
            except UpdateRefused as error:
                self._log(EvaluationFailed(state.round, client.name, whole, str(error)))
        return pools

    def evaluate_clients(self, method: Method, state: ServerState) -> ClientsEvaluated:
        """Let every client measure what it would receive now, on its own test rows."""
        started = time.monotonic()
        clients = {
            connected.node_id: _at_current_rank(connected, state) for connected in self.clients
        }
        messages = (
            self._message(
                node_id,
                evaluate_request(
                    self._config, self._spec, method.broadcast(state, client), state.round
                ),
                MessageType.EVALUATE,
            )
            for node_id, client in clients.items()
        )
        metrics: dict[str, ClientMetrics] = {}
        failures: dict[str, str] = {}
        for reply in self._transport.send_and_receive(messages):
            client = clients[reply.metadata.src_node_id]
            try:
                head = checked_metrics(reply, client, state.round, self._spec, self._config)
                values = {n: float("nan") if v is None else v for n, v in head.metrics.items()}
                metrics[client.name] = ClientMetrics(client.rank, head.examples, values)
            except UpdateRefused as error:
                failures[client.name] = str(error)
        seconds = time.monotonic() - started
        return ClientsEvaluated(
            state.round, dict(sorted(metrics.items())), dict(sorted(failures.items())), seconds
        )

    def close(self) -> None:
        """Tell real sites that the run has ended, without waiting for those that are gone."""
        if not self._transport.clients_change:
            return
        content = wire.pack(self._spec.header(1))
        messages = (
            Message(content, dst_node_id=one.node_id, message_type=f"{MessageType.QUERY}.end")
            for one in self._manager.connected
        )
        try:
            list(replace(self._transport, deadline=GOODBYE_SECONDS).send_and_receive(messages))
        except Exception as error:  # the SuperLink may be gone, and the run is finished anyway
            log.warning("sites could not be told that the run has ended: %s", error)

    def _check_method(self, method: Method, state: ServerState) -> None:
        """Let the method refuse these clients, and check what it returns for each of them now."""
        clients = [connected.client for connected in self.clients]
        with calling(method, "check()"):
            method.check(state, clients)
        for client in clients:
            with calling(method, "broadcast()"):
                broadcast = method.broadcast(state, client)
            expect(method, "broadcast()", broadcast, Broadcast)
            if self._config.lora.start_from is not None and broadcast.seeded_factors != "nothing":
                raise ConfigError(
                    f"lora.start_from is not possible with method {method.name!r}, whose clients "
                    "draw their factors themselves"
                )
            with calling(method, "objective()"):
                objective = method.objective(state, client)
            expect(method, "objective()", objective, Objective)
        privacy = self._config.privacy
        if privacy.of_examples and trait(method, "personal"):
            raise ConfigError(
                f"privacy.unit = 'example' is not possible with method {method.name!r}, which "
                "clients measure on their own rows, without noise"
            )
        if privacy.secure_aggregation:
            # At real sites others may join; until then each round leaves such dimensions out.
            needed = 0 if self._transport.clients_change else privacy.min_holders
            check_clients(needed, method, state, clients, privacy.hide_ranks)

    def _check_robustness(self, method: Method, state: ServerState) -> None:
        """Refuse what the robust rule cannot protect, and report what it protects only in part."""
        robustness = self._config.robustness
        if robustness.rule == "none":
            return
        clients = [_at_current_rank(connected, state) for connected in self.clients]
        cohort = cohort_size(self._config.federation.clients_per_round, len(clients))
        attackers = count_of(robustness.attackers, cohort)
        uncovered = coverage.check(robustness.rule, method, state, clients, cohort, attackers)
        if not self._transport.clients_change and self._round > 0:
            return  # the run is resumed, and its log has the events
        for part in uncovered:
            self._log(
                RanksUncovered(
                    self._round,
                    low=part.low,
                    high=part.high,
                    holders=part.holders,
                    needed=part.needed,
                    treatment=robustness.uncovered,
                )
            )

    def _count_holders(self) -> Holders:
        """Count the holders of each rank dimension; who could not be counted takes no part."""
        federation, privacy = self._config.federation, self._config.privacy
        changing, rank = self._transport.clients_change, self._spec.schema.rank
        if changing and federation.min_clients is None:
            raise ConfigError(
                "privacy.hide_ranks needs federation.min_clients, the number of sites that must be "
                "connected when ranks are counted: others cannot take part"
            )
        clients = {one.node_id: one.client for one in self.clients}
        send = partial(self._send_query, clients)
        holders = count_holders(list(clients.values()), rank, privacy, send, self._refuse)
        if not changing and holders.counts[-1] < privacy.min_holders:
            raise ConfigError(
                f"privacy.min_holders = {privacy.min_holders}: {holders.counts[-1]} of "
                f"{len(holders.names)} clients hold rank {rank}, so its sum would show them; set "
                f"ranks.mix so that at least {privacy.min_holders} clients have the highest rank"
            )
        for client in clients.values():
            if client.name not in holders.names:
                self._manager.disconnect(client.name)
        self.clients = [one for one in self.clients if one.client.name in holders.names]
        return holders

    def _train_once(
        self, method: Method, state: ServerState, server_round: int
    ) -> tuple[ServerState, RoundStats]:
        sampled = self._sample(server_round)
        clients = {connected.node_id: _at_current_rank(connected, state) for connected in sampled}
        cohort = list(clients.values())
        self._log(RoundStarted(server_round, tuple(client.name for client in cohort)))
        kind: Callable[..., Round] = Round
        if self._config.privacy.secure_aggregation:
            send_query = partial(self._send_query, clients)
            kind = partial(
                SecureRound,
                send_query=send_query,
                private=self._private,
                holders=self._holders,
            )
        current = kind(
            server_round,
            method,
            state,
            cohort,
            config=self._config,
            spec=self._spec,
            log=self._log,
            aggregator=self._aggregator(method, state, cohort),
            observer=self._observe(method, state, cohort) if self._observe else None,
        )
        try:
            current.prepare()
            for reply in self._transport.send_and_receive(
                self._train_requests(current, method, state, clients)
            ):
                current.receive(clients[reply.metadata.src_node_id], reply)
                del reply  # before the next one is pulled
        finally:
            self._failed = set(current.failures)
        current.complete()
        after, stats = current.finish(self._next_ranks(current, state))
        if self._private is not None:
            stats = replace(stats, epsilon=self._private.epsilon())
        return after, stats

    def _aggregator(
        self, method: Method, state: ServerState, cohort: Sequence[Client]
    ) -> Aggregator | None:
        """The round's aggregator where it is not the method's own."""
        robustness = self._config.robustness
        if self._central_privacy is not None:
            clients = [_at_current_rank(connected, state) for connected in self.clients]
            return self._central_privacy.aggregator(method, state, clients)
        if robustness.rule == "none":
            return None
        attackers = count_of(robustness.attackers, len(cohort))
        clip = robustness.uncovered == "clip"
        return RobustAggregator(robustness.rule, method, state, attackers, clip)

    def _send_query(
        self, clients: Mapping[int, Client], action: str, contents: Mapping[str, RecordDict]
    ) -> Iterator[tuple[Client, Message]]:
        """Send a query of secure aggregation to clients, by name, and yield their replies."""
        messages = (
            self._message(node_id, contents[client.name], f"{MessageType.QUERY}.{action}")
            for node_id, client in clients.items()
            if client.name in contents
        )
        deadline = self._transport.deadline
        if self._transport.clients_change:
            deadline = min(deadline, QUERY_SECONDS)
        for reply in replace(self._transport, deadline=deadline).send_and_receive(messages):
            yield clients[reply.metadata.src_node_id], reply

    def _train_requests(
        self, current: Round, method: Method, state: ServerState, clients: Mapping[int, Client]
    ) -> Iterator[Message]:
        """One message for each client of the round, built when it can be sent."""
        for node_id, client in clients.items():
            if client.name in current.failures:
                continue
            content = train_request(
                self._config,
                self._spec,
                method,
                state,
                client,
                with_validation=self._allocation.needs_all_clients(current.number),
                masked=current.masked(client),
            )
            current.count_sent(wire.size(content))
            message = self._message(node_id, content, MessageType.TRAIN)
            del content
            yield message
            del message  # before the next one is made

    def _transferring(
        self, request: Message, direction: Direction, size: int, share: float
    ) -> None:
        node_id = request.metadata.dst_node_id
        for connected in self.clients:
            if connected.node_id == node_id:
                name = connected.client.name
                self._log(Transferring(self._round, name, direction, size, share))

    def _message(self, node_id: int, content: RecordDict, kind: str) -> Message:
        return Message(content, dst_node_id=node_id, message_type=kind, group_id=str(self._round))

    def _sample(self, server_round: int) -> list[ConnectedClient]:
        if self._allocation.needs_all_clients(server_round):
            return self.clients
        if self._central_privacy is not None:
            return self._central_privacy.sample({one.client.name: one for one in self.clients})
        per_round, seed = self._config.federation.clients_per_round, self._config.seed
        return sample(self.clients, per_round, seed=seed, round_index=server_round - 1)

    def _next_ranks(self, current: Round, state: ServerState) -> dict[str, int]:
        """The ranks after a round: the clients' offers, overridden by the server's allocation."""
        ranks, offers = dict(state.ranks), current.offered_ranks()
        losses = current.validation_losses()
        allocated = self._allocation.after(current.number, losses, len(self.clients))
        for connected in self.clients:
            name, old = connected.client.name, _at_current_rank(connected, state).rank
            offered = offers.get(name, old)
            new = min(allocated.get(name, offered), max(connected.max_rank, offered))
            if new != old:
                ranks[name] = new
                reason = "the server's allocation" if name in allocated else "the client's offer"
                self._log(RankChanged(current.number, name, old, new, reason))
        return ranks

    def _gather(self, admit: Admit = lambda clients: None) -> list[ConnectedClient]:
        """The connected clients, once there are enough. Raises `QuorumError` if none come."""
        needed = min_connected(self._config.federation)
        connected = self._manager.gather(needed, lambda seconds: self._wait(needed, seconds), admit)
        patience = self._transport.patience
        if patience is not None and len(connected) < needed:
            missing = ", ".join(self._manager.missing)
            missing = missing and f", missing: {missing}"
            raise QuorumError(
                f"{len(connected)} clients are connected after waiting {patience:g} s "
                f"(federation.wait), {needed} are needed{missing}; the global adapter is as "
                f"it was after round {self._finished}"
            )
        return connected

    def _wait(self, needed: int, seconds: float) -> None:
        names = tuple(connected.client.name for connected in self._manager.connected)
        until = utc_now() + timedelta(seconds=seconds)
        missing = tuple(self._manager.missing)
        self._log(Waiting(self._finished + 1, names, missing, needed, until))

    def _refuse(self, name: str, reason: str) -> None:
        if not self._transport.clients_change and self._round > 0:
            return  # the run is resumed, and its log has the event
        self._log(ClientRefused(self._round, name, reason))

    def _update_clients(self, method: Method, state: ServerState) -> ServerState:
        """Add clients that have joined and drop those that left; returns the state for them."""
        old_ranks = {connected.client.name: connected.client.rank for connected in self.clients}
        for name in self._failed & old_ranks.keys():
            self._manager.disconnect(name)
        self._failed = set()

        def admit(clients: Sequence[Client]) -> None:
            method.check(state, clients)
            new = clients[-1].name
            if self._holders is not None and new not in self._holders.names:
                raise ConfigError(
                    "was not there when ranks were counted (privacy.hide_ranks): it can take part "
                    "when the run is started again"
                )

        self.clients = self._gather(admit)
        new_ranks = {connected.client.name: connected.client.rank for connected in self.clients}
        for name in sorted(old_ranks.keys() - new_ranks.keys()):
            self._log(ClientLeft(self._round, name))
        ranks = dict(state.ranks)
        for name, rank in sorted(new_ranks.items()):
            if old_ranks.get(name) != rank:
                stated = None if self._holders is not None else rank
                self._log(ClientJoined(self._round, name, stated))
                ranks.pop(name, None)  # its new offer replaces what the server allocated
        return self._with_levels(replace(state, ranks=ranks))

    def _with_levels(self, state: ServerState) -> ServerState:
        """The state with all ranks that were, are or will be in use.

        A level stays when its last client goes, so that a round does not depend on who is away.
        """
        offered = {connected.client.rank for connected in self.clients}
        return replace(state, levels=tuple(sorted({*state.levels, *offered, *self._planned})))


def _at_current_rank(connected: ConnectedClient, state: ServerState) -> Client:
    client = connected.client
    return replace(client, rank=state.ranks.get(client.name, client.rank))
