"""The files of a run, for comparisons."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from equality import equal
from prelort.events import (
    ClientFinished,
    ClientsEvaluated,
    Evaluated,
    Event,
    EventLog,
    RoundFinished,
    RoundSeconds,
)

NO_TIME = datetime(2026, 1, 1, tzinfo=UTC)


def files_of(folder: Path) -> dict[str, bytes]:
    """The bytes of every file but the lock, by its path inside the folder."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def adapters_of(run: Path) -> dict[str, bytes]:
    """The bytes of every adapter's files, by their path inside the run.

    Without the cards: they say what was measured, and sites measure on their own rows.
    """
    files = files_of(run / "adapters")
    return {f"adapters/{n}": data for n, data in files.items() if not n.endswith("README.md")}


def events_of(run: Path) -> list[Any]:
    """The written events, without the times that they took."""
    return [timeless(event) for event in EventLog(run / "metrics.jsonl").read()]


def timeless(event: Event) -> Event:
    """The event as it would be if nothing took time."""
    match event:
        case RoundFinished():
            event = replace(event, stats=replace(event.stats, seconds=RoundSeconds(0, 0, 0)))
        case ClientFinished() | Evaluated() | ClientsEvaluated():
            event = replace(event, seconds=0.0)
    return replace(event, time=NO_TIME)


def assert_same_run(run: Path, expected: Path) -> None:
    """Equal adapters, bit for bit, equal events, and checkpoints of the same rounds."""
    assert adapters_of(run).keys() == adapters_of(expected).keys()
    for name, data in adapters_of(expected).items():
        assert adapters_of(run)[name] == data, name
    found, wanted = events_of(run), events_of(expected)
    assert [type(event) for event in found] == [type(event) for event in wanted]
    for one, other in zip(found, wanted, strict=True):
        assert equal(one, other)
    checkpoints = [sorted(p.name for p in (r / "checkpoints").iterdir()) for r in (run, expected)]
    assert checkpoints[0] == checkpoints[1]
