"""`prelort watch`: who is doing what, drawn in any terminal, from a log that is being written."""

from __future__ import annotations

import io
import json
import os
from datetime import UTC, datetime

import pytest
from page_events import troubled
from rich.console import Console

from prelort.report.watch import screen, watch
from prelort.report.watched import Watched

HOSTILE = "[red]evil[/red] :smile:\x1b[31m\nx"
SHOWN = "[red]evil[/red] :smile: [31m x"


def started(number, *names):
    return {"event": "round_started", "round": number, "clients": list(names)}


def finished(number, name, **more):
    facts = {"rank": 4, "loss": 2.5, "examples": 40, "steps": 5, "seconds": 12.0, "bytes_up": 9}
    return {"event": "client_finished", "round": number, "client": name, **facts, **more}


def failed(number, name, reason):
    event = {"event": "client_failed", "round": number, "client": name, "rank": 2}
    return event | {"reason": reason}


RUN = {"event": "run_started", "round": 0, "method": "prelort", "rounds": 4, "clients": 3}


def after(*events, step=1.0):
    watched, now = Watched("run"), 1000.0
    for event in events:
        watched.absorb(event, now)
        now += step
    return watched


def drawn(watched, width=80, height=23, now=1010.0):
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    console.print(screen(watched, width, height, now))
    text = console.file.getvalue()
    lines = text.splitlines()
    assert len(lines) <= height
    assert all(len(line) <= width for line in lines)
    assert "\x1b" not in text
    return [line.rstrip() for line in lines]


class TestWhoDoesWhat:
    def test_a_client_goes_from_training_to_answered_or_failed(self):
        watched = after(RUN, started(1, "a", "b", "c"), finished(1, "a"), failed(1, "b", "slow"))
        rows = {row.name: (row.status, row.reason, row.rank) for row in watched.by_name()}
        assert rows == {
            "a": ("answered", "", 4),
            "b": ("failed", "slow", 2),
            "c": ("training", "", None),
        }
        watched.absorb(started(2, "b"), 1010.0)
        assert [row.status for row in watched.by_name()] == ["not asked", "training", "not asked"]

    def test_a_repeated_round_counts_once(self):
        watched = after(RUN, started(1, "a"), finished(1, "a"), started(1, "a"), finished(1, "a"))
        assert watched.rows["a"].rounds == 1
        watched.absorb(finished(2, "a"), 1.0)
        assert watched.rows["a"].rounds == 2

    def test_who_comes_goes_and_changes_its_rank(self):
        watched = after(
            RUN,
            {"event": "client_joined", "round": 1, "client": "a", "rank": 8},
            {"event": "rank_changed", "round": 1, "client": "a", "from": 8, "to": 16},
            {"event": "client_left", "round": 2, "client": "a"},
        )
        assert (watched.rows["a"].rank, watched.rows["a"].status) == (16, "gone")
        assert list(watched.happenings) == [
            "round 1: a joined: with rank 8",
            "round 1: a rank changed: from rank 8 to 16",
            "round 2: a went away",
        ]
        watched.absorb(started(2, "b"), 1.0)
        assert watched.rows["a"].status == "gone"
        watched.absorb({"event": "client_joined", "round": 3, "client": "a", "rank": 2}, 1.0)
        assert (watched.rows["a"].rank, watched.rows["a"].status) == (2, "not asked")

    def test_seconds_run_while_a_client_trains(self):
        watched = after(RUN, started(1, "a", "b"), finished(1, "a"))
        rows = watched.rows
        assert watched.seconds(rows["a"], 1061.5) == 12.0
        assert watched.seconds(rows["b"], 1061.5) == 60.0
        assert watched.seconds(rows["b"], 0.0) == 0.0

    def test_waiting_ends_with_the_round(self):
        waiting = {"event": "waiting", "round": 1, "present": [], "missing": [], "needed": 1}
        watched = after(waiting)
        assert watched.waiting == waiting
        watched.absorb(RUN, 1.0)
        watched.absorb(waiting, 1.0)
        watched.absorb(started(1, "a"), 1.0)
        assert watched.waiting is None
        assert not watched.happenings

    def test_where_there_is_no_room_the_urgent_come_first(self):
        names = [f"site-{n:03d}" for n in range(100)]
        watched = after(RUN, started(1, *names), *(finished(1, name) for name in names[:90]))
        watched.absorb(failed(1, "site-095", "slow"), 1.0)
        rows, others = watched.most_urgent(13)
        assert [row.name for row in rows][:3] == ["site-095", "site-090", "site-091"]
        assert others == "and 87 others (answered)"
        rows, others = watched.most_urgent(5)
        assert others == "and 95 others (5 training and 90 answered)"
        assert watched.most_urgent(99)[1] == "and 1 other (answered)"
        rows, others = watched.most_urgent(100)
        assert ([row.name for row in rows], others) == (names, "")
        assert watched.most_urgent(0)[0] == []

    def test_bytes_are_the_rounds_so_far_and_then_the_runs_own(self, make_run):
        events = make_run("prelort", {2: 27.0}, rounds=3)
        assert (after(*events[:-2]).bytes_up, after(*events[:-2]).bytes_down) == (15000, 22500)
        last = events[-1] | {"bytes_up": 1, "bytes_down": 2}
        assert (after(*events[:-1], last).bytes_up, after(*events[:-1], last).bytes_down) == (1, 2)


