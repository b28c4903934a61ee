"""One run in its folder, from beginning to end; it can be stopped at any moment and resumed."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from prelort import config as configuration
from prelort import diagnostics, methods
from prelort.adapters import LoraAdapter
from prelort.adapters.algebra import computing_on
from prelort.config import Config
from prelort.data.federated import FederatedRows
from prelort.errors import BudgetSpentError, CheckpointError, ConfigError, QuorumError
from prelort.events import (
    BudgetSpent,
    Checkpointed,
    Event,
    Listener,
    Loading,
    RoundFinished,
    RunFinished,
    RunResumed,
    RunStarted,
)
from prelort.experiment import adapter_folder, checkpoint
from prelort.experiment.backend import Backend, Connect, InProcess
from prelort.experiment.callbacks import Callback, check_callbacks, end_run
from prelort.experiment.checkpoint import Checkpoint
from prelort.experiment.deterministic import deterministic
from prelort.experiment.evaluation import check_ranks, evaluate, global_adapters
from prelort.experiment.folder import RunFolder
from prelort.experiment.result import RunResult
from prelort.federation.server import Server
from prelort.files import as_path
from prelort.history import RunHistory
from prelort.library_logging import quiet
from prelort.methods.interface import ServerState
from prelort.models.base import linear_algebra_device
from prelort.privacy import PrivateRun
from prelort.privacy.example import check_ledgers
from prelort.report import describe, trackers
from prelort.report.formatting import plain
from prelort.tasks import labels


@quiet()
def run(
    config: Config,
    out: Path | str,
    *,
    resume: bool = False,
    listeners: Sequence[Listener] = (),
    backend: Connect | None = None,
    callbacks: Sequence[Callback] = (),
    track: Sequence[str] = (),
    patience: float = 0.0,
) -> RunResult:
    """Run the whole of ``config`` in the folder ``out``.

    Args:
        config: the resolved configuration.
        out: the run's folder; for a new run it must be empty or not exist.
        resume: continue the run in ``out`` from its last checkpoint, to the same adapters, bit for
            bit (same machine, same number of threads); with more rounds also a finished one.
        listeners: called with each event.
        backend: where the run takes place; by default in this process.
        callbacks: called at the end of each round; one that returns True ends the run there.
        track: names of experiment trackers (`prelort.report.trackers`). None of them can stop a
            run that has begun.
        patience: seconds to wait while another process uses the folder.

    Raises:
        ConfigError: before any training, naming what is wrong; a new run then leaves nothing.
        CheckpointError: where the checkpoints are damaged or belong to another run.
        QuorumError: where too few clients take part or answer. What was finished is kept.
    """
    if not isinstance(config, Config):
        raise ConfigError(
            f"config must be a prelort.Config, not {config!r}: prelort.load_config makes one"
        )
    if callable(listeners):
        raise ConfigError("listeners must be a list of functions, not a single one")
    check_callbacks(callbacks, config)
    trackers.check(track)
    folder = RunFolder(as_path(out))
    with (
        _claimed(folder, config, resume=resume, patience=patience),
        _logging_to(folder.log_file),
        deterministic(config.threads),
        computing_on(linear_algebra_device(config.model.device)),
        trackers.Tracking(track, folder.path, configuration.flat(config)) as tracker,
    ):
        log = RunLog(folder, [*listeners, tracker])
        name, rounds = config.method.name, config.federation.rounds
        log(Loading(0, name, rounds, config.seed))
        with (backend or InProcess())(config, folder.path) as connected:
            return train(config, folder, connected, log, callbacks)


def train(
    config: Config,
    folder: RunFolder,
    backend: Backend,
    log: RunLog,
    callbacks: Sequence[Callback] = (),
) -> RunResult:
    """Train the rounds of a run, from the last checkpoint in ``folder`` or from the beginning."""
    method = methods.build(config.method, config.seed)
    private = PrivateRun(config, folder.path) if config.privacy.of_clients else None
    server = Server(
        config,
        backend.transport,
        backend.spec,
        log,
        allocation=backend.allocation,
        planned_ranks=backend.planned_ranks,
        observe=diagnostics.observer(config),
        private=private,
        site_keys=backend.site_keys,
    )
    rounds, personal = config.federation.rounds, methods.trait(method, "personal")

    def measure() -> None:
        if config.evaluation.at_clients or personal:
            log(server.evaluate_clients(method, state))
        if not personal:
            log(evaluate(config, backend, server, method, state, log))

    with closing(server):
        state = _last_state(config, folder, backend, log)
        state = server.connect(method, state)
        check_ranks(config, backend.initial.rank)
        if private is not None:
            private.start(method, state, [connected.client for connected in server.clients])
        if state.round > 0 and config.privacy.of_examples and backend.rows is not None:
            check_ledgers(folder.path)
        if state.round == 0:
            if backend.rows is not None:
                _describe(backend.rows, folder.path)
            labels.write(folder.path, backend.labels)
            clients = len(server.clients)
            log(RunStarted(0, method.name, config.task, config.seed, rounds, clients, state.levels))
            log(evaluate(config, backend, server, method, state, log))
            _save(state, config, folder, backend, log)
        else:
            started = log.history.started
            if started is not None and started.rounds != rounds:  # it is extended
                log(replace(started, rounds=rounds))
            log(RunResumed(state.round))
        for server_round in range(state.round + 1, rounds + 1):
            if private is not None and private.exhausted:
                log(BudgetSpent(state.round, private.epsilon()))
                measure()
                break
            try:
                state, stats = server.train(method, state, server_round)
            except BudgetSpentError:
                log(BudgetSpent(state.round, log.history.epsilon or 0.0))
                measure()
                break
            log(RoundFinished(server_round, stats))
            due = _evaluation_due(config, server_round)
            if due:
                measure()
            _save(state, config, folder, backend, log)
            if end_run(callbacks, log.history):
                if not due:
                    measure()
                    _save(state, config, folder, backend, log)
                break
    if not personal:
        export(config, backend, global_adapters(config, method, state), folder, log.history)
    log(RunFinished(state.round))
    return RunResult(folder.path, method.global_adapter(state), log.history)


class RunLog:
    """Writes the run's events, adds them to the history and passes them to the listeners."""

    def __init__(self, folder: RunFolder, listeners: Sequence[Listener]) -> None:
        self.file = folder.events
        self.history = RunHistory()
        self._listeners = listeners

    def __call__(self, event: Event) -> None:
        """Record one event."""
        if event.logged:
            self.file.append(event)
        self.history.apply(event)
        for listener in self._listeners:
            listener(event)

    def restore(self, size: int) -> None:
        """Cut the log to the first ``size`` bytes, which precede the checkpoint.

        Listeners get the event of the run's start again.
        """
        self.file.truncate(size)
        self.history = RunHistory.of(self.file.read())
        if self.history.started is not None:
            for listener in self._listeners:
                listener(self.history.started)


