"""Live progress: bars on a terminal, plain lines elsewhere, for one run and for many."""

from __future__ import annotations

import io
from collections.abc import Iterable
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from histories import CLIENTS, START, run_events
from prelort.events import (
    Checkpointed,
    ClientFailed,
    ClientFinished,
    ClientJoined,
    ClientLeft,
    ClientRefused,
    EvaluationFailed,
    Event,
    Loading,
    RankChanged,
    RoundFinished,
    RoundRepeated,
    RoundStarted,
    RunResumed,
    Waiting,
)
from prelort.history import RunHistory
from prelort.report.progress import (
    StudyProgress,
    elapsed,
    latest_metric,
    remaining,
    round_line,
    rounds_done,
)

TWO = {2: 27.0, 16: 21.0}
HOSTILE = "loss is [bold]NaN\x1b[31m"


class Clock:
    def __init__(self) -> None:
        self.now = START

    def __call__(self):
        return self.now

    def tick(self, seconds: float = 1.0) -> None:
        self.now += timedelta(seconds=seconds)


def shown(
    events: Iterable[Event],
    *,
    terminal: bool = False,
    width: int = 120,
    dumb: bool = False,
    **options: object,
) -> str:
    """What is printed of a run that ends with its events."""
    out, clock = io.StringIO(), Clock()
    term = {"TERM": "dumb" if dumb else "xterm"}
    console = Console(file=out, width=width, force_terminal=terminal, _environ=term)
    with StudyProgress(console, clock=clock, **options) as progress:
        progress.started("prelort")
        for event in events:
            progress.event("prelort", event)
            clock.tick()
        progress.ended("prelort")
    return out.getvalue()


def at_round(events: list[Event], number: int, kind: type[Event]) -> int:
    return next(i for i, e in enumerate(events) if isinstance(e, kind) and e.round == number)


class TestLines:
    def test_one_for_each_round_without_control_characters(self) -> None:
        events = run_events(finals=TWO, every=2, failures={2: ["json"]})
        place = at_round(events, 2, ClientFailed)
        events[place] = ClientFailed(2, "json", 2, HOSTILE, time=events[place].time)
        text = shown(events)
        assert all(c.isprintable() or c == "\n" for c in text)
        lines = text.splitlines()
        failure = lines.pop(2)  # told at once: over real sites a round may take hours
        assert failure.startswith("prelort: round 2: json")
        assert "loss is [bold]NaN [31m" in failure
        assert [line.split(",")[0] for line in lines[:-1]] == [
            f"prelort: round {number}/4" for number in range(5)
        ]
        assert lines[-1].startswith("prelort: finished in ")
        assert "base ppl 150.0" in lines[0]
        assert "5/5 clients, train loss 5.440" in lines[1]
        assert "4/5 clients (failed: json: loss is [bold]NaN [31m)" in lines[2]
        assert "ppl" in lines[2]
        assert "ppl" not in lines[3]
        assert "ppl 27.0@2 21.0@16" in lines[4]
        assert "left" not in lines[4]

    def test_long_lines_are_not_wrapped(self) -> None:
        assert len(shown(run_events(rounds=2), width=30).splitlines()) == 4

    @pytest.mark.parametrize(
        "event",
        [
            ClientJoined(2, "b", 8),
            ClientLeft(2, "b"),
            ClientRefused(2, "b", "slow"),
            ClientFailed(2, "b", 2, "slow"),
            RoundRepeated(2, 2, "too few b"),
            EvaluationFailed(2, "b", 4, "no memory"),
        ],
    )
    def test_incidents_are_lines_of_their_own(self, event: Event) -> None:
        events = run_events(rounds=3)
        place = at_round(events, 2, RoundFinished)
        lines = shown([*events[:place], event, *events[place:]]).splitlines()
        incident = lines.pop(2)
        assert incident.startswith("prelort: round 2")
        assert "b" in incident.removeprefix("prelort: ")
        assert [line.split(",")[0] for line in lines[:-1]] == [
            f"prelort: round {number}/3" for number in range(4)
        ]

    def test_changed_ranks_are_not(self) -> None:
        events = run_events(rounds=1)
        text = shown([*events[:-1], RankChanged(1, "b", 2, 4, "schedule"), events[-1]])
        assert len(text.splitlines()) == len(shown(events).splitlines())

    def test_waiting_comes_after_the_line_of_the_round_before(self) -> None:
        events = run_events(rounds=2)
        place = at_round(events, 2, RoundStarted)
        wait = Waiting(2, ("a",), (HOSTILE,), 2, START + timedelta(minutes=5))
        lines = shown([*events[:place], wait, *events[place:]]).splitlines()
        assert lines[1].startswith("prelort: round 1/2")
        assert "waiting for" in lines[2]
        assert "loss is [bold]NaN [31m" in lines[2]

    def test_the_last_round_is_told_when_a_run_breaks_off(self) -> None:
        events, out = run_events(), io.StringIO()

        def run() -> None:
            with StudyProgress(Console(file=out, width=120)) as progress:
                progress.started("a")
                for event in events[: at_round(events, 2, RoundFinished) + 1]:
                    progress.event("a", event)
                raise RuntimeError("quorum")

        with pytest.raises(RuntimeError, match="quorum"):
            run()
        assert out.getvalue().splitlines()[-1].startswith("a: round 2/4")

    def test_a_dumb_terminal_gets_lines(self) -> None:
        text = shown(run_events(rounds=2), terminal=True, dumb=True)
        assert len(text.splitlines()) == 4

    @pytest.mark.parametrize("terminal", [False, True])
    def test_quiet_prints_nothing(self, terminal: bool) -> None:
        events = run_events(failures={1: ["json"]})
        assert shown(events, quiet=True, terminal=terminal) == ""