class TestScreen:
    def test_of_a_round_in_hand(self, make_run):
        run = make_run("prelort", {2: 27.0, 16: 21.0}, every=1)
        events = [event for event in run if event.get("round", 0) <= 2]
        lines = drawn(after(*events, started(3, "email", "new"), finished(3, "email")))
        assert lines[0].startswith("prelort  round 3/12  0:10, ")
        assert lines[0].endswith("left  1 training and 1 answered")
        assert lines[1].startswith("loss 2.500  ppl ")
        assert lines[1].endswith("10 kB up, 15 kB down")
        assert " ".join(lines[2].split()) == "client rank status loss examples time rounds"
        assert lines[4].split() == ["email", "4", "answered", "2.500", "40", "12", "s", "3"]
        assert lines[6].split() == ["new", "–", "training", "0", "s", "0"]

    def test_whom_it_waits_for_and_until_when(self):
        until = datetime.now(UTC).replace(microsecond=0)
        waiting = {"event": "waiting", "round": 1, "present": ["a"], "missing": [HOSTILE]}
        waiting |= {"needed": 3, "until": until.isoformat()}
        here = until.astimezone().strftime("%H:%M:%S")
        lines = drawn(after(waiting), width=120)
        assert f"waiting for 2 more sites until {here} (missing: {SHOWN})" in lines

    def test_what_happened_to_the_run_and_not_to_a_client(self):
        again = {"event": "round_repeated", "round": 1, "attempt": 2, "reason": "too few"}
        resumed = {"event": "resumed", "round": 1}
        assert list(after(RUN, again, resumed).happenings) == [
            "round 1 repeated: attempt 2: too few",
            "round 1 resumed: went on from the checkpoint after round 1",
        ]

    def test_names_and_reasons_are_shown_literally(self):
        watched = after(RUN, started(1, HOSTILE, "b"), failed(1, HOSTILE, HOSTILE))
        text = "\n".join(drawn(watched, width=160))
        assert text.count(SHOWN) == 4  # the client, its reason; both in what happened
        assert SHOWN in "\n".join(drawn(after(RUN | {"method": HOSTILE})))

    def test_a_run_that_is_silent_may_have_been_stopped(self):
        watched = after(RUN, started(1, "a"))
        assert "last event" not in drawn(watched)[1]
        assert drawn(watched, now=1301.0)[1].endswith("last event 5 min 00 s ago")

    @pytest.mark.parametrize("width", [10, 30, 44, 60, 80, 200])
    @pytest.mark.parametrize("height", [1, 2, 3, 4, 5, 8, 23])
    def test_fits_every_terminal(self, width, height):
        names = [f"a-hospital-with-a-long-name-{n}" for n in range(40)]
        events = [*troubled(), RUN, started(5, *names, HOSTILE, "\u202eツ" * 50)]
        watched = after(*events, failed(5, names[7], "long " * 100))
        waiting = {"event": "waiting", "round": 5, "present": [], "missing": names, "needed": 50}
        for _ in range(2):
            lines = drawn(watched, width, height)
            assert lines[0].startswith("prelort"[:width])
            watched.absorb(waiting, 1.0)
        if height >= 5 and width >= 30:
            assert any("failed" in line for line in lines[1:])

    def test_of_many_clients_says_how_many_are_not_shown(self):
        names = [f"site-{n:03d}" for n in range(100)]
        watched = after(RUN, started(1, *names))
        lines = drawn(watched, height=17)
        assert lines[-1] == "and 87 others (training)"

    def test_a_loss_that_is_no_number(self):
        assert drawn(after(RUN, started(1, "a"), finished(1, "a", loss=None)))


class Written:
    """A run's folder that somebody writes while `watch` sleeps."""

    def __init__(self, folder, steps):
        self.file = folder / "metrics.jsonl"
        self.steps = list(steps)
        self.now = 1000.0

    def sleep(self, seconds):
        self.now += seconds
        step = self.steps.pop(0)
        if isinstance(step, BaseException):
            raise step
        if callable(step):
            step(self)
        else:
            self.append(*step)

    def append(self, *events):
        with self.file.open("a") as file:
            file.writelines(json.dumps(event) + "\n" for event in events)
        os.utime(self.file, (self.now, self.now))

    def watched(self, *, terminal=False, width=80, height=24):
        out = io.StringIO()
        environ = {"TERM": "xterm"} if terminal else {"TERM": "dumb"}
        console = Console(
            file=out, width=width, height=height, force_terminal=terminal, _environ=environ
        )
        logs = {"": self.file}
        watch(lambda: logs, "runs/x", console, clock=lambda: self.now, sleep=self.sleep)
        assert not self.steps
        return out.getvalue()


