"""Experiment trackers: those of `accelerate.tracking`, each round logged exactly once.

A round is logged after its checkpoint. ``trackers.json`` in the run's folder keeps each tracker's
run id and last round, so that a resumed run continues the same tracked run; rounds that a tracker
lacks, since it failed or was added later, are logged then.
"""

from __future__ import annotations

import json
import logging
import math
import os
import statistics
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import attrgetter, methodcaller
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from prelort.errors import ConfigError, PrelortError
from prelort.events import (
    Checkpointed,
    ClientsEvaluated,
    Evaluated,
    Event,
    EventLog,
    RoundFinished,
    RunFinished,
    RunResumed,
    RunStarted,
)
from prelort.files import write_atomically

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

FILE = "trackers.json"
PROJECT = "prelort"

log = logging.getLogger(__name__)


def check(names: Iterable[str]) -> None:
    """Raise `ConfigError` for a tracker that is unknown or not installed."""
    for name in names:
        known, installed = _trackers()
        here = f"installed here: {', '.join(installed) or 'none'}"
        if name not in known:
            raise ConfigError(
                f"--track {name!r} is unknown: choose from {', '.join(known)} ({here})"
            )
        if name not in installed:
            raise ConfigError(f"--track {name} needs a package that is not installed ({here})")


class Tracking:
    """A listener that logs one run's rounds to trackers. Use it as a context manager.

    A tracker that raises is switched off with one warning; the run continues.
    """

    def __init__(self, names: Sequence[str], folder: Path, config: Mapping[str, Any]) -> None:
        """``names``: as in `check`; ``config``: the run's configuration by dotted keys."""
        self._names = list(dict.fromkeys(names))
        self._folder = folder
        self._config = {
            key: value if isinstance(value, bool | int | float | str) else str(value)
            for key, value in config.items()
        }
        self._open: dict[str, GeneralTracker] = {}
        self._logged: dict[str, dict[str, Any]] = {}
        self._rounds: dict[int, dict[str, float]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for name, tracker in list(self._open.items()):
            with self._guarded(name):
                tracker.finish()
        self._open = {}

    def __call__(self, event: Event) -> None:
        """Collect an event's values, and log them when the round is saved."""
        match event:
            case RunStarted():
                self._start()
            case RunResumed():
                self._catch_up(event.round)
            case Checkpointed() | RunFinished():
                self._log_until(event.round)
            case _:
                self._collect(event)

    def _collect(self, event: Event) -> None:
        if values := values_of(event):
            self._rounds.setdefault(event.round, {}).update(values)

    def _start(self) -> None:
        """Open the trackers; not before, since a refused run must leave nothing behind."""
        self._logged = _read(self._folder)
        for name in self._names:
            state = self._logged.setdefault(name, {"id": None, "round": -1})
            with self._guarded(name):
                new = state["id"] is None
                tracker, state["id"] = _open(name, self._folder, state["id"], state["round"] + 1)
                self._open[name] = tracker
                if new:
                    tracker.store_init_configuration(dict(self._config))
        if self._names:
            self._write()

    def _catch_up(self, last: int) -> None:
        try:
            events = EventLog(self._folder / "metrics.jsonl").read()
        except PrelortError:
            return  # the run itself reports a damaged log
        for event in events:
            if event.round <= last:
                self._collect(event)
        self._log_until(last)

    def _log_until(self, last: int) -> None:
        """Log the rounds up to ``last`` to each tracker that does not have them."""
        for number in sorted(n for n in self._rounds if n <= last):
            values = self._rounds.pop(number)
            for name, tracker in list(self._open.items()):
                state = self._logged[name]
                if number <= state["round"]:
                    continue
                before, state["round"] = state["round"], number
                self._write()  # first: a process that dies now loses a round but doubles none
                with self._guarded(name):
                    tracker.log(values, step=number)
                if name not in self._open:
                    state["round"] = before  # a later process catches up
                    self._write()

    @contextmanager
    def _guarded(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            log.warning("tracker %s", name, exc_info=True)
            self._open.pop(name, None)
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            warnings.warn(
                f"tracker {name} is off and the run continues without it: {reason}", stacklevel=1
            )

    def _write(self) -> None:
        try:
            write_atomically(self._folder / FILE, json.dumps(self._logged, indent=2).encode())
        except OSError:
            log.warning("%s cannot be written", FILE, exc_info=True)


def values_of(event: Event) -> dict[str, float]:
    """An event's values by name: ``train/loss``, ``perplexity/rank-4``, ``bytes/up``.

    Bytes and seconds are the round's. Numbers that are not finite are left out.
    """
    return {name: value for name, value in _values(event) if math.isfinite(value)}


def _values(event: Event) -> Iterator[tuple[str, float]]:
    match event:
        case RoundFinished(stats=stats):
            yield "train/loss", stats.loss
            yield "bytes/up", float(stats.bytes_up)
            yield "bytes/down", float(stats.bytes_down)
            yield "clients/answered", float(stats.replies)
            yield "clients/failed", float(stats.failures)
            for phase in ("train", "aggregate", "diagnose", "total"):
                yield f"seconds/{phase}", getattr(stats.seconds, phase)
        case Evaluated():
            rows = {f"rank-{rank}": metrics for rank, metrics in event.prefixes.items()}
            for row, metrics in {"base": event.base or {}, **rows}.items():
                yield from ((f"{metric}/{row}", value) for metric, value in metrics.items())
            yield "seconds/evaluate", event.seconds
        case ClientsEvaluated():
            by_metric: dict[str, list[float]] = {}
            for client in event.clients.values():
                for metric, value in client.metrics.items():
                    by_metric.setdefault(metric, []).append(value)
            for metric, values in by_metric.items():
                yield f"{metric}/clients-mean", statistics.fmean(values)
            yield "seconds/evaluate-at-clients", event.seconds


def _trackers() -> tuple[list[str], list[str]]:
    """The trackers that accelerate knows, and those whose library is installed."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
    from accelerate.utils import LoggerType

    installed = {str(name) for name in get_available_trackers()}
    known = sorted(map(str, LOGGER_TYPE_TO_CLASS))
    # Classes registered with accelerate by the user need no library that it could look for.
    return known, [name for name in known if name in installed or name not in LoggerType.list()]


def _open(name: str, folder: Path, run: str | None, first: int) -> tuple[GeneralTracker, str]:
    """A tracker that is started, continuing ``run`` at round ``first``, and the id of its run."""
    from accelerate.state import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState()  # accelerate's logging needs it
    kind = LOGGER_TYPE_TO_CLASS[name]
    place = {"logging_dir": folder} if kind.requires_logging_directory else {}
    tracker = kind(**_options(name, folder, run, first), **place)
    tracker.start()
    return tracker, RUN_IDS.get(name, lambda _: name)(tracker.tracker)


def _options(name: str, folder: Path, run: str | None, first: int) -> dict[str, Any]:
    """The arguments of a tracker's constructor, with which it continues ``run`` if there is one."""
    title, resume = folder.resolve().name, "allow" if run else None
    match name:
        case "tensorboard":
            return {"run_name": "tensorboard", "purge_step": first if run else None}
        case "mlflow":
            # A server that does not answer then delays the run by seconds, not by minutes.
            os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
            return {"experiment_name": PROJECT, "run_name": title, "run_id": run}
        case "wandb":
            import wandb

            return {
                "run_name": os.environ.get("WANDB_PROJECT", PROJECT),
                "name": title,
                "id": run,
                "resume": resume,
                "dir": os.environ.get("WANDB_DIR", str(folder)),
                "reinit": "finish_previous",
                "settings": wandb.Settings(console="off", silent=True),  # the display is ours
            }
        case "dvclive":
            files = {"dvcyaml": False, "save_dvc_exp": False}
            return {"dir": str(folder / "dvclive"), "resume": run is not None, **files}
        case "aim":
            return {"run_name": title, "run_hash": run}
        case "swanlab":
            place = {"log_dir": str(folder / "swanlab"), "id": run}
            return {"run_name": PROJECT, "name": title, "resume": resume, **place}
        case "trackio":
            return {"run_name": PROJECT, "name": run or title, "resume": "allow"}
        case "comet_ml":
            return {"run_name": PROJECT, "experiment_key": run}
        case "clearml":
            return {
                "project_name": os.environ.get("CLEARML_PROJECT", PROJECT),
                "task_name": os.environ.get("CLEARML_TASK", title),
                "continue_last_task": run or False,
                "reuse_last_task_id": False,
            }
    return {"run_name": title}


_ID = attrgetter("id")
RUN_IDS: dict[str, Callable[[Any], str]] = {
    "wandb": _ID,
    "clearml": _ID,
    "swanlab": _ID,
    "mlflow": attrgetter("info.run_id"),
    "comet_ml": methodcaller("get_key"),
    "aim": attrgetter("hash"),
    "trackio": attrgetter("name"),
}
"""Tracker -> the id of the run, from the tracker's own object."""


def _read(folder: Path) -> dict[str, dict[str, Any]]:
    """The state that earlier processes wrote; empty if the file is damaged."""
    try:
        states = json.loads((folder / FILE).read_bytes())
        return {
            str(name): {"id": state["id"], "round": int(state["round"])}
            for name, state in states.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return {}