class TestBars:
    def test_show_where_a_run_is(self) -> None:
        text = shown(run_events(finals=TWO, every=1, failures={2: ["json"]}), terminal=True)
        last = text.rsplit("prelort", 1)[1]  # drawn at the end
        for part in ("round 4/4", "ppl 27.0@2 21.0@16", "  0:", "━"):
            assert part in last
        assert "round 2: json" in text

    @pytest.mark.parametrize("width", [80, 120])
    def test_fit_on_one_line(self, width: int) -> None:
        history = RunHistory.of(run_events(rounds=12, stop=9))
        out = io.StringIO()
        console = Console(file=out, width=width, force_terminal=True, color_system=None)
        with StudyProgress(console, clock=Clock()) as progress:
            progress.started("zero-padding")
            progress.replaced("zero-padding", history)
            progress.event("zero-padding", RoundStarted(10, CLIENTS))
        last = out.getvalue().rsplit("\x1b[2K", 1)[1].split("\x1b[?25h")[0].rstrip()
        assert len(last) <= width
        assert last.startswith("zero-padding")
        assert "10/12" in last
        assert "client 0/5" in last

    def test_before_its_start_a_run_is_loading(self) -> None:
        out = io.StringIO()
        console = Console(file=out, width=100, force_terminal=True)
        with StudyProgress(console) as progress:
            progress.started("prelort")
            progress.event("prelort", Loading(0, "prelort", 4, 0))
        assert "loading" in out.getvalue()


class TestStudies:
    def study(self, cells: int, **options: object) -> tuple[io.StringIO, Clock, StudyProgress]:
        out, clock = io.StringIO(), Clock()
        console = Console(file=out, width=200, force_terminal=False)
        return out, clock, StudyProgress(console, cells, clock=clock, **options)

    def test_each_cell_is_told_with_the_time_left(self) -> None:
        out, clock, progress = self.study(4, by_round=False)
        with progress:
            progress.kept(1)
            progress.started("a")
            for event in run_events(failures={1: ["json"]}):
                progress.event("a", event)
            clock.tick(10)
            progress.ended("a")
            progress.started("b")
            progress.ended("b", "it [broke]")
        assert out.getvalue().splitlines() == [
            "1 of 4 cells are finished already",
            "a: finished in 10 s; 2 of 4 cells, about 20 s left",
            "b: failed: it [broke]",
        ]

    def test_only_what_this_process_did_counts_for_the_pace(self) -> None:
        _, clock, progress = self.study(4)
        with progress:
            progress.kept(2)
            progress.started("a")
            started, *_ = run_events(rounds=10)
            progress.event("a", started)
            progress.event("a", RunResumed(6))
            clock.tick(20)
            for event in run_events(rounds=10, stop=8):
                if event.round > 6:
                    progress.event("a", event)
            # 0.2 of a cell took 20 s; 0.2 of it and one more cell are left.
            assert progress.seconds_left == pytest.approx(120.0)
            progress.ended("a", "stopped")

    def test_a_terminal_gets_a_bar_for_all_and_one_for_each(self) -> None:
        out = io.StringIO()
        console = Console(file=out, width=120, force_terminal=True)
        with StudyProgress(console, 3) as progress:
            for name in ("first", "second"):
                progress.started(name)
                for event in run_events(stop=1):
                    progress.event(name, event)
        for part in ("0 of 3 cells", "first", "second", "round 1/4"):
            assert part in out.getvalue()


