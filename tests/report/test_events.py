import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prelort.errors import PrelortError
from prelort.report.events import (
    Totals,
    base_row,
    evaluations,
    final_evaluation,
    metrics_of,
    phases,
    read,
    settled,
    shortfall,
    totals,
    train_losses,
)


def written(path, events, tail=""):
    path.write_text("".join(json.dumps(e) + "\n" for e in events) + tail, encoding="utf-8")
    return path


def test_reads_what_was_written(tmp_path, make_run):
    events = make_run("prelort", {2: 27.0, 16: 21.0})
    assert read(written(tmp_path / "metrics.jsonl", events)) == events
    assert read(str(written(tmp_path / "metrics.jsonl", []))) == []


def test_a_file_cut_anywhere_gives_the_whole_lines_before_the_cut(tmp_path):
    events = [
        {"event": "run_started", "method": "prélort"},
        {"event": "checkpointed", "round": 1},
        {"event": "checkpointed", "round": 2},
    ]
    data = "".join(json.dumps(e, ensure_ascii=False) + "\n" for e in events).encode()
    ends = [0, *(i + 1 for i, byte in enumerate(data) if byte == 10)]
    path = tmp_path / "metrics.jsonl"
    for cut in range(len(data) + 1):
        path.write_bytes(data[:cut])
        # A line that is whole but for its newline has lost nothing.
        whole = sum(end <= cut for end in ends) - 1 + (cut + 1 in ends)
        assert read(path) == events[:whole], cut


@pytest.mark.parametrize("line", ['{"event": "chec', "[1]", '{"round": 1}', "\udc80"])
def test_damage_elsewhere_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(
        f'{{"event": "x"}}\n{line}\n{{"event": "y"}}\n'.encode(errors="surrogateescape")
    )
    with pytest.raises(PrelortError, match="line 2, is not an event"):
        read(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(PrelortError, match=r"gone\.jsonl.*No such file"):
        read(tmp_path / "gone.jsonl")


def test_evaluations_base_and_losses(make_run):
    events = make_run("prelort", {16: 21.0, 2: 27.0}, every=4)
    assert [e.round for e in evaluations(events)] == [0, 4, 8, 12]
    final = final_evaluation(events)
    assert final.by_rank("perplexity") == pytest.approx({2: 27.0, 16: 21.0})
    assert list(final.by_rank("perplexity")) == [2, 16]
    assert final.by_rank("accuracy") == {}
    assert base_row(events) == {"perplexity": 700.0, "loss": 6.55}
    assert metrics_of({"a": events}) == ["perplexity"]
    assert list(train_losses(events)) == list(range(1, 13))
    assert shortfall(events) == ""


def test_nothing_measured_yet(make_run):
    events = make_run("prelort", {2: 27.0})[:1]
    assert final_evaluation(events) is None
    assert base_row(events) == {}
    assert metrics_of({"a": events}) == []
    assert shortfall(events) == "not measured yet"
    assert totals(events) == Totals(0, 0, 0, 0.0, False)


def test_a_null_is_a_nan():
    events = [{"event": "evaluated", "round": 0, "prefixes": {"2": {"perplexity": None}}}]
    assert math.isnan(final_evaluation(events).prefixes[2]["perplexity"])


def test_totals_of_a_finished_run_are_its_own_words(make_run):
    events = make_run("prelort", {2: 27.0})
    assert totals(events) == Totals(12, 60_000, 90_000, 30.1, True)


@given(st.integers(0, 12), st.integers(0, 12), st.integers(0, 9))
def test_a_run_killed_and_resumed_counts_each_round_once(make_run, reached, saved, extra):
    whole = make_run("prelort", {2: 27.0, 16: 21.0}, every=1)
    saved = min(saved, reached)

    def until(number):
        return [e for e in whole if e.get("round", 0) <= number and e["event"] != "run_finished"]

    killed = until(reached) + [e for e in whole if e.get("round") == reached + 1][:extra]
    killed = [e for e in killed if e["event"] != "run_finished"]
    rest = [e for e in whole if e.get("round", 0) > saved and e["event"] != "run_finished"]
    resumed = [*killed, {"event": "resumed", "round": saved}, *rest]
    kept = [e for e in settled(resumed) if e["event"] != "resumed"]
    assert kept == whole[:-1]
    sums = totals(resumed)
    assert (sums.bytes_up, sums.bytes_down, sums.rounds) == (60_000, 90_000, 12)
    assert sums.seconds == pytest.approx(12 * 2.1 + 13 * 0.5)
    assert [e.round for e in evaluations(resumed)] == list(range(13))


def test_resuming_a_finished_run_takes_its_end_back(make_run):
    events = [*make_run("prelort", {2: 27.0}), {"event": "resumed", "round": 8}]
    assert not totals(events).finished
    assert totals(events).bytes_up == 8 * 5000
    assert shortfall(events) == "measured after round 0 of 12"


def test_phases_add_up_over_rounds_and_forget_what_was_done_again() -> None:
    def round_of(number: int) -> dict[str, object]:
        seconds = {"train": 2.0, "aggregate": 0.5, "total": 2.5}
        return {"event": "aggregated", "round": number, "seconds": seconds}

    measured = {"event": "evaluated", "round": 1, "prefixes": {}, "seconds": 3.0}
    log = [round_of(1), measured, round_of(2), {"event": "resumed", "round": 1}, round_of(2)]
    assert phases(log) == {"train": 4.0, "aggregate": 1.0, "evaluate": 3.0}
