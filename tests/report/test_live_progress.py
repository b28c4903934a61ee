import io
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from prelort.report.progress import LiveProgress
from prelort.report.state import RunState


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def play(events, *, terminal=False, quiet=False, width=80, step=1.0):
    """What is printed when an event comes every ``step`` seconds."""
    out, clock = io.StringIO(), Clock()
    console = Console(file=out, width=width, force_terminal=terminal, _environ={"TERM": "xterm"})
    with LiveProgress(console, quiet=quiet, clock=clock) as progress:
        for event in events:
            progress(event)
            clock.now += step
    return out.getvalue()


def failing(events):
    """The same run, but client json of round 2 fails."""
    changed = []
    for event in events:
        if (event["event"], event.get("round"), event.get("client")) == (
            "client_finished",
            2,
            "json",
        ):
            reason = "loss is [bold]NaN\x1b[31m"
            event = {"event": "client_failed", "round": 2, "client": "json", "reason": reason}
        changed.append(event)
    return changed


def test_one_plain_line_a_round_and_no_control_characters(make_run):
    events = failing(make_run("prelort", {2: 27.0, 16: 21.0}, rounds=4, every=2))
    text = play(events)
    assert all(c.isprintable() or c == "\n" for c in text)
    lines = text.splitlines()
    # Over real sites a round may take hours: a failure is told at once.
    assert lines.pop(2) == "prelort: round 2: json left out: loss is [bold]NaN [31m"
    assert [line.split(",")[0] for line in lines] == [f"prelort: round {i}/4" for i in range(5)]
    assert "base ppl 700.0" in lines[0]
    assert "5/5 clients" in lines[1]
    assert "train loss 5.240" in lines[1]
    assert "ppl" not in lines[1]
    assert "4/5 clients (left out json: loss is [bold]NaN [31m)" in lines[2]
    assert "ppl 54.4@2 44.7@16" in lines[2]
    assert "ppl" not in lines[3]
    assert "ppl 27.0@2 21.0@16" in lines[4]
    assert "left" not in lines[4].replace("left out", "")


def test_the_time_left_is_that_of_the_rounds_to_come(make_run):
    # Round 1 is known to be complete when round 2 begins: 8 events of one second each.
    lines = play(make_run("prelort", {2: 27.0, 16: 21.0}, rounds=4)).splitlines()
    assert lines[1].endswith("10 s so far, about 24 s left")
    assert lines[3].endswith("26 s so far, about 8 s left")


def test_a_long_line_is_not_wrapped(make_run):
    text = play(failing(make_run("prelort", {2: 27.0, 16: 21.0}, rounds=4)), width=30)
    assert len(text.splitlines()) == 6


NEWS = [
    ({"event": "client_joined", "client": "b", "rank": 8}, ": b joined: with rank 8"),
    ({"event": "client_left", "client": "b"}, ": b went away"),
    ({"event": "client_refused", "client": "b", "reason": "old"}, ": b refused: old"),
    ({"event": "client_failed", "client": "b", "reason": "slow"}, ": b left out: slow"),
    (
        {"event": "round_repeated", "attempt": 2, "reason": "too few"},
        " repeated: attempt 2: too few",
    ),
    (
        {"event": "measuring_failed", "client": "b", "rank": 4, "reason": "no memory"},
        ": b not measured: the adapter of rank 4: no memory",
    ),
]
NEWS = [({**event, "round": 2}, words) for event, words in NEWS]


@pytest.mark.parametrize("event, words", NEWS, ids=[event["event"] for event, _ in NEWS])
def test_what_happens_is_a_line_of_its_own(make_run, event, words):
    events = make_run("prelort", {2: 27.0}, rounds=3)
    place = next(i for i, e in enumerate(events) if e["event"] == "aggregated" and e["round"] == 2)
    before, after = events[:place], events[place:]
    lines = play([*before, event, *after]).splitlines()
    assert lines.pop(2) == f"prelort: round 2{words}"
    assert [line.split(",")[0] for line in lines] == [f"prelort: round {i}/3" for i in range(4)]
    assert play([*before, event, *after], quiet=True) == ""