class TestFiguresOfAHistory:
    def test_the_time_left_is_that_of_the_rounds_to_come(self) -> None:
        history = RunHistory.of(run_events(rounds=10, stop=4))
        now = history.time
        assert now is not None
        # 2.1 s a round, and half a second for the base.
        assert remaining(history, now) == pytest.approx((4 * 2.1 + 0.5) / 4 * 6)
        history.apply(RoundStarted(5, CLIENTS, time=now))
        assert remaining(history, now + timedelta(seconds=2)) == pytest.approx(
            (4 * 2.1 + 0.5) / 4 * 6 - 2
        )
        assert remaining(history, now + timedelta(days=1)) == 0

    def test_in_the_first_round_it_is_that_of_the_clients_to_come(self) -> None:
        events = run_events(rounds=10)
        history = RunHistory.of(events[: at_round(events, 1, ClientFinished) + 1])
        assert remaining(history, history.rounds[1].started + timedelta(seconds=4)) == (
            pytest.approx(4 * 5 * 10 - 4)
        )

    def test_what_an_earlier_process_took_does_not_count_after_resuming(self) -> None:
        started, *rest = run_events(rounds=10, stop=9)
        resumed = START + timedelta(days=3)
        history = RunHistory.of([started, RunResumed(8, time=resumed)])
        assert remaining(history, resumed) is None
        assert elapsed(history, resumed + timedelta(seconds=5)) == 5
        for event in rest:
            if event.round == 9:
                history.apply(event)
        assert remaining(history, resumed) == pytest.approx(2.1)

    @given(st.integers(1, 6))
    def test_rounds_done_never_fall_and_end_at_the_end(self, rounds: int) -> None:
        history, before = RunHistory(), 0.0
        for event in run_events(rounds=rounds):
            history.apply(event)
            assert before <= rounds_done(history) <= rounds
            before = rounds_done(history)
            left = remaining(history, event.time)
            assert left is None or left >= 0
        assert rounds_done(history) == rounds
        assert remaining(history, event.time) is None
        assert elapsed(history, START + timedelta(days=9)) == (event.time - START).total_seconds()

    def test_a_waiting_run_has_no_time_left(self) -> None:
        history = RunHistory.of(run_events(rounds=9, stop=2))
        history.apply(Waiting(3, (), (), 1, START))
        assert remaining(history, START) is None

    def test_the_latest_metric_is_that_of_the_lowest_and_highest_rank(self) -> None:
        assert latest_metric(RunHistory()) == ""
        history = RunHistory.of(run_events(stop=0))
        assert latest_metric(history) == "base ppl 150.0"
        history = RunHistory.of(run_events(finals={2: 0.5, 8: 0.75}, metric="accuracy"))
        assert latest_metric(history) == "acc 50.0@2 75.0@8"
        assert latest_metric(history, short=True) == "acc 75.0@8"

    def test_an_unfinished_rounds_loss_is_the_mean_over_examples_so_far(self) -> None:
        started, *_ = run_events()
        history = RunHistory.of([started, RoundStarted(1, ("a", "b"))])
        for name, loss, examples in (("a", 2.0, 30), ("b", 4.0, 10)):
            history.apply(ClientFinished(1, name, 2, loss, examples, 1, 1, 1.0, 1))
        assert "2/2 clients, train loss 2.500" in round_line(history)

    def test_a_round_is_told_when_its_checkpoint_is_written(self) -> None:
        events = run_events(rounds=2)
        place = at_round(events, 2, RoundStarted)
        out = io.StringIO()
        progress = StudyProgress(Console(file=out, width=120))
        progress.started("a")
        for event in events[:place]:
            progress.event("a", event)
        assert "round 1/2" not in out.getvalue()
        progress.event("a", Checkpointed(1))
        assert "round 1/2" in out.getvalue()
