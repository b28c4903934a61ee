"""One run from beginning to end, in a folder, that can be stopped at any moment and resumed."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig

from prelort import config as configuration
from prelort import methods
from prelort.adapters import LoraAdapter, peft_folder
from prelort.config import Config
from prelort.errors import CheckpointError, ConfigError
from prelort.experiment import checkpoint
from prelort.experiment.checkpoint import Checkpoint
from prelort.experiment.deterministic import deterministic
from prelort.experiment.folder import RunFolder
from prelort.experiment.measure import Measured, global_adapters, prefixes
from prelort.experiment.stage import Stage, StageOf, in_process
from prelort.federation.server import Ask, ServerPlan, Standing
from prelort.methods.interface import Method, ServerState
from prelort.report import events as reading
from prelort.report import trackers

Listener = Callable[[dict[str, Any]], None]
"""Called with each event of a run, after it has been written."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RunResult:
    """What a finished run leaves.

    ``metrics``: rank -> metric -> value after the last round; ``base``: of the untuned base.
    """

    path: Path
    adapter: LoraAdapter
    levels: tuple[int, ...]
    base: dict[str, float]
    metrics: dict[int, dict[str, float]]


def run(
    config: Config,
    out: Path | str,
    *,
    resume: bool = False,
    listeners: Sequence[Listener] = (),
    stage_of: StageOf = in_process,
    track: Sequence[str] = (),
    patience: float = 0.0,
) -> RunResult:
    """Run the whole of ``config`` in the folder ``out``, by default all in this process.

    With ``resume`` go on with the run in the folder, from its last checkpoint, to the same
    adapters, bit for bit (same machine, same number of threads). ``patience``: seconds to wait for
    another process to leave the folder. Raises `ConfigError`,
    `CheckpointError`, `QuorumError`; nothing that was finished is lost by any of them. A new run
    that is refused before it begins leaves nothing behind. ``track`` names experiment trackers
    (`prelort.report.trackers`); of those, none can stop a run that has begun.
    """
    trackers.check(track)
    folder = RunFolder(Path(out))
    if resume:
        _check_same(folder.read_config(), config, folder.path)
    else:
        methods.find(config.method.name)
        folder.create(config)
    folder.lock(patience)
    try:
        tracked = trackers.TrackedRun(folder.path, configuration.flat(config))
        with (
            _logging_to(folder.log_file),
            deterministic(config.threads),
            trackers.follower(track, tracked) as following,
        ):
            return _Run(folder, config, [*listeners, following]).go(stage_of)
    except ConfigError:
        folder.unlock()
        if not resume:
            folder.discard()
        raise
    finally:
        folder.unlock()