def test_a_failed_measurement_does_not_split_the_line_of_its_round(make_run):
    events = make_run("prelort", {2: 27.0}, rounds=2)
    place = next(i for i, e in enumerate(events) if e["event"] == "evaluated" and e["round"] == 2)
    lines = play([*events[:place], NEWS[-1][0], *events[place:]]).splitlines()
    assert [line.split(",")[0] for line in lines] == [
        "prelort: round 0/2",
        "prelort: round 1/2",
        "prelort: round 2: b not measured: the adapter of rank 4: no memory",
        "prelort: round 2/2",
    ]
    assert "ppl 27.0@2" in lines[-1]


def test_whom_it_waits_for_is_told_after_the_round_that_is_done(make_run):
    events = make_run("prelort", {2: 27.0}, rounds=2)
    place = next(i for i, e in enumerate(events) if e["event"] == "round_started")
    until = datetime(2001, 2, 3, 14, 5, tzinfo=UTC)
    waiting = {
        "event": "waiting",
        "round": 1,
        "present": ["a"],
        "missing": ["[red]b\x1b[31m"],
        "needed": 2,
        "until": until.isoformat(),
    }
    lines = play([*events[:place], waiting, *events[place:]]).splitlines()
    here = until.astimezone().strftime("%Y-%m-%d %H:%M:%S")
    assert lines[0].startswith("prelort: round 0/2")
    words = f"waiting for 1 more site until {here} (missing: [red]b [31m)"
    assert lines[1] == f"prelort: round 1: {words}"


def test_waiting_before_the_beginning_does_not_make_two_runs_of_one():
    facts = {"round": 0, "method": "prelort", "rounds": 2, "seed": 3}
    waiting = {"event": "waiting", "round": 1, "present": [], "missing": [], "needed": 2}
    evaluated = {"event": "evaluated", "round": 0, "base": {"perplexity": 9.0}, "prefixes": {}}
    started = {"event": "run_started", **facts}
    lines = play([{"event": "loading", **facts}, waiting, started, evaluated]).splitlines()
    assert lines[0] == "prelort: round 1: waiting for 2 more sites"
    assert lines[1].startswith("prelort: round 0/2, base ppl")


def test_a_terminal_gets_a_bar_for_each_run(make_run):
    events = failing(make_run("prelort", {2: 27.0, 16: 21.0}, rounds=4))
    text = play([*events, *make_run("zero-padding", {2: 26.2, 16: 26.1}, rounds=3)], terminal=True)
    assert "\x1b[" in text
    final = text.rsplit("prelort", 1)[1]  # the last time that everything was drawn
    for part in ("4/4", "ppl 21.0@16", "zero-padding", "3/3", "ppl 26.1@16", "━"):
        assert part in final
    assert "round 2 left out json: loss is [bold]NaN [31m" in text


@pytest.mark.parametrize("width", [80, 120])
def test_the_numbers_fit_beside_the_bar(width):
    state = RunState("zero-padding", began=0.0, rounds=12)
    for event in (
        {"event": "evaluated", "round": 0, "base": {"perplexity": 734.2}, "prefixes": {}},
        {"event": "round_started", "round": 10, "clients": ["a"] * 10},
        {"event": "client_finished", "round": 10, "loss": 3.2, "examples": 10},
    ):
        state.absorb(event, 0.0)
    text = "  ".join(state.parts(754.0, narrow=width < 100))
    assert len("zero-padding") + 1 + 6 + 1 + len(text) <= width
    for part in ("10/12", "client 1/10", "loss 3.20", "734.2", "12:34"):
        assert part in text


def test_quiet_is_quiet(make_run):
    for terminal in (False, True):
        assert play(make_run("prelort", {2: 27.0}), quiet=True, terminal=terminal) == ""


def test_a_dumb_terminal_gets_lines(make_run):
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, color_system=None, _environ={"TERM": "dumb"})
    with LiveProgress(console) as progress:
        for event in make_run("prelort", {2: 27.0}, rounds=2):
            progress(event)
    assert "\x1b" not in out.getvalue()
    assert len(out.getvalue().splitlines()) == 3


def test_the_round_in_hand_is_told_when_a_run_breaks_off(make_run):
    events = make_run("prelort", {2: 27.0}, rounds=4)
    done = next(i for i, e in enumerate(events) if e["event"] == "aggregated" and e["round"] == 2)
    out = io.StringIO()

    def run():
        with LiveProgress(Console(file=out)) as progress:
            for event in events[: done + 1]:
                progress(event)
            raise RuntimeError("quorum")

    with pytest.raises(RuntimeError, match="quorum"):
        run()
    assert out.getvalue().splitlines()[-1].startswith("prelort: round 2/4")


