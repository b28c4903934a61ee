"""The server's side: the Flower `ServerApp` that brings clients, method and rounds together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from prelort import methods
from prelort.config import Config
from prelort.errors import ConfigError
from prelort.federation.allocation import Allocation
from prelort.federation.exchange import Engine
from prelort.federation.flower import Context, Grid, ServerApp
from prelort.federation.registry import Agreement, Participant, introductions
from prelort.federation.sampling import check_numbers
from prelort.federation.strategy import AdapterStrategy, Emit
from prelort.methods.interface import ServerState


@dataclass(frozen=True, slots=True)
class ServerPlan:
    """What the server needs: the configuration, where to begin, and whom to tell.

    ``before_rounds`` gets the state and the rank levels once the clients are known (and measures
    the untuned base); ``after_round`` gets the state after each round (and checkpoints it).
    """

    config: Config
    state: ServerState
    agreement: Agreement
    emit: Emit
    before_rounds: Callable[[ServerState, tuple[int, ...]], None]
    after_round: Callable[[ServerState], None]
    finished: Callable[[ServerState, tuple[int, ...]], None]
    allocation: Allocation = field(default_factory=Allocation)


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
    when a round fails.
    """
    config = plan.config

    def refused(name: str, reason: str) -> None:
        plan.emit(
            {"event": "client_refused", "round": plan.state.round, "client": name, "reason": reason}
        )

    participants = introductions(engine, plan.agreement, refused)
    _check(plan, participants)
    offered = {participant.client.rank for participant in participants}
    levels = tuple(sorted(offered | plan.allocation.levels()))
    method = methods.build(config.method, levels, config.seed)
    method.check([participant.client for participant in participants])
    for participant in participants:  # what cannot be sent is refused now, not in some round
        method.broadcast(plan.state, participant.client)
    plan.before_rounds(plan.state, levels)
    strategy = AdapterStrategy(
        config, method, participants, plan.state, plan.agreement, plan.emit, plan.allocation
    )
    plan.finished(strategy.run_rounds(engine, plan.after_round), levels)


def _check(plan: ServerPlan, participants: list[Participant]) -> None:
    federation = plan.config.federation
    if not participants:
        raise ConfigError("no client can take part: all were refused, see the log")
    check_numbers(len(participants), federation.clients_per_round, federation.quorum)
