"""The live display: bars and clients on a terminal, lines elsewhere; from events and from logs."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console, Group

from histories import CLIENTS, START, run_events, troubled_events
from prelort.events import (
    Checkpointed,
    ClientFailed,
    ClientFinished,
    ClientJoined,
    ClientLeft,
    ClientRefused,
    EvaluationFailed,
    Event,
    EventLog,
    RankChanged,
    RoundFinished,
    RoundRepeated,
    RoundStarted,
    RunResumed,
    RunStarted,
    Transferring,
    Waiting,
    encode,
)
from prelort.history import RunHistory
from prelort.report.live import Display, watch
from prelort.report.status import details, elapsed, remaining, share_done

TWO = {2: 27.0, 16: 21.0}
HOSTILE = "[red]evil[/red] :smile:\x1b[31m\nx"
SHOWN = "[red]evil[/red] :smile: [31m x"
STARTED = RunStarted(0, "prelort", "causal-lm", 0, 4, 3, (2, 4), time=START)


class Clock:
    def __init__(self) -> None:
        self.now = START

    def __call__(self):
        return self.now

    def tick(self, seconds: float = 1.0) -> None:
        self.now += timedelta(seconds=seconds)


def console(*, terminal: bool = False, width: int = 120, term: str = "xterm") -> Console:
    return Console(
        file=io.StringIO(), width=width, height=30, force_terminal=terminal, color_system=None,
        _environ={"TERM": term},
    )  # fmt: skip


def shown(events: Iterable[Event], *, quiet: bool = False, stops: bool = False, **more) -> str:
    """What is printed of a run that ends with its events, or is stopped after them."""
    out, clock = console(**more), Clock()
    with Display(out, quiet=quiet, clock=clock) as display:
        display.started("prelort")
        for event in events:
            display.event("prelort", event)
            clock.now = max(clock.now, event.time)
        if not stops:
            display.ended("prelort")
    return out.file.getvalue()


def at_round(events: list[Event], number: int, kind: type[Event]) -> int:
    return next(i for i, e in enumerate(events) if isinstance(e, kind) and e.round == number)


def heads(text: str) -> list[str]:
    return [line.split(",")[0].removeprefix("prelort: ") for line in text.splitlines()]


class TestLines:
    def test_one_for_each_round_without_control_characters(self) -> None:
        events = run_events(finals=TWO, every=2, failures={2: ["json"]})
        place = at_round(events, 2, ClientFailed)
        events[place] = ClientFailed(2, "json", 2, HOSTILE, time=events[place].time)
        text = shown(events)
        assert all(c.isprintable() or c == "\n" for c in text)
        lines = text.splitlines()
        # At once: over real sites a round may take hours.
        assert lines.pop(2) == f"prelort: round 2: json failed: {SHOWN}"
        assert heads("\n".join(lines[:-1])) == [f"round {number}/4" for number in range(5)]
        assert lines[-1].startswith("prelort: finished in ")
        assert "base ppl 150.0" in lines[0]
        assert "5/5 clients, loss 5.440" in lines[1]
        assert "4/5 clients, loss " in lines[2]
        assert "ppl 27.0@2 21.0@16" in lines[4]
        assert ["left" in line for line in lines] == [False, True, True, True, False, False]

    @pytest.mark.parametrize(
        "event",
        [
            ClientJoined(2, "b", 8),
            ClientLeft(2, "b"),
            ClientRefused(2, "b", "slow"),
            RoundRepeated(2, 2, "too few b"),
            EvaluationFailed(2, "b", 4, "no memory"),
            Waiting(2, ("a",), ("b",), 2, START + timedelta(minutes=5)),
        ],
    )
    def test_incidents_are_lines_of_their_own(self, event: Event) -> None:
        events = run_events(rounds=3)
        place = at_round(events, 2, RoundStarted)
        lines = shown([*events[:place], event, *events[place:]], width=30).splitlines()
        results = isinstance(event, EvaluationFailed)  # which is before the line of its round
        incident = lines.pop(1 if results else 2)
        assert incident.startswith("prelort: round 2")
        assert "b" in incident.removeprefix("prelort: ")
        assert heads("\n".join(lines[:-1])) == [f"round {number}/3" for number in range(4)]

    def test_a_round_is_printed_when_its_checkpoint_is_written_or_the_run_stops(self) -> None:
        events = run_events(rounds=2)
        stop = at_round(events, 1, RoundFinished) + 1
        out = console()
        display = Display(out)
        display.started("a")
        for event in events[:stop]:
            display.event("a", event)
        assert "round 1/2" not in out.file.getvalue()
        display.event("a", Checkpointed(1))
        assert "round 1/2" in out.file.getvalue()
        assert heads(shown(events[:stop], stops=True))[-1] == "round 1/2"

    def test_a_long_transfer_is_a_line_and_on_a_terminal_the_clients_status(self) -> None:
        started = RoundStarted(1, ("a", "b"), time=START)
        events = [
            STARTED,
            started,
            Transferring(1, "a", "down", 320_000_000, 0.49, time=START),
            Transferring(1, "b", "up", 64_000_000, 0.1, time=START),
        ]
        text = shown(events, stops=True)
        assert "prelort: round 1: a: 320 MB (49%) sent" in text
        assert "prelort: round 1: b: 64 MB (10%) received" in text
        assert any("training, 320 MB (49%) sent" in line for line in drawn(events))
        failed = ClientFailed(1, "a", 2, "gone", time=START)
        assert not any("sent" in line for line in drawn([*events, failed]))

    def test_a_dumb_terminal_gets_lines_and_quiet_nothing(self) -> None:
        events = run_events(rounds=2, failures={1: ["json"]})
        assert shown(events, terminal=True, term="dumb") == shown(events)
        for terminal in (False, True):
            assert shown(events, quiet=True, terminal=terminal) == ""

    def test_of_a_study_name_each_cell_and_the_time_left(self) -> None:
        out, clock = console(width=200), Clock()
        with Display(out, 4, clock=clock) as display:
            display.skipped(1)
            display.started("a")
            events = run_events(rounds=1)
            for event in events:
                display.event("a", event)
            display.ended("a")
            display.started("b")
            display.ended("b", "it [broke]")
        seconds = (events[-1].time - START).total_seconds()
        assert [line for line in out.file.getvalue().splitlines() if "round" not in line] == [
            "1 of 4 cells are finished already",
            f"a: finished in {seconds:.0f} s; 2 of 4 cells, about {2 * seconds:.0f} s left",
            "b: failed: it [broke]",
        ]


class TestTerminal:
    @pytest.mark.parametrize("width", [80, 120])
    def test_a_bar_and_every_client(self, width: int) -> None:
        events = run_events(finals=TWO, rounds=12, every=1, stop=2)
        now = events[-1].time
        events += [
            RoundStarted(3, ("email", "new"), time=now),
            ClientFinished(3, "email", 4, 2.5, 40, 5, 5, 12.0, 9, time=now),
        ]
        text = shown(events, terminal=True, width=width, stops=True)
        lines = text.rsplit("prelort", 1)[1].split("\x1b[?25h")[0].splitlines()
        assert all(len(line) <= width for line in lines)
        for part in ("━", "3/12  1/2 clients  loss 2.500", "ppl", "@16", " left"):
            assert part in lines[0]
        assert lines[1].split("  ")[0] == "1 training and 1 answered"
        assert "10 kB up, 15 kB down" in lines[1]
        rows = {line.split()[0]: line.split()[1:] for line in lines[3:] if line.strip()}
        assert rows["email"] == ["4", "answered", "2.500", "40", "12", "s", "3"]
        assert rows["new"] == ["–", "training", "0", "s", "0"]

    def test_of_a_study_has_a_bar_for_all_and_one_for_each_cell(self) -> None:
        out = console(terminal=True)
        with Display(out, 3) as display:
            for name in ("first", "second"):
                display.started(name)
                for event in run_events(stop=1):
                    display.event(name, event)
        last = out.file.getvalue().rsplit("first", 1)[1]
        for part in ("second", "round 1/4", "0 of 3 cells"):
            assert part in last


def drawn(events: Iterable[Event], width: int = 80, height: int = 22) -> list[str]:
    """The lines about a run's clients."""
    out = console(terminal=True, width=width)
    history = RunHistory.of(events)
    out.print(Group(*details(history, width, height, START + timedelta(seconds=10))))
    lines = out.file.getvalue().splitlines()
    lines = [] if lines == [""] else lines
    assert len(lines) <= height
    assert all(len(line) <= width for line in lines)
    assert "\x1b" not in out.file.getvalue()
    return [line.rstrip() for line in lines if line.strip()]