def test_two_runs_of_one_method_are_told_apart(make_run):
    text = play([*make_run("a", {2: 2.0}, rounds=1), *make_run("a", {2: 2.0}, rounds=1, seed=7)])
    names = [line.split(": round")[0] for line in text.splitlines()]
    assert names == ["a", "a", "a, seed 7", "a, seed 7"]


def test_a_resumed_run_without_its_beginning(make_run):
    events = make_run("prelort", {2: 27.0}, rounds=4)
    rest = [{"event": "resumed", "round": 2}, *(e for e in events if e.get("round", 0) > 2)]
    lines = play(rest).splitlines()
    assert [line.split(",")[0] for line in lines] == ["run: round 3/?", "run: round 4/?"]
    assert play(rest, terminal=True)


def state_after(events, step=1.0):
    state, now = RunState("x", began=0.0, rounds=events[0].get("rounds")), 0.0
    for event in events:
        state.absorb(event, now)
        now += step
    return state, now


@given(st.integers(1, 6), st.integers(1, 80))
def test_progress_never_goes_back_and_ends_at_the_end(make_run, rounds, step):
    events = make_run("prelort", {2: 27.0}, rounds=rounds)
    state, before = RunState("x", began=0.0, rounds=rounds), 0.0
    for number, event in enumerate(events):
        state.absorb(event, float(number * step))
        assert before <= state.done <= rounds
        before = state.done
        left = state.left(float(number * step))
        assert left is None or left >= 0
    assert state.done == rounds
    assert state.left(1e9) is None
    assert state.elapsed(1e9) == (len(events) - 1) * step


def test_resuming_does_not_take_the_earlier_rounds_for_speed(make_run):
    events = make_run("prelort", {2: 27.0}, rounds=10)
    done = [e for e in events if e.get("round") == 9 and e["event"] != "checkpointed"]
    state, now = state_after([events[0], {"event": "resumed", "round": 8}, *done])
    assert state.done == 9
    # 7 events of one second for one round, one round to go.
    assert state.left(now) == pytest.approx(7.0)


def test_replaying_the_past_before_a_resumption_changes_no_estimate(make_run):
    events = make_run("prelort", {2: 27.0}, rounds=10)
    past = [e for e in events if e.get("round", 0) <= 8]
    state, _ = state_after(past)
    now = 1000.0
    state.absorb({"event": "resumed", "round": 8}, now)
    assert state.left(now) is None
    for event in (e for e in events if e.get("round") == 9 and e["event"] != "checkpointed"):
        state.absorb(event, now)
        now += 1.0
    assert state.left(now) == pytest.approx(7.0)
    assert state.elapsed(now) == pytest.approx(7.0)


def test_the_loss_of_a_round_is_the_mean_over_examples():
    state = RunState("x", began=0.0, rounds=3)
    for event in (
        {"event": "round_started", "round": 1, "clients": ["a", "b"]},
        {"event": "client_finished", "round": 1, "client": "a", "loss": 2.0, "examples": 30},
        {"event": "client_finished", "round": 1, "client": "b", "loss": 4.0, "examples": 10},
    ):
        state.absorb(event, 1.0)
    assert state.loss == pytest.approx(2.5)
    assert state.done == 1.0
    state.absorb({"event": "round_started", "round": 2, "clients": ["a", "b"]}, 2.0)
    state.absorb({"event": "client_finished", "round": 2, "loss": 1.0, "examples": 5}, 3.0)
    assert state.loss == pytest.approx(1.0)
    assert state.done == 1.5


def test_a_run_that_loads_before_it_starts_has_one_bar() -> None:
    facts = {"method": "prelort", "rounds": 2, "seed": 0}
    console = Console(force_terminal=True, width=100, file=io.StringIO())
    with LiveProgress(console) as progress:
        progress({"event": "loading", "round": 0, **facts})
        progress({"event": "run_started", "round": 0, **facts})
        progress({"event": "run_finished", "round": 2})
        progress({"event": "loading", "round": 0, **facts, "method": "zero-padding"})
        assert progress._bars is not None
        names = [task.description for task in progress._bars.tasks]
    assert names == ["prelort", "zero-padding"]