def export(
    config: Config,
    backend: Backend,
    adapters: Mapping[int, LoraAdapter],
    folder: RunFolder,
    history: RunHistory,
) -> None:
    """Write each rank's adapter as a PEFT folder ``rank-N``, and check it where the model is."""
    exported = {folder.adapters / f"rank-{rank}": adapter for rank, adapter in adapters.items()}
    name = backend.template.base_model_name_or_path or config.model.name
    for path, adapter in exported.items():
        card = adapter_folder.model_card(config, history, name, adapter.rank)
        tokenizer = backend.tokenizer
        adapter_folder.write(path, adapter, backend.template, tokenizer, backend.labels, card)
    if backend.check_exported is not None:
        backend.check_exported(exported)


def _describe(rows: FederatedRows, folder: Path) -> None:
    """Write a table and a picture of the clients' data."""
    text = io.StringIO()
    Console(file=text, width=120).print(describe.summary(rows, rows.label_column))
    # Names come from the data: one line and no control characters for each.
    lines = [plain(line) for line in text.getvalue().split("\n")]
    (folder / "clients.txt").write_text("\n".join(lines), encoding="utf-8")
    describe.picture(rows, rows.label_column, folder / "clients.png")


def _evaluation_due(config: Config, server_round: int) -> bool:
    every = config.evaluation.every
    return server_round == config.federation.rounds or (every > 0 and server_round % every == 0)


def _last_state(config: Config, folder: RunFolder, backend: Backend, log: RunLog) -> ServerState:
    """The last checkpoint's state, with the log as it was then; or the initial state."""
    last = checkpoint.load_latest(folder.checkpoints, backend.spec.base)
    if last is None or last.state.round == 0:
        log.restore(0)  # the evaluation before the first round is repeated
        return ServerState(backend.initial) if last is None else last.state
    if last.seed != config.seed:
        raise CheckpointError(
            f"{str(folder.checkpoints)!r} has seed {last.seed}, not {config.seed}"
        )
    log.restore(last.metrics_bytes)
    return last.state


def _save(
    state: ServerState, config: Config, folder: RunFolder, backend: Backend, log: RunLog
) -> None:
    """Write a checkpoint with the length of the log, so that a resumed run repeats no line."""
    log.file.sync()
    checkpoint.save(
        Checkpoint(state, config.seed, backend.spec.base, log.file.size), folder.checkpoints
    )
    log(Checkpointed(state.round))


@contextmanager
def _claimed(folder: RunFolder, config: Config, *, resume: bool, patience: float) -> Iterator[None]:
    """Lock the folder for this process; a new run that is refused leaves nothing behind."""
    if resume:
        old = folder.read_config()
        _check_same(old, config, folder.path)
        folder.lock(patience)
        if old != config:
            folder.write_config(config)
    else:
        methods.find(config.method.name)
        folder.create(config, patience)
    try:
        yield
    except Exception as error:
        if not resume and not isinstance(error, QuorumError | OSError):
            folder.discard()  # unless it has a checkpoint
        raise
    finally:
        folder.unlock()


def _check_same(old: Config, new: Config, path: Path) -> None:
    """Raise `ConfigError` naming the keys in which a resumed run's configuration differs."""
    keys = configuration.conflicts(old, new)
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