class TestClients:
    def test_that_fail_leave_and_come_back(self) -> None:
        def rows() -> Mapping[str, str]:
            return {line.split()[0]: " ".join(line.split()[1:4]) for line in drawn(events)[-2:]}

        events = [
            STARTED,
            RoundStarted(1, ("a", "b"), time=START),
            ClientFinished(1, "a", 4, 2.5, 40, 5, 5, 12.0, 9, time=START),
            ClientFailed(1, "b", 2, "slow", time=START),
        ]
        assert rows() == {"a": "4 answered 2.500", "b": "2 failed: slow"}
        events += [ClientLeft(1, "a", time=START), RankChanged(1, "b", 2, 8, "", time=START)]
        assert rows() == {"a": "4 left 2.500", "b": "8 failed: slow"}
        events += [ClientJoined(2, "a", 16, time=START), RoundStarted(2, ("b",), time=START)]
        assert rows() == {"a": "16 idle 2.500", "b": "8 training 10"}

    @pytest.mark.parametrize("width", [10, 30, 60, 80, 200])
    @pytest.mark.parametrize("height", [0, 1, 2, 3, 5, 22])
    def test_fit_every_terminal(self, width: int, height: int) -> None:
        names = [f"a-hospital-with-a-long-name-{n}" for n in range(40)]
        events = [*troubled_events(), RoundStarted(5, (*names, HOSTILE, "\u202eツ" * 50))]
        events.append(ClientFailed(5, names[7], 2, "long " * 100))
        for _ in range(2):
            lines = drawn(events, width, height)
            assert height < 5 or width < 30 or any("failed" in line for line in lines)
            events.append(Waiting(5, (), tuple(names), 50, START))

    def test_the_urgent_are_first_where_there_is_no_room(self) -> None:
        names = [f"site-{n:03d}" for n in range(100)]
        replies = [ClientFinished(1, name, 4, 2.5, 40, 5, 5, 12.0, 9) for name in names[:90]]
        failure = ClientFailed(1, "site-095", 2, "slow")
        lines = drawn([STARTED, RoundStarted(1, tuple(names)), *replies, failure], height=12)
        assert [line.split()[0] for line in lines[2:5]] == ["site-095", "site-090", "site-091"]
        assert lines[-1] == "and 91 others: 1 training and 90 answered"


