"""Reading a log that grows, is cut, or is not there yet."""

from __future__ import annotations

import json
import os

import pytest

from prelort.errors import PrelortError
from prelort.report.follow import Log, dated, follow


def line(**event):
    return json.dumps(event) + "\n"


def numbers(looked):
    return [event["n"] for event, _ in looked]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


def append(path, text):
    with path.open("a") as file:
        file.write(text)


def test_a_log_that_is_not_there_yet_has_no_events(path):
    log = Log(path)
    assert log.look(1.0) == ([], False)
    append(path, line(event="x", n=1))
    found, cut = log.look(1.0)
    assert numbers(found) == [1]
    assert not cut
    assert log.look(2.0) == ([], False)


def test_a_line_half_written_is_left_for_the_next_look(path):
    log, whole = Log(path), line(event="x", n=2, name="ä")
    append(path, line(event="x", n=1) + whole[:10])
    assert numbers(log.look(1.0)[0]) == [1]
    assert log.look(2.0) == ([], False)
    append(path, whole[10:-1])
    assert log.look(3.0) == ([], False)
    append(path, "\n")
    assert log.look(4.0) == ([({"event": "x", "n": 2, "name": "ä"}, 4.0)], False)


@pytest.mark.parametrize("grown", [0, 1, 200])
def test_a_log_that_was_cut_is_read_from_the_start(path, grown):
    log = Log(path)
    append(path, "".join(line(event="x", n=n) for n in range(100)))
    log.look(1.0)
    kept = len("".join(line(event="x", n=n) for n in range(50)))
    os.truncate(path, kept)
    append(path, "".join(line(event="x", n=1000 + n) for n in range(grown)))
    found, cut = log.look(2.0)
    assert cut
    assert numbers(found) == [*range(50), *range(1000, 1000 + grown)]
    append(path, line(event="x", n=7))
    assert numbers(log.look(3.0)[0]) == [7]


def test_a_log_that_is_gone_or_empty_was_cut_to_nothing(path):
    log = Log(path)
    append(path, line(event="x", n=1))
    log.look(1.0)
    path.unlink()
    assert log.look(2.0) == ([], True)
    append(path, line(event="x", n=2))
    found, cut = log.look(3.0)
    assert numbers(found) == [2]
    assert not cut
    os.truncate(path, 0)
    assert log.look(4.0) == ([], True)


def test_half_a_line_that_is_cut_off_is_no_cut(path):
    log = Log(path)
    append(path, line(event="x", n=1))
    size = path.stat().st_size
    append(path, '{"event"')
    log.look(1.0)
    os.truncate(path, size)
    assert log.look(2.0) == ([], False)


@pytest.mark.parametrize("bad", ["{]", "[1]", '{"round": 1}', "\udcff"])
def test_a_damaged_line_is_told_with_its_number(path, bad):
    log = Log(path)
    append(path, line(event="x", n=1))
    log.look(1.0)
    with path.open("ab") as file:
        file.write(bad.encode("utf-8", "surrogateescape") + b"\n")
    with pytest.raises(PrelortError, match="line 2, is not an event of a run"):
        log.look(2.0)


def test_a_log_that_cannot_be_read_is_told(tmp_path):
    with pytest.raises(PrelortError, match="cannot be read"):
        Log(tmp_path).look(1.0)


def test_the_past_is_dated_by_what_its_phases_took():
    log = [
        {"event": "run_started", "round": 0},
        {"event": "evaluated", "round": 0, "seconds": 5.0},
        {"event": "round_started", "round": 1},
        {"event": "client_finished", "round": 1, "seconds": 3.0},
        {"event": "aggregated", "round": 1, "seconds": {"total": 20.0}},
        {"event": "evaluated", "round": 1, "seconds": 10.0},
        {"event": "round_started", "round": 2},
        {"event": "client_finished", "round": 2, "seconds": 4.0},
        {"event": "client_finished", "round": 2, "seconds": 7.0},
    ]
    assert [when for _, when in dated(log, 100.0)] == [58, 63, 63, 63, 83, 93, 93, 100, 100]
    assert dated([], 1.0) == []
    odd = [{"event": "aggregated", "seconds": None}, {"event": "evaluated", "seconds": "x"}]
    assert [when for _, when in dated(odd, 1.0)] == [1.0, 1.0]


def test_the_first_look_goes_by_the_time_of_the_file(path):
    append(path, line(event="x", n=1))
    os.utime(path, (500.0, 500.0))
    assert Log(path).look(900.0)[0][0][1] == 500.0
    assert Log(path).look(400.0)[0][0][1] == 400.0  # another machine's clock


def test_several_runs_are_followed_one_after_the_other(tmp_path):
    paths = {"a": tmp_path / "a", "b": tmp_path / "b"}
    steps = [
        lambda: append(paths["a"], line(event="run_started", n=1)),
        lambda: append(paths["a"], line(event="run_finished", n=2)),
        lambda: append(paths["b"], line(event="run_started", n=3)),
        lambda: append(paths["b"], line(event="run_finished", n=4)),
    ]
    found = []
    for looks in follow(lambda: paths, lambda: 1.0, lambda _: steps.pop(0)()):
        found.append([(look.name, numbers(look.events), look.afresh) for look in looks])
    assert found == [
        [("a", [], True)],
        [("a", [1], False)],
        [("a", [2], False), ("b", [], True)],
        [("b", [3], False)],
        [("b", [4], False)],
    ]
