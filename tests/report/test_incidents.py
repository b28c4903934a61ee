"""Incidents in words: grouped, shortened, and safe for a terminal."""

from datetime import timedelta

from histories import HOSTILE, START, troubled_events
from prelort.events import ClientFailed, ClientRefused, RunResumed, Waiting
from prelort.history import RunHistory
from prelort.report.incidents import incidents, lines


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