class _Run:
    """The state of one run in this process."""

    def __init__(self, folder: RunFolder, config: Config, listeners: Sequence[Listener]) -> None:
        self.folder = folder
        self.config = config
        self.listeners = listeners
        self.log = folder.event_log()
        self.stage: Stage
        self.method: Method
        self.result: RunResult

    def go(self, stage_of: StageOf) -> RunResult:
        """Set the stage, find the last checkpoint, and let the server app do the rounds."""
        method, rounds = self.config.method.name, self.config.federation.rounds
        loading = {"method": method, "rounds": rounds, "seed": self.config.seed}
        self.tell({"event": "loading", "round": 0, **loading})
        self.stage = stage_of(self.config, self.folder.path)
        plan = ServerPlan(
            config=self.config,
            state=self._last_state(),
            spec=self.stage.spec,
            emit=self.emit,
            before_rounds=self.before_rounds,
            after_round=self.after_round,
            finished=self.finished,
            allocation=self.stage.allocation,
            planned=self.stage.planned,
        )
        self.stage.carry_out(plan)
        return self.result

    def before_rounds(self, now: Standing) -> None:
        """Write the first event, measure the untuned base and checkpoint the beginning."""
        self._method_for(now)
        prefixes(self.config, now.levels, self.stage.initial.rank)
        facts = self._facts(now)
        if now.state.round > 0:
            self.tell({"event": "run_started", "round": 0, **facts})
            self.tell({"event": "resumed", "round": now.state.round, **facts})
            return
        self.stage.describe(self.folder.path)
        self.emit({"event": "run_started", "round": 0, **facts})
        self._measure(now, with_prefixes=self.config.evaluation.every > 0)
        self._checkpoint(now.state)

    def after_round(self, now: Standing) -> None:
        """Measure if it is due, then checkpoint."""
        self._method_for(now)
        every = self.config.evaluation.every
        last = now.state.round == self.config.federation.rounds
        if last or (every > 0 and now.state.round % every == 0):
            self._measure(now)
        self._checkpoint(now.state)

    def finished(self, now: Standing) -> None:
        """Leave the adapters, tell the totals."""
        self._method_for(now)
        state = now.state
        found = global_adapters(self.config, self.method, state, now.levels)
        if not methods.trait(self.method, "personal"):
            export(self.stage.template, found, self.folder.adapters)
        written = reading.read(self.folder.metrics_file)
        totals = reading.totals(written)
        self.emit(
            {
                "event": "run_finished",
                "round": state.round,
                "seconds": totals.seconds,
                "phases": reading.phases(written),
                "bytes_up": totals.bytes_up,
                "bytes_down": totals.bytes_down,
            }
        )
        final = reading.final_evaluation(written)
        metrics = final.prefixes if final is not None else {}
        base_row = reading.base_row(written)
        adapter = self.method.global_adapter(state)
        self.result = RunResult(self.folder.path, adapter, now.levels, base_row, metrics)

    def _method_for(self, now: Standing) -> None:
        self.method = methods.build(self.config.method, self.config.seed)

    def emit(self, event: dict[str, Any]) -> None:
        """Write an event, then tell it."""
        if event["event"] != "client_refused" or event["round"] == 0:
            self.log(event)  # on resuming, who was refused is there already
        self.tell(event)

    def tell(self, event: dict[str, Any]) -> None:
        """Call the listeners."""
        for listener in self.listeners:
            listener(event)

    def _facts(self, now: Standing) -> dict[str, Any]:
        config = self.config
        return {
            "method": config.method.name,
            "task": config.task,
            "seed": config.seed,
            "rounds": config.federation.rounds,
            "clients": len(now.clients),
            "levels": list(now.levels),
        }

    def _last_state(self) -> ServerState:
        """The state to go on from: the last checkpoint's, or the initial one."""
        base = self.stage.spec.base
        found = checkpoint.load_latest(self.folder.checkpoints, base)
        if found is None:
            self.log.cut(0)
            return ServerState(self.stage.initial)
        if found.seed != self.config.seed:
            raise CheckpointError(
                f"{str(self.folder.checkpoints)!r} has seed {found.seed}, not {self.config.seed}"
            )
        # Before the first round everything is done again: it costs little.
        self.log.cut(found.metrics_bytes if found.state.round > 0 else 0)
        return found.state

    def _measure(self, now: Standing, with_prefixes: bool = True) -> None:
        """Measure the global adapter at its prefixes, before the first round the base too."""
        started = time.monotonic()
        state, personal = now.state, methods.trait(self.method, "personal")
        asked = {0: state.adapter} if state.round == 0 else {}
        if with_prefixes and not personal:
            asked |= global_adapters(self.config, self.method, state, now.levels)
        event: dict[str, Any] = {"event": "evaluated", "round": state.round}
        if self.stage.measure is not None:
            measured = self.stage.measure(asked, self._evaluating(state.round))
        else:
            measured, more = _at_clients(now.ask, asked)
            event |= more
        if 0 in measured:
            event["base"] = measured.pop(0)
        event["prefixes"] = {str(rank): values for rank, values in measured.items()}
        self.emit({**event, "seconds": time.monotonic() - started})

    def _evaluating(self, server_round: int) -> Callable[[int, int], None]:
        def progress(done: int, total: int) -> None:
            self.tell({"event": "evaluating", "round": server_round, "done": done, "total": total})

        return progress

    def _checkpoint(self, state: ServerState) -> None:
        base = self.stage.spec.base
        self.tell({"event": "checkpointing", "round": state.round})
        checkpoint.save(
            Checkpoint(state, self.config.seed, base, self.log.size), self.folder.checkpoints
        )
        # Not written: the log ends where its checkpoint says, so that resuming repeats no line.
        self.tell({"event": "checkpointed", "round": state.round})


def _at_clients(ask: Ask, adapters: Mapping[int, LoraAdapter]) -> tuple[Measured, dict[str, Any]]:
    """The metrics over the clients' own test rows, and on how many of them.

    Where the base (rank 0) is measured alone it is an adapter whose B is zero.
    """
    sent = {rank: adapter.prefix(1) if rank == 0 else adapter for rank, adapter in adapters.items()}
    pools = ask(sent)
    counted = {str(rank): pool.examples for rank, pool in pools.items()}
    clients = {str(rank): pool.clients for rank, pool in pools.items()}
    measured = {rank: pool.metrics() for rank, pool in pools.items() if pool.clients}
    return measured, {"where": "clients", "examples": counted, "clients": clients}


def export(template: LoraConfig, adapters: Mapping[int, LoraAdapter], folder: Path) -> None:
    """Write each rank's adapter as a PEFT folder ``rank-N``."""
    for rank, adapter in adapters.items():
        peft_folder.save(adapter, folder / f"rank-{rank}", template)


def _check_same(old: Config, new: Config, path: Path) -> None:
    """Raise `ConfigError` naming the keys in which a resumed run's configuration differs."""
    keys = configuration.differences(old, new)
    if keys:
        raise ConfigError(
            f"the run in {str(path)!r} was started with another configuration; these keys "
            f"differ: {', '.join(keys)}. Resume it as it is, or start a new run in another --out"
        )


@contextmanager
def _logging_to(path: Path) -> Iterator[None]:
    """Send what the package logs, with tracebacks, to a file."""
    handler = logging.FileHandler(path, encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logger = logging.getLogger("prelort")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()