@pytest.mark.parametrize("terminal", [False, True])
def test_a_run_is_watched_from_before_its_beginning_to_its_end(tmp_path, make_run, terminal):
    events = make_run("prelort", {2: 27.0, 16: 21.0}, rounds=3)
    text = Written(tmp_path, [[e] for e in events]).watched(terminal=terminal)
    assert "runs/x has not begun: waiting for its first event" in text
    assert "perplexity by rank prefix" in text
    assert ("round 3/3  " if terminal else "prelort: round 3/3, 5/5 clients") in text
    assert text.count("has not begun") == 1


@pytest.mark.parametrize("terminal", [False, True])
def test_a_run_that_is_finished_is_shown_at_once(tmp_path, make_run, terminal):
    run = Written(tmp_path, [])
    run.append(*make_run("prelort", {2: 27.0, 16: 21.0}, rounds=3))
    text = run.watched(terminal=terminal)
    assert "has not begun" not in text
    assert text.index("round 3/3") < text.index("perplexity by rank prefix")


def test_in_a_pipe_it_prints_the_lines_of_a_run(tmp_path, make_run):
    events = make_run("prelort", {2: 27.0}, rounds=3)
    run = Written(tmp_path, [[e] for e in events])
    lines = run.watched().splitlines()
    assert [line.split(",")[0] for line in lines[1:5]] == [
        f"prelort: round {i}/3" for i in range(4)
    ]


def cut(events):
    """The log goes back to these events, as on resuming."""

    def step(run):
        run.file.write_text("")
        run.append(*events)

    return step


@pytest.mark.parametrize("terminal", [False, True])
def test_a_log_that_is_cut_on_resuming_is_read_again(tmp_path, make_run, terminal):
    events = make_run("prelort", {2: 27.0}, rounds=3)
    third = next(i for i, e in enumerate(events) if e.get("round") == 3)
    second = next(i for i, e in enumerate(events) if e.get("round") == 2)
    begun, rest = events[: third + 3], events[second:]
    text = Written(tmp_path, [begun, cut(events[:second]), rest]).watched(terminal=terminal)
    if terminal:
        last = text.rsplit("round 3/3", 1)[1]
        (row,) = [line.split() for line in last.splitlines() if "asyncio" in line]
        assert row[-1] == "3"  # rounds: what was cut off does not count
        return
    lines = text.splitlines()
    assert "the log was cut back: the run goes on after round 1" in lines
    rounds = [line.split(",")[0] for line in lines if line.startswith("prelort: round")]
    assert rounds == [f"prelort: round {i}/3" for i in (0, 1, 2, 2, 3)]


@pytest.mark.parametrize("terminal", [False, True])
def test_a_log_that_is_cut_to_nothing_begins_again(tmp_path, make_run, terminal):
    events = make_run("prelort", {2: 27.0}, rounds=2)
    text = Written(tmp_path, [events[:4], cut([]), events]).watched(terminal=terminal)
    assert text.count("has not begun") == 2
    assert "perplexity by rank prefix" in text
    assert terminal or "prelort: round 2/2" in text


@pytest.mark.parametrize("terminal", [False, True])
def test_ctrl_c_leaves_what_was_seen(tmp_path, make_run, terminal):
    events = make_run("prelort", {2: 27.0}, rounds=3)
    place = next(i for i, e in enumerate(events) if e["event"] == "aggregated")
    out = io.StringIO()
    run = Written(tmp_path, [events[: place + 1], KeyboardInterrupt()])
    console = Console(file=out, width=80, height=24, force_terminal=terminal)
    with pytest.raises(KeyboardInterrupt):
        watch(lambda: {"": run.file}, "x", console, clock=lambda: run.now, sleep=run.sleep)
    assert "round 1/3" in out.getvalue()


def test_of_several_methods_the_one_that_runs_is_watched(tmp_path, make_run):
    logs = {name: tmp_path / f"{name}.jsonl" for name in ("prelort", "fedit")}

    def write(name):
        events = make_run(name, {2: 27.0}, rounds=1)
        logs[name].write_text("".join(json.dumps(e) + "\n" for e in events))

    write("prelort")
    out = io.StringIO()
    console = Console(file=out, width=120)
    watch(lambda: logs, "runs/x", console, clock=lambda: 1.0, sleep=lambda _: write("fedit"))
    text = out.getvalue()
    assert "fedit in runs/x has not begun" in text
    for name in logs:
        assert f"{name}: round 1/1" in text
        assert f"\n {name} " in text  # its row of the table
