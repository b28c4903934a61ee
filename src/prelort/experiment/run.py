"""One run from beginning to end, in a folder, that can be stopped at any moment and resumed."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from prelort import config as configuration
from prelort import methods
from prelort.adapters import LoraAdapter, peft_folder
from prelort.config import Config
from prelort.data import describe
from prelort.errors import CheckpointError, ConfigError
from prelort.experiment import checkpoint
from prelort.experiment.assemble import Assembly, assemble
from prelort.experiment.checkpoint import Checkpoint
from prelort.experiment.folder import RunFolder
from prelort.experiment.measure import measure, prefixes, readouts
from prelort.federation.exchange import Engine
from prelort.federation.flower import Context, RecordDict
from prelort.federation.in_process import RUN_ID, InProcessGrid
from prelort.federation.server import ServerPlan, make_server_app
from prelort.federation.site import make_client_app
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
    track: Sequence[str] = (),
) -> RunResult:
    """Run the whole of ``config`` in the folder ``out``.

    With ``resume`` go on with the run in the folder, from its last checkpoint, to the same
    adapters, bit for bit (same machine, same number of threads). Raises `ConfigError`,
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
    folder.lock()
    try:
        tracked = trackers.TrackedRun(folder.path, configuration.flat(config))
        with (
            _logging_to(folder.log_file),
            _deterministic(config.threads),
            trackers.follower(track, tracked) as following,
        ):
            return _Run(folder, config, [*listeners, following]).go()
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
        self.assembly: Assembly
        self.levels: tuple[int, ...] = ()
        self.method: Method
        self.result: RunResult

    def go(self) -> RunResult:
        """Assemble, find the last checkpoint, and let the server app do the rounds."""
        method, rounds = self.config.method.name, self.config.federation.rounds
        loading = {"method": method, "rounds": rounds, "seed": self.config.seed}
        self.tell({"event": "loading", "round": 0, **loading})
        self.assembly = assemble(self.config, self.folder.path)
        sites = self.assembly.sites
        client_app = make_client_app(
            lambda context: sites[int(context.node_config["partition-id"])]
        )
        nodes = [{"partition-id": i, "num-partitions": len(sites)} for i in range(len(sites))]
        plan = ServerPlan(
            config=self.config,
            state=self._last_state(),
            agreement=self.assembly.workspace.agreement,
            emit=self.emit,
            before_rounds=self.before_rounds,
            after_round=self.after_round,
            finished=self.finished,
            allocation=self.assembly.allocation,
        )
        server_app = make_server_app(plan, lambda grid: Engine(grid, 1, float("inf")))
        context = Context(RUN_ID, 1, {}, RecordDict(), {})
        server_app(InProcessGrid(client_app, nodes), context)
        return self.result

    def before_rounds(self, state: ServerState, levels: tuple[int, ...]) -> None:
        """Write the first event, measure the untuned base and checkpoint the beginning."""
        self.levels = levels
        self.method = methods.build(self.config.method, levels, self.config.seed)
        prefixes(self.config, levels, self.assembly.initial.rank)
        if state.round > 0:
            self.tell({"event": "run_started", "round": 0, **self._facts()})
            self.tell({"event": "resumed", "round": state.round, **self._facts()})
            return
        self._describe_clients()
        self.emit({"event": "run_started", "round": 0, **self._facts()})
        self._measure(state, with_prefixes=self.config.evaluation.every > 0)
        self._checkpoint(state)

    def after_round(self, state: ServerState) -> None:
        """Measure if it is due, then checkpoint."""
        every = self.config.evaluation.every
        last = state.round == self.config.federation.rounds
        if last or (every > 0 and state.round % every == 0):
            self._measure(state)
        self._checkpoint(state)

    def finished(self, state: ServerState, levels: tuple[int, ...]) -> None:
        """Leave the adapters, tell the totals."""
        found = readouts(self.config, self.method, state, levels)
        if not methods.trait(self.method, "personal"):
            export(self.assembly, found, self.folder.adapters)
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
        adapter = self.method.readout(state)
        self.result = RunResult(self.folder.path, adapter, levels, base_row, metrics)

    def emit(self, event: dict[str, Any]) -> None:
        """Write an event, then tell it."""
        if event["event"] != "client_refused" or event["round"] == 0:
            self.log(event)  # on resuming, who was refused is there already
        self.tell(event)

    def tell(self, event: dict[str, Any]) -> None:
        """Call the listeners."""
        for listener in self.listeners:
            listener(event)

    def _describe_clients(self) -> None:
        """Leave a table and a picture of who holds what."""
        rows = self.assembly.rows
        with (self.folder.path / "clients.txt").open("w", encoding="utf-8") as file:
            Console(file=file, width=120).print(describe.summary(rows, rows.label_column))
        describe.picture(rows, rows.label_column, self.folder.path / "clients.png")

    def _facts(self) -> dict[str, Any]:
        config = self.config
        return {
            "method": config.method.name,
            "task": config.task,
            "seed": config.seed,
            "rounds": config.federation.rounds,
            "clients": len(self.assembly.sites),
            "levels": list(self.levels),
        }

    def _last_state(self) -> ServerState:
        """The state to go on from: the last checkpoint's, or the initial one."""
        base = self.assembly.workspace.agreement.base
        found = checkpoint.load_latest(self.folder.checkpoints, base)
        if found is None:
            self.log.cut(0)
            return ServerState(self.assembly.initial)
        if found.seed != self.config.seed:
            raise CheckpointError(
                f"{str(self.folder.checkpoints)!r} has seed {found.seed}, not {self.config.seed}"
            )
        # Before the first round everything is done again: it costs little.
        self.log.cut(found.metrics_bytes if found.state.round > 0 else 0)
        return found.state

    def _measure(self, state: ServerState, with_prefixes: bool = True) -> None:
        """Measure the global adapter at its prefixes, before the first round the base too."""
        started = time.monotonic()
        asked = {0: state.adapter} if state.round == 0 else {}
        if with_prefixes and not methods.trait(self.method, "personal"):
            asked |= readouts(self.config, self.method, state, self.levels)

        def progress(done: int, total: int) -> None:
            self.tell({"event": "evaluating", "round": state.round, "done": done, "total": total})

        measured = measure(self.assembly, asked, progress)
        event: dict[str, Any] = {"event": "evaluated", "round": state.round}
        if 0 in measured:
            event["base"] = measured.pop(0)
        event["prefixes"] = {str(rank): values for rank, values in measured.items()}
        self.emit({**event, "seconds": time.monotonic() - started})

    def _checkpoint(self, state: ServerState) -> None:
        base = self.assembly.workspace.agreement.base
        self.tell({"event": "checkpointing", "round": state.round})
        checkpoint.save(
            Checkpoint(state, self.config.seed, base, self.log.size), self.folder.checkpoints
        )
        # Not written: the log ends where its checkpoint says, so that resuming repeats no line.
        self.tell({"event": "checkpointed", "round": state.round})


def export(assembly: Assembly, adapters: Mapping[int, LoraAdapter], folder: Path) -> None:
    """Write each rank's adapter as a PEFT folder ``rank-N``."""
    for rank, adapter in adapters.items():
        peft_folder.save(adapter, folder / f"rank-{rank}", assembly.template)


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


@contextmanager
def _deterministic(threads: int | None) -> Iterator[None]:
    """Deterministic kernels, and the configured number of CPU threads, for the time of a run."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    threads_before = torch.get_num_threads()
    torch.use_deterministic_algorithms(True, warn_only=True)
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.set_num_threads(threads_before)
