"""Reading a log that grows, is truncated, or does not exist yet."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from histories import run_events
from prelort.errors import PrelortError
from prelort.events import Event, encode
from prelort.history import RunHistory
from prelort.report.follow import LogFollower

EVENTS = run_events(rounds=20)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def text(events: list[Event]) -> bytes:
    return "".join(encode(event) + "\n" for event in events).encode()


def append(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)


def test_a_log_is_followed_from_before_its_first_event(path: Path) -> None:
    follower = LogFollower(path)
    assert not follower.poll().events
    for number in range(3):
        append(path, text(EVENTS[number : number + 1]))
        new = follower.poll()
        assert (list(new.events), new.truncated) == (EVENTS[number : number + 1], False)
        assert not follower.poll().events
    assert follower.history == RunHistory.of(EVENTS[:3])


def test_an_unfinished_line_is_left_for_the_next_poll(path: Path) -> None:
    follower, line = LogFollower(path), text(EVENTS[1:2])
    append(path, text(EVENTS[:1]) + line[:10])
    assert list(follower.poll().events) == EVENTS[:1]
    append(path, line[10:-1])
    assert not follower.poll().events
    append(path, b"\n")
    assert list(follower.poll().events) == EVENTS[1:2]


@pytest.mark.parametrize("kept", [0, 1, 50])
@pytest.mark.parametrize("grown", [0, 1, 90])
def test_a_truncated_log_is_read_again(path: Path, kept: int, grown: int) -> None:
    """It may have grown beyond its old length by then."""
    follower, other = LogFollower(path), run_events(rounds=20, seed=7)
    append(path, text(EVENTS[:100]))
    follower.poll()
    os.truncate(path, len(text(EVENTS[:kept])))
    append(path, text(other[kept : kept + grown]))
    expected = [*EVENTS[:kept], *other[kept : kept + grown]]
    new = follower.poll()
    if kept + grown == 140 and expected[:100] == EVENTS[:100]:  # the same bytes again
        assert not new.truncated
    else:
        assert (list(new.events), new.truncated) == (expected, True)
    assert follower.history == RunHistory.of(expected)
    append(path, text(EVENTS[-1:]))
    assert list(follower.poll().events) == EVENTS[-1:]


def test_a_log_that_is_deleted_was_truncated_to_nothing(path: Path) -> None:
    follower = LogFollower(path)
    append(path, text(EVENTS[:5]))
    follower.poll()
    path.unlink()
    new = follower.poll()
    assert (list(new.events), new.truncated, follower.history) == ([], True, RunHistory())
    append(path, text(EVENTS[:2]))
    assert list(follower.poll().events) == EVENTS[:2]


def test_half_a_line_that_is_cut_off_is_no_truncation(path: Path) -> None:
    follower = LogFollower(path)
    append(path, text(EVENTS[:2]) + b'{"event"')
    follower.poll()
    os.truncate(path, len(text(EVENTS[:2])))
    assert not follower.poll().truncated


@pytest.mark.parametrize("bad", [b"{]", b"[1]", b'{"round": 1}', b"\xff", b""])
def test_a_damaged_line_is_named(path: Path, bad: bytes) -> None:
    follower = LogFollower(path)
    append(path, text(EVENTS[:1]))
    follower.poll()
    append(path, bad + b"\n")
    with pytest.raises(PrelortError, match="line 2, is not an event"):
        follower.poll()


def test_a_log_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(PrelortError, match="cannot be read"):
        LogFollower(tmp_path).poll()
