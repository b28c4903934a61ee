"""The server's side: the Flower `ServerApp` that brings clients, method and rounds together."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta

from prelort import methods
from prelort.adapters import LoraAdapter
from prelort.config import Config
from prelort.errors import ConfigError, QuorumError
from prelort.federation import wire
from prelort.federation.allocation import Allocation
from prelort.federation.client_manager import AdapterSpec, ClientManager, ConnectedClient
from prelort.federation.flower import Context, Grid, Message, MessageType, ServerApp
from prelort.federation.pooled import PooledMetrics
from prelort.federation.sampling import check_numbers, needed
from prelort.federation.strategy import AdapterStrategy, Emit
from prelort.federation.transport import Engine, exchange
from prelort.methods.interface import Client, ServerState

log = logging.getLogger(__name__)

GOODBYE_SECONDS = 15.0
"""How long the end of a run waits for sites to take note of it."""

Ask = Callable[[Mapping[int, LoraAdapter]], dict[int, PooledMetrics]]
"""Lets every client measure adapters (by the rank they stand for) on its own test rows."""


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a run stands between rounds: its state, its rank levels, who is there."""

    state: ServerState
    levels: tuple[int, ...]
    clients: tuple[str, ...]
    ask: Ask


@dataclass(frozen=True, slots=True)
class ServerPlan:
    """What the server needs: the configuration, where to begin, and whom to tell.

    ``before_rounds`` is called once the clients are known (and measures the untuned base),
    ``after_round`` after each round (and checkpoints it), ``finished`` after the last.
    ``planned``: rank levels that are expected whoever is there.
    """

    config: Config
    state: ServerState
    spec: AdapterSpec
    emit: Emit
    before_rounds: Callable[[Standing], None]
    after_round: Callable[[Standing], None]
    finished: Callable[[Standing], None]
    allocation: Allocation = field(default_factory=Allocation)
    planned: tuple[int, ...] = ()


def make_server_app(plan: ServerPlan, engine_of: Callable[[Grid], Engine]) -> ServerApp:
    """A `ServerApp` whose main carries out ``plan`` over the grid that it is started with."""
    app = ServerApp()

    @app.main()  # type: ignore[untyped-decorator]
    def main(grid: Grid, context: Context) -> None:
        serve(plan, engine_of(grid))

    return app


def serve(plan: ServerPlan, engine: Engine) -> None:
    """Ask who is there, check that the method can serve them, and run the rounds.

    Raises `ConfigError` before any training for too few or unsuitable clients, and `QuorumError`
    when clients or usable replies are too few for a round, after all that the engine's patience
    allows. Everything that was finished has been handed to ``after_round`` then.
    """
    service = _Service(plan, engine)
    try:
        service.run()
    finally:
        service.say_goodbye()


