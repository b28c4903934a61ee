"""Events as lines of JSON, and the file that they stand in."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from equality import equal
from histories import run_events
from prelort.errors import CheckpointError, PrelortError
from prelort.events import (
    KINDS,
    Event,
    EventLog,
    RankChanged,
    RoundFinished,
    RoundStarted,
    RoundStats,
    RunFinished,
    Waiting,
    decode,
    encode,
)

times = st.integers(0, 4 * 10**12).map(lambda ms: datetime.fromtimestamp(ms / 1000, UTC))
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(-1e9, 1e9) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


def any_event(kind: type[Event]) -> st.SearchStrategy[Event]:
    """Events of a kind with any values that its types allow."""
    special: dict[str, st.SearchStrategy[Any]] = {"time": times}
    if kind is Waiting:
        special["until"] = times
    if kind is RoundFinished:
        diagnostics = st.none() | st.dictionaries(st.text(), json_values, max_size=3)
        special["stats"] = st.builds(RoundStats, diagnostics=diagnostics)
    return st.builds(kind, **special)


any_events = st.sampled_from(list(KINDS.values())).flatmap(any_event)


@settings(deadline=None)
@given(any_events)
def test_every_event_is_read_as_it_was_written(event: Event) -> None:
    line = encode(event)
    assert "\n" not in line
    json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert equal(decode(line), event)


def test_a_line_has_the_events_name_its_round_and_the_time() -> None:
    time = datetime(2026, 1, 2, 3, 4, 5, 678000, UTC)
    line = json.loads(encode(RankChanged(2, "a", 4, 8, "the client's offer", time=time)))
    assert line == {
        "event": "rank_changed",
        "round": 2,
        "time": "2026-01-02T03:04:05.678000Z",
        "client": "a",
        "old_rank": 4,
        "new_rank": 8,
        "reason": "the client's offer",
    }


@pytest.mark.parametrize(
    "line",
    [
        "",
        "{",
        "[]",
        "3",
        "null",
        "{}",
        '{"event": "run_finished"}',
        '{"event": "of_another_version", "round": 1, "time": "2026-01-01T00:00:00Z"}',
        '{"event": "run_finished", "round": "one", "time": "2026-01-01T00:00:00Z"}',
        '{"event": "run_finished", "round": 1, "time": "yesterday"}',
        '{"event": "run_finished", "round": 1, "time": "2026-01-01T00:00:00Z", "surplus": 1}',
        b"\xff\xfe",
    ],
)
def test_what_is_no_event_is_refused(line: str | bytes) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        decode(line)


class TestLog:
    @pytest.fixture
    def log(self, tmp_path: Path) -> EventLog:
        return EventLog(tmp_path / "metrics.jsonl")

    def test_one_line_an_event_written_at_once(self, log: EventLog) -> None:
        assert (log.size, log.read()) == (0, [])
        given = [RoundStarted(1, ("é\n", "b")), RunFinished(1)]
        for count, event in enumerate(given, start=1):
            log.append(event)
            assert log.read() == given[:count]
            assert log.size == len(log.path.read_bytes())
            assert log.path.read_bytes().count(b"\n") == count

    def test_what_is_truncated_is_forgotten(self, log: EventLog) -> None:
        log.truncate(0)
        log.append(RoundStarted(1, ("a",)))
        size = log.size
        log.append(RunFinished(1))
        log.truncate(size)
        with pytest.raises(CheckpointError, match="events are missing"):
            log.truncate(size + 100)
        assert [type(event) for event in log.read()] == [RoundStarted]
        log.truncate(0)
        assert log.size == 0

    def test_an_unfinished_last_line_is_ignored_wherever_it_was_cut(self, log: EventLog) -> None:
        first, second = RoundStarted(1, ("é",)), RunFinished(1)
        whole = encode(first).encode() + b"\n" + encode(second).encode()
        for end in range(len(whole) + 1):
            log.path.write_bytes(whole[:end])
            assert log.read() == ([first] if b"\n" in whole[:end] else [])

    @pytest.mark.parametrize("damage", [b"{", b"", b"\xff", b'{"event": "surprise"}', b"null"])
    @pytest.mark.parametrize("number", [1, 2, 3])
    def test_another_damaged_line_is_refused_by_its_number(
        self, log: EventLog, damage: bytes, number: int
    ) -> None:
        lines = [encode(RunFinished(i)).encode() for i in range(3)]
        lines[number - 1] = damage
        log.path.write_bytes(b"\n".join(lines) + b"\n")
        with pytest.raises(PrelortError, match=rf"metrics\.jsonl', line {number}, is not an event"):
            log.read()

    def test_a_file_that_cannot_be_read_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(PrelortError, match="cannot be read"):
            EventLog(tmp_path).read()


class TestFollow:
    EVENTS = run_events(rounds=20)

    @pytest.fixture
    def log(self, tmp_path: Path) -> EventLog:
        return EventLog(tmp_path / "metrics.jsonl")

    def append(self, log: EventLog, new: list[Event], more: bytes = b"") -> None:
        with log.path.open("ab") as file:
            file.write("".join(encode(event) + "\n" for event in new).encode() + more)

    def test_a_log_from_before_its_first_event(self, log: EventLog) -> None:
        following = log.follow()
        assert next(following) == ([], False)
        for number in range(3):
            new = self.EVENTS[number : number + 1]
            self.append(log, new)
            assert next(following) == (new, False)
            assert next(following) == ([], False)

    def test_an_unfinished_line_waits_for_its_end_and_may_vanish(self, log: EventLog) -> None:
        following, line = log.follow(), encode(self.EVENTS[1]).encode()
        self.append(log, self.EVENTS[:1], line[:10])
        assert next(following) == (self.EVENTS[:1], False)
        self.append(log, [], line[10:])
        assert next(following) == ([], False)
        self.append(log, [], b"\n{")
        assert next(following) == (self.EVENTS[1:2], False)
        log.truncate(log.size - 1)
        assert next(following) == ([], False)

    @pytest.mark.parametrize("kept", [0, 1, 50])
    @pytest.mark.parametrize("grown", [0, 1, 90])
    def test_a_truncated_log_is_read_again(self, log: EventLog, kept: int, grown: int) -> None:
        """It may have grown beyond its old length by then."""
        other = run_events(rounds=20, seed=7, loss=lambda *_: 1.25)
        following = log.follow()
        self.append(log, self.EVENTS[:100])
        next(following)
        log.path.unlink()
        again = [*self.EVENTS[:kept], *other[kept : kept + grown]]
        self.append(log, again)
        assert next(following) == (again, True)
        self.append(log, self.EVENTS[-1:])
        assert next(following) == (self.EVENTS[-1:], False)

    def test_a_deleted_log_was_truncated_to_nothing(self, log: EventLog) -> None:
        following = log.follow()
        self.append(log, self.EVENTS[:5])
        next(following)
        log.path.unlink()
        assert next(following) == ([], True)
