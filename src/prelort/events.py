"""The events of a run: what happened and when. ``metrics.jsonl`` has one of them a line.

A line is a JSON object with the event's name (``round_started``), its round, its time (UTC) and
its own fields. Numbers that are not finite are the strings "NaN", "Infinity" and "-Infinity".
Events with ``logged = False`` say what a run is doing at the moment: they go to listeners, not to
the log.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

from prelort.errors import CheckpointError, PrelortError

TAIL_BYTES = 1024
"""Bytes at the end of what was read that are compared, to notice a truncated log."""

Metrics = dict[str, float]
"""Metric name -> value (loss in nats, accuracy and macro_f1 in 0..1, rouge_l in 0..100)."""


def utc_now() -> datetime:
    """The time, to the millisecond."""
    now = datetime.now(UTC)
    return now.replace(microsecond=now.microsecond // 1000 * 1000)


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened in a run. ``round`` counts from 1; 0 is before the first."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(
        ser_json_inf_nan="strings", extra="forbid"
    )
    logged: ClassVar[bool] = True

    round: int
    time: datetime = field(default_factory=utc_now, kw_only=True)


Listener = Callable[[Event], None]
"""Called with each event of a run, after a logged one has been written."""


@dataclass(frozen=True, slots=True)
class RunStarted(Event):
    """The clients are known. ``levels``: the distinct ranks in use, rising."""

    method: str
    task: str
    seed: int
    rounds: int
    clients: int
    levels: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class RoundStarted(Event):
    """``clients``: the names of those sampled to train."""

    clients: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Transferring(Event):
    """A message to ("down") or from ("up") a client has been on its way for a while.

    ``bytes``: of it so far, between the server and the SuperLink; ``share``: of its parts.
    """

    client: str
    direction: Literal["down", "up"]
    bytes: int
    share: float


@dataclass(frozen=True, slots=True)
class ClientFinished(Event):
    """A reply counts. ``passes``: forward passes of a batch, each with its backward pass.

    ``rank``, here and below: None where ranks are hidden.
    """

    client: str
    rank: int | None
    loss: float
    examples: int
    steps: int
    passes: int
    seconds: float
    bytes_up: int
    validation_loss: float | None = None


@dataclass(frozen=True, slots=True)
class ClientFailed(Event):
    """A sampled client gave no usable reply."""

    client: str
    rank: int | None
    reason: str


@dataclass(frozen=True, slots=True)
class RankChanged(Event):
    """From the next round on the client trains at another rank."""

    client: str
    old_rank: int
    new_rank: int
    reason: str


@dataclass(frozen=True, slots=True)
class RoundSeconds:
    """Wall seconds of a round; ``train`` includes sending and receiving."""

    train: float
    aggregate: float
    diagnose: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.train + self.aggregate + self.diagnose


@dataclass(frozen=True, slots=True)
class RoundStats:
    """A round's totals. ``loss``: the clients' mean training loss, weighted by examples."""

    replies: int
    failures: int
    loss: float
    bytes_up: int
    bytes_down: int
    seconds: RoundSeconds
    diagnostics: dict[str, Any] | None = None
    """See docs/diagnostics.md; ``{"failed": reason}`` where they could not be computed."""
    epsilon: float | None = None
    """Of differential privacy, spent so far: by any client of the round, if it is of examples."""


@dataclass(frozen=True, slots=True)
class RoundFinished(Event):
    """The replies are aggregated."""

    stats: RoundStats


@dataclass(frozen=True, slots=True)
class ClientSample:
    """The number of clients and test examples behind a measured value."""

    clients: int
    examples: int


@dataclass(frozen=True, slots=True)
class Evaluated(Event):
    """The global adapter was measured: rank -> metrics; ``base``: the untuned base model.

    ``samples``: rank (0: the base) -> who measured, where the clients did and not the server.
    """

    prefixes: dict[int, Metrics]
    seconds: float
    base: Metrics | None = None
    samples: dict[int, ClientSample] | None = None


@dataclass(frozen=True, slots=True)
class ClientMetrics:
    """What one client measured at its rank on its own test examples."""

    rank: int
    examples: int
    metrics: Metrics


@dataclass(frozen=True, slots=True)
class ClientsEvaluated(Event):
    """Every client measured what it would receive now. ``failures``: client -> reason."""

    clients: dict[str, ClientMetrics]
    failures: dict[str, str]
    seconds: float


@dataclass(frozen=True, slots=True)
class EvaluationFailed(Event):
    """A client could not measure the adapter of this rank (0: the base model)."""

    client: str
    rank: int
    reason: str


@dataclass(frozen=True, slots=True)
class ClientRefused(Event):
    """A client cannot take part."""

    client: str
    reason: str


@dataclass(frozen=True, slots=True)
class ClientJoined(Event):
    """A client has connected, or is back with another rank."""

    client: str
    rank: int | None


@dataclass(frozen=True, slots=True)
class ClientLeft(Event):
    """A client is no longer connected."""

    client: str


@dataclass(frozen=True, slots=True)
class RanksUncovered(Event):
    """Too few clients hold the rank dimensions low < j <= high for the rule of [robustness].

    ``holders``: in a round, on average. ``treatment``: "freeze" or "clip".
    """

    low: int
    high: int
    holders: float
    needed: int
    treatment: str


@dataclass(frozen=True, slots=True)
class Waiting(Event):
    """Too few clients are connected for the round: the run waits ``until`` then."""

    connected: tuple[str, ...]
    missing: tuple[str, ...]
    needed: int
    until: datetime


@dataclass(frozen=True, slots=True)
class RoundRepeated(Event):
    """The round had too few usable replies and is tried again; ``attempt`` counts from 1."""

    attempt: int
    reason: str


@dataclass(frozen=True, slots=True)
class BudgetSpent(Event):
    """The privacy budget allows no further round: the run ends with what it has."""

    epsilon: float


@dataclass(frozen=True, slots=True)
class DimensionsLeftOut(Event):
    """Rank dimensions (from 1) that too few clients of the round hold for secure aggregation."""

    dimensions: tuple[int, ...]
    min_holders: int


@dataclass(frozen=True, slots=True)
class RunFinished(Event):
    """All rounds are done and the adapters are written."""


@dataclass(frozen=True, slots=True)
class Loading(Event):
    """The model and the data are being loaded."""

    logged: ClassVar[bool] = False

    method: str
    rounds: int
    seed: int


@dataclass(frozen=True, slots=True)
class RunResumed(Event):
    """A run continues from the checkpoint after this round."""

    logged: ClassVar[bool] = False


@dataclass(frozen=True, slots=True)
class Evaluating(Event):
    """An evaluation is under way: ``done`` of ``total`` steps."""

    logged: ClassVar[bool] = False

    done: int
    total: int


@dataclass(frozen=True, slots=True)
class Checkpointed(Event):
    """The state is written: the run can continue from here."""

    logged: ClassVar[bool] = False


def name_of(kind: type[Event]) -> str:
    """The event's name in the log: ``RoundStarted`` is ``round_started``."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", kind.__name__).lower()


