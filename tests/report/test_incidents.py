"""Incidents in words: grouped, shortened, and safe for a terminal."""

from datetime import timedelta

from histories import HOSTILE, START, run_history, troubled_events
from prelort.events import ClientFailed, ClientRefused, RoundFinished, RunResumed, Waiting
from prelort.history import RunHistory
from prelort.report.incidents import incidents, lines, waits_for


def test_the_same_incident_in_several_rounds_is_one():
    found = incidents(RunHistory.of(troubled_events()).incidents)
    by_client = {(one.what, one.client): one for one in found}
    hostile = by_client["failed", HOSTILE]
    assert hostile.when == "1–3"
    assert hostile.loss
    assert len(hostile.reason) < 450
    assert "\x1b" not in hostile.reason
    assert by_client["failed", "clinic-south"].reason == "did not answer"
    assert by_client["refused", "old-site"].when == "0"
    assert by_client["rank changed", "clinic-north"].reason.startswith("from rank 2 to 4: the")
    assert not by_client["rank changed", "clinic-north"].loss
    assert by_client["not evaluated", "clinic-south"].rounds == [1, 2, 3]
    assert by_client["no diagnostics", ""].reason == "no memory"
    assert by_client["joined", "late-comer"].reason == "with rank 4"
    assert ("left", "clinic-south") in by_client
    assert by_client["repeated", ""].reason == "attempt 2: too few replies"
    assert by_client["waiting", ""].reason.startswith("1 more client until ")
    assert [one.rounds[0] for one in found] == sorted(one.rounds[0] for one in found)


def test_a_quiet_run_has_none():
    assert incidents(run_history().incidents) == []


def test_lines_for_a_terminal():
    events = [
        ClientFailed(3, "a\x1b[2J", 4, "timed\nout", time=START),
        ClientRefused(0, "b", "has another base model", time=START),
        RunResumed(5, time=START),
        Waiting(2, ("a",), ("b", "c"), 3, START + timedelta(minutes=5), time=START),
    ]
    texts = [line for event in events for line in lines(event)]
    assert texts[0] == "round 3: a [2J failed: timed out"
    assert texts[1] == "round 0: b refused: has another base model"
    assert texts[2] == "round 5: resumed: from the checkpoint after round 5"
    assert texts[3].startswith("round 2: waiting: 2 more clients until ")
    assert texts[3].endswith("(missing: b, c)")


def test_other_events_have_no_lines():
    finished = next(e for e in troubled_events() if isinstance(e, RoundFinished))
    assert list(lines(finished)) == ["round 1: no diagnostics: no memory"]
    assert [line for event in troubled_events()[:2] for line in lines(event)] == [
        "round 0: old-site refused: has another base model"
    ]


def test_one_missing_client_is_singular():
    waiting = Waiting(1, ("a",), (), 2, START, time=START)
    assert waits_for(waiting).startswith("1 more client until ")