class TestFiguresOfAHistory:
    def test_the_time_left_is_that_of_the_rounds_to_come(self) -> None:
        history = RunHistory.of(run_events(rounds=10, stop=4))
        now = history.time
        assert now is not None
        whole = (4 * 2.1 + 0.5) / 4 * 6  # 2.1 s a round, and half a second for the base
        assert remaining(history, now) == pytest.approx(whole)
        history.apply(RoundStarted(5, CLIENTS, time=now))
        assert remaining(history, now + timedelta(seconds=2)) == pytest.approx(whole - 2)
        assert remaining(history, now + timedelta(days=1)) == 0
        history.apply(Waiting(5, (), (), 1, START))
        assert remaining(history, now) is None

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

    def test_a_studys_pace_is_that_of_this_process(self) -> None:
        clock = Clock()
        display = Display(console(), 4, clock=clock)
        display.skipped(2)
        display.started("a")
        started, *rest = run_events(rounds=10, stop=8)
        for event in (started, RunResumed(6, time=START), *(e for e in rest if e.round > 6)):
            display.event("a", event)
        clock.tick(20)
        # 0.2 of a cell took 20 s; 0.2 of it and one more cell are left.
        assert display.seconds_left == pytest.approx(120.0)

    @given(st.integers(1, 6))
    def test_the_share_that_is_done_rises_to_one(self, rounds: int) -> None:
        history, before = RunHistory(), 0.0
        for event in run_events(rounds=rounds):
            history.apply(event)
            assert before <= share_done(history) <= 1
            before = share_done(history)
            assert (remaining(history, event.time) or 0) >= 0
        assert share_done(history) == 1
        assert remaining(history, event.time) is None
        assert elapsed(history, START + timedelta(days=9)) == (event.time - START).total_seconds()