class _Service:
    """One run of the server: who is there, and the rounds with them."""

    def __init__(self, plan: ServerPlan, engine: Engine) -> None:
        self.plan = plan
        self.engine = engine
        self.config = plan.config
        self.round = plan.state.round
        self.roster = ClientManager(plan.spec, self.refused)
        self.levels: tuple[int, ...] = ()
        self.strategy: AdapterStrategy

    def run(self) -> None:
        connected = self.gathered()
        self._check(connected)
        clients = [connected_client.client for connected_client in connected]
        self.levels = self._levels(self.plan.state, clients)
        method = methods.build(self.config.method, self.config.seed)
        state = replace(self.plan.state, levels=self.levels)
        method.check(state, clients)
        for client in clients:  # what cannot be sent is refused now, not in some round
            method.broadcast(state, client)
        plan = self.plan
        self.strategy = AdapterStrategy(
            plan.config,
            method,
            connected,
            replace(plan.state, levels=self.levels),
            plan.spec,
            plan.emit,
            plan.allocation,
        )
        plan.before_rounds(self._standing())
        while self.round < self.config.federation.rounds:
            self._next_round()
            self.round = self.strategy.state.round
            plan.after_round(self._standing())
        plan.finished(self._standing())

    def _standing(self) -> Standing:
        clients = tuple(p.client.name for p in self.strategy.connected)
        return Standing(self.strategy.state, self.levels, clients, self._ask)

    def say_goodbye(self) -> None:
        """Let real sites know that they need not stay ready; whoever is gone need not hear it."""
        if self.engine.patience is None:
            return
        content = wire.pack(self.plan.spec.header(1))
        messages = (
            Message(content, dst_node_id=p.node_id, message_type=f"{MessageType.QUERY}.end")
            for p in self.roster.present
        )
        try:
            list(exchange(replace(self.engine, deadline=GOODBYE_SECONDS), messages))
        except Exception as error:  # the SuperLink may be gone, and the run's end stands already
            log.warning("sites could not be told of the end: %s", error)

    def refused(self, name: str, reason: str) -> None:
        """A client that is left out."""
        event = {"round": self.round, "client": name, "reason": reason}
        self.plan.emit({"event": "client_refused", **event})

    def gathered(self) -> list[ConnectedClient]:
        """Those that are there, once there are enough. Raises `QuorumError` if none come."""
        wanted = needed(self.config.federation)

        def waiting(seconds: float) -> None:
            until = datetime.now(UTC) + timedelta(seconds=seconds)
            self.plan.emit(
                {
                    "event": "waiting",
                    "round": self.round + 1,
                    "present": [p.client.name for p in self.roster.present],
                    "missing": self.roster.missing,
                    "needed": wanted,
                    "until": until.isoformat(timespec="seconds"),
                }
            )

        found = self.roster.gather(self.engine, wanted, waiting)
        if self.engine.patience is not None and len(found) < wanted:
            missing = f", missing are {', '.join(self.roster.missing)}" * bool(self.roster.missing)
            raise QuorumError(
                f"{len(found)} clients are there after waiting {self.engine.patience:g} s "
                f"(federation.wait), {wanted} are needed{missing}; the global adapter is as it was "
                f"after round {self.round}"
            )
        return found

    def _next_round(self) -> None:
        """One round; where clients come and go, again if it fails for want of replies."""
        attempts = 1 if self.engine.patience is None else self.config.federation.attempts
        for attempt in range(1, attempts + 1):
            self._update()
            try:
                self.strategy.run_round(self.round + 1, self.engine)
                return
            except QuorumError as error:
                if attempt == attempts:
                    raise
                event = {"round": self.round + 1, "attempt": attempt + 1, "reason": str(error)}
                self.plan.emit({"event": "round_repeated", **event})

    def _update(self) -> None:
        """Let who has come take part, and who has gone not."""
        if self.engine.patience is None:
            return
        strategy = self.strategy
        before = {p.client.name: p for p in strategy.connected}
        for name in strategy.failed & before.keys():
            self.roster.doubt(before[name])
        strategy.failed.clear()
        now = {p.client.name: p for p in self._fitting(self.gathered(), before)}
        for name in sorted(before.keys() - now.keys()):
            self._tell("client_left", name)
        ranks = dict(strategy.state.ranks)
        for name in sorted(now):
            rank = now[name].client.rank
            if name not in before or before[name].client.rank != rank:
                self._tell("client_joined", name, rank=rank)
                ranks.pop(name, None)  # what it says now counts, not what it was given before
        strategy.connected = list(now.values())
        strategy.state = replace(strategy.state, ranks=ranks)
        clients = [connected_client.client for connected_client in strategy.connected]
        levels = self._levels(strategy.state, clients)
        if levels != self.levels:
            self.levels = levels
            strategy.state = replace(strategy.state, levels=levels)

    def _fitting(
        self, found: list[ConnectedClient], before: Mapping[str, ConnectedClient]
    ) -> list[ConnectedClient]:
        """Those that the method can serve together; one that has just come gives way."""
        clients = [connected_client.client for connected_client in found]
        try:
            self.strategy.method.check(self.strategy.state, clients)
            return found
        except ConfigError as error:
            old = [p for p in found if before.get(p.client.name) == p]
            for connected_client in found:
                if connected_client not in old:
                    self.refused(connected_client.client.name, str(error))
            return old

    def _levels(self, state: ServerState, clients: Sequence[Client]) -> tuple[int, ...]:
        """All ranks that were, are or will be in use: a level stays when its last client goes."""
        offered = {client.rank for client in clients}
        planned = {*self.plan.planned, *self.plan.allocation.levels()}
        return tuple(sorted({*state.levels, *offered, *planned}))

    def _ask(self, adapters: Mapping[int, LoraAdapter]) -> dict[int, PooledMetrics]:
        return self.strategy.measure_at_clients(adapters, self.engine)

    def _tell(self, event: str, name: str, **more: int) -> None:
        self.plan.emit({"event": event, "round": self.round + 1, "client": name, **more})

    def _check(self, connected: list[ConnectedClient]) -> None:
        federation = self.config.federation
        if not connected:
            raise ConfigError("no client can take part: all were refused, see the log")
        if self.engine.patience is None:
            check_numbers(len(connected), federation.clients_per_round, federation.quorum)