# `dataclass(slots=True)` creates a second class; the original is listed too, before it.
KINDS: dict[str, type[Event]] = {name_of(kind): kind for kind in Event.__subclasses__()}
"""The kinds of events by name."""
_ADAPTERS = {name: TypeAdapter(kind) for name, kind in KINDS.items()}


def encode(event: Event) -> str:
    """The event as one line of JSON, without the newline."""
    name = name_of(type(event))
    fields = _ADAPTERS[name].dump_json(event).decode()
    return f'{{"event":"{name}",{fields[1:]}'


def decode(line: str | bytes) -> Event:
    """The event of one line. Raises `ValueError` where it is not an event."""
    try:
        values = json.loads(line)
        adapter = _ADAPTERS.get(str(values.pop("event", ""))) if isinstance(values, dict) else None
        if adapter is None:
            raise ValueError("not an event")
        return adapter.validate_python(values)
    except (ValidationError, RecursionError) as error:
        raise ValueError(str(error)) from None


class EventLog:
    """The events of a run in a file: appended one by one, each flushed, and read while it grows."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, event: Event) -> None:
        """Write one event."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(encode(event) + "\n")

    @property
    def size(self) -> int:
        """Bytes written so far."""
        return self.path.stat().st_size if self.path.exists() else 0

    def sync(self) -> None:
        """Wait until what was written is on the disk."""
        if self.path.exists():
            with self.path.open("rb") as file:
                os.fsync(file.fileno())

    def truncate(self, size: int) -> None:
        """Cut the log to its first ``size`` bytes; the rounds after them are run again.

        Raises `CheckpointError` if the file is shorter: events are missing then.
        """
        if self.size < size:
            raise CheckpointError(
                f"{str(self.path)!r} has {self.size} bytes, but its checkpoint was written after "
                f"{size}: events are missing. Restore the file, or delete the run's folder and "
                "start it again"
            )
        if self.size > size:
            with self.path.open("r+b") as file:
                file.truncate(size)

    def read(self) -> list[Event]:
        """All events, in the order written; none where there is no file.

        A last line without an end, as a killed run leaves it, is ignored. Raises `PrelortError`
        for any other line that is not an event, and where the file cannot be read.
        """
        return list(self._events(self._bytes()))

    def follow(self) -> Iterator[tuple[list[Event], bool]]:
        """Read the log while it grows: at each step the new events, and whether it was truncated.

        After a truncation, by a resumed run, all events are new. An unfinished last line waits for
        the next step. Raises `PrelortError` as `read`.
        """
        position, before, lines = 0, b"", 0
        while True:
            data = self._bytes(position - len(before))
            truncated = not data.startswith(before)  # whatever its length is by now
            if truncated:
                position, before, lines = 0, b"", 0
                data = self._bytes()
            new = data[len(before) : data.rfind(b"\n") + 1]
            yield list(self._events(new, lines)), truncated
            position, lines = position + len(new), lines + new.count(b"\n")
            before = (before + new)[-TAIL_BYTES:]

    def _bytes(self, start: int = 0) -> bytes:
        try:
            with self.path.open("rb") as file:
                file.seek(start)
                return file.read()
        except FileNotFoundError:
            return b""
        except OSError as error:
            raise PrelortError(
                f"metrics file {str(self.path)!r} cannot be read: {error.strerror}"
            ) from None

    def _events(self, data: bytes, lines: int = 0) -> Iterator[Event]:
        """The events of whole lines that follow the first ``lines``."""
        for number, line in enumerate(data.split(b"\n")[:-1], start=lines + 1):
            try:
                yield decode(line)
            except ValueError:  # also what bad JSON and bad UTF-8 raise
                raise PrelortError(
                    f"{str(self.path)!r}, line {number}, is not an event of a run"
                ) from None