class Writer:
    """Another process writes logs while `watch` sleeps: one step each time, and then it is gone."""

    def __init__(self, folder: Path, *names: str) -> None:
        self.logs = {name: EventLog(folder / f"{name}.jsonl") for name in names}
        self.steps: list[tuple[str, list[Event], bool]] = []

    def then(self, name: str, events: Iterable[Event], *, anew: bool = False) -> None:
        self.steps.append((name, list(events), anew))

    def sleep(self, seconds: float = 0.5) -> None:
        if self.steps:
            name, events, anew = self.steps.pop(0)
            with self.logs[name].path.open("w" if anew else "a") as file:
                file.write("".join(encode(event) + "\n" for event in events))

    def watched(self, *, terminal: bool = False) -> tuple[bool, str]:
        out = console(terminal=terminal, width=100)
        with Display(out, len(self.logs)) as display:
            done = watch(lambda: self.logs, lambda: bool(self.steps), display, sleep=self.sleep)
        assert not self.steps
        return done, out.file.getvalue()


class TestWatch:
    @pytest.mark.parametrize("terminal", [False, True])
    def test_a_run_from_before_its_start_to_its_end(self, tmp_path: Path, terminal: bool) -> None:
        writer = Writer(tmp_path, "prelort")
        for event in run_events(rounds=3):
            writer.then("prelort", [event])
        done, text = writer.watched(terminal=terminal)
        assert done
        assert "prelort: finished in" in text
        if not terminal:
            assert heads(text)[:-1] == [f"round {number}/3" for number in range(4)]

    def test_a_run_that_is_gone_is_noticed(self, tmp_path: Path) -> None:
        writer = Writer(tmp_path, "prelort")
        writer.then("prelort", run_events(stop=2))
        for _ in range(50):  # a long round
            writer.then("prelort", [])
        writer.then("prelort", [e for e in run_events(stop=3) if e.round == 3])
        done, text = writer.watched()
        assert not done
        assert heads(text)[-1] == "round 3/4"

    def test_a_log_truncated_by_a_resumed_run(self, tmp_path: Path) -> None:
        events = run_events(rounds=3)
        second, third = (at_round(events, n, RoundStarted) for n in (2, 3))
        writer = Writer(tmp_path, "prelort")
        writer.then("prelort", events[: third + 3])
        writer.then("prelort", events[:second], anew=True)
        writer.then("prelort", events[second:])
        done, text = writer.watched()
        assert done
        assert heads(text) == [
            "round 0/3", "round 1/3", "round 2/3",
            "continues after round 1", "round 2/3", "round 3/3",
            heads(text)[-1],
        ]  # fmt: skip
