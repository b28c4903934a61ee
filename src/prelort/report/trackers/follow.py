"""What all trackers have in common: which values of which round, none of them twice."""

from __future__ import annotations

import json
import logging
import statistics
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from prelort.errors import PrelortError
from prelort.files import write_atomically
from prelort.report.events import Event, read, settled

FILE = "trackers.json"
"""In a run's folder: tracker -> the id of the run there, and the last round that it was told."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TrackedRun:
    """A run as a tracker is told of it; ``params`` is the configuration by dotted keys."""

    folder: Path
    params: Mapping[str, Any]

    @property
    def name(self) -> str:
        """How it is called in the tracker: as its folder."""
        return self.folder.resolve().name


class Tracker(Protocol):
    """What one tracker's file has to offer. Whatever it raises, the run goes on without it."""

    def open(self, run: TrackedRun, known: str | None, first: int) -> str:
        """Begin a run, or go on with the one ``known``, from round ``first``; returns its id."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Take one round's values."""

    def close(self, finished: bool) -> None:
        """The run is over, or has stopped before its end."""


class Follower:
    """A listener that tells trackers about one run, a round at a time.

    A round is told when its checkpoint is written, and what the trackers have not been told is
    caught up on when the run is resumed, so that nothing is told twice. A tracker that raises is
    left alone from then on, with one warning.
    """

    def __init__(self, makers: Mapping[str, Callable[[], Tracker]], run: TrackedRun) -> None:
        self._makers = makers
        self._run = run
        self._open: dict[str, Tracker] = {}
        self._opened = False
        self._told: dict[str, dict[str, Any]] = {}
        self._rounds: dict[int, dict[str, float]] = {}
        self._finished = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for name, tracker in list(self._open.items()):
            with self._guarded(name):
                tracker.close(self._finished)
        self._open = {}

    def __call__(self, event: Event) -> None:
        """Take in one event of the run."""
        if not self._makers:
            return
        kind = event["event"]
        if kind == "run_started" and not self._opened:
            self._begin()
        elif kind == "resumed":
            self._catch_up(int(event["round"]))
        elif kind in ("checkpointed", "run_finished"):
            self._finished = kind == "run_finished"
            self._tell(int(event["round"]))
        else:
            self._take(event)

    def _take(self, event: Event) -> None:
        values = values_of(event)
        if values:
            self._rounds.setdefault(int(event["round"]), {}).update(values)

    def _begin(self) -> None:
        """Open the trackers: only now, since a run that is refused must leave nothing behind."""
        self._opened = True
        self._told = _told(self._run.folder)
        for name, make in self._makers.items():
            known = self._told.setdefault(name, {"id": None, "round": -1})
            with self._guarded(name):
                tracker = make()
                known["id"] = tracker.open(self._run, known["id"], known["round"] + 1)
                self._open[name] = tracker
        self._write()

    def _catch_up(self, back: int) -> None:
        """Tell the rounds that are done: trackers may lack some, or have been added just now."""
        try:
            written = settled(read(self._run.folder / "metrics.jsonl"))
        except PrelortError:
            written = []  # the run itself will say what is wrong with it
        for event in written:
            if event.get("round", 0) <= back:
                self._take(event)
        self._tell(back)

    def _tell(self, last: int) -> None:
        """Tell each tracker the rounds up to ``last`` that it does not know."""
        for number in sorted(n for n in self._rounds if n <= last):
            values = self._rounds.pop(number)
            for name, tracker in list(self._open.items()):
                told = self._told[name]
                if number <= told["round"]:
                    continue
                before, told["round"] = told["round"], number
                self._write()  # first: if the process dies now, a round lacks but none is double
                with self._guarded(name):
                    tracker.log(number, values)
                if name not in self._open:
                    told["round"] = before  # a later process catches up on it
                    self._write()

    @contextmanager
    def _guarded(self, name: str) -> Iterator[None]:
        """Whatever a tracker raises becomes a warning, and the tracker is off."""
        try:
            yield
        except Exception as error:
            log.warning("tracker %s", name, exc_info=True)
            self._open.pop(name, None)
            why = next(iter(str(error).strip().splitlines()), type(error).__name__)
            warnings.warn(f"--track {name} is off, the run goes on without it: {why}", stacklevel=1)

    def _write(self) -> None:
        data = json.dumps(self._told, indent=2).encode()
        try:
            write_atomically(self._run.folder / FILE, data)
        except OSError:
            log.warning("%s cannot be written", FILE, exc_info=True)


def values_of(event: Event) -> dict[str, float]:
    """What an event gives trackers, by name: ``train/loss``, ``perplexity/rank-4``, ``bytes/up``.

    Bytes are of the round, seconds too. Numbers that lack are left out.
    """
    return dict(_values(event))


def _values(event: Event) -> Iterator[tuple[str, float]]:
    kind = event["event"]
    if kind == "aggregated":
        names = {
            "train/loss": event.get("loss"),
            "bytes/up": event.get("bytes_up"),
            "bytes/down": event.get("bytes_down"),
            "clients/answered": event.get("replies"),
            "clients/failed": event.get("failed"),
            **{f"seconds/{phase}": s for phase, s in event.get("seconds", {}).items()},
        }
        yield from ((name, float(value)) for name, value in names.items() if value is not None)
    elif kind == "evaluated":
        rows = {f"rank-{rank}": row for rank, row in event.get("prefixes", {}).items()}
        for where, row in {"base": event.get("base") or {}, **rows}.items():
            for metric, value in row.items():
                if value is not None:
                    yield f"{metric}/{where}", float(value)
        yield "seconds/evaluate", float(event.get("seconds", 0.0))
    elif kind == "evaluated_at_clients":
        found: dict[str, list[float]] = {}
        for row in event.get("clients", {}).values():
            for metric, value in row["metrics"].items():
                if value is not None:
                    found.setdefault(metric, []).append(float(value))
        yield from ((f"{metric}/clients-mean", statistics.fmean(v)) for metric, v in found.items())
        yield "seconds/evaluate-at-clients", float(event.get("seconds", 0.0))


def _told(folder: Path) -> dict[str, dict[str, Any]]:
    """What the trackers were told by an earlier process; nothing where the file is damaged."""
    try:
        found = json.loads((folder / FILE).read_bytes())
        return {
            str(name): {"id": known["id"], "round": int(known["round"])}
            for name, known in found.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
