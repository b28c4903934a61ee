"""`prelort watch`: live status of every client, from logs that are being written."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path

import pytest
from rich.console import Console

from histories import START, run_events, troubled_events
from prelort.events import (
    ClientFailed,
    ClientFinished,
    ClientJoined,
    ClientLeft,
    Event,
    RankChanged,
    RoundStarted,
    RunFinished,
    RunStarted,
    Waiting,
    encode,
)
from prelort.history import RunHistory
from prelort.report.watch import most_urgent, screen, watch

HOSTILE = "[red]evil[/red] :smile:\x1b[31m\nx"
SHOWN = "[red]evil[/red] :smile: [31m x"
STARTED = RunStarted(0, "prelort", "causal-lm", 0, 4, 3, (2, 4), time=START)


def reply(number: int, name: str, loss: float = 2.5) -> ClientFinished:
    return ClientFinished(number, name, 4, loss, 40, 5, 5, 12.0, 9, time=START)


def failure(number: int, name: str, reason: str = "slow") -> ClientFailed:
    return ClientFailed(number, name, 2, reason, time=START)


def asked(number: int, *names: str) -> RoundStarted:
    return RoundStarted(number, names, time=START)


def drawn(
    events: Iterable[Event], width: int = 80, height: int = 23, seconds: float = 10
) -> list[str]:
    """The lines of the screen so long after the start."""
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=True, color_system=None)
    now = START + timedelta(seconds=seconds)
    console.print(screen("prelort", RunHistory.of(events), width, height, now))
    lines = out.getvalue().splitlines()
    assert len(lines) <= height
    assert all(len(line) <= width for line in lines)
    assert "\x1b" not in out.getvalue()
    return [line.rstrip() for line in lines]


class TestScreen:
    def test_of_a_round_under_way(self) -> None:
        run = run_events(finals={2: 27.0, 16: 21.0}, every=1, rounds=12, stop=2)
        lines = drawn([*run, asked(3, "email", "new"), reply(3, "email")], seconds=20)
        assert lines[0].startswith("prelort  round 3/12  0:20, ")
        assert lines[0].endswith("left  1 training and 1 answered")
        assert lines[1].startswith("loss 2.500  ppl ")
        assert lines[1].endswith("10 kB up, 15 kB down")
        assert " ".join(lines[2].split()) == "client rank status loss examples time rounds"
        assert lines[4].split() == ["email", "4", "answered", "2.500", "40", "12", "s", "3"]
        assert lines[6].split() == ["new", "–", "training", "20", "s", "0"]

    def test_of_clients_that_fail_leave_and_come_back(self) -> None:
        events = [STARTED, asked(1, "a", "b"), reply(1, "a"), failure(1, "b")]
        rows = {line.split()[0]: " ".join(line.split()[1:4]) for line in drawn(events)[3:5]}
        assert rows == {"a": "4 answered 2.500", "b": "2 failed: slow"}
        events += [ClientLeft(1, "a", time=START), RankChanged(1, "b", 2, 8, "", time=START)]
        assert [line.split()[1:3] for line in drawn(events)[3:5]] == [
            ["4", "left"],
            ["8", "failed:"],
        ]
        events += [ClientJoined(2, "a", 16, time=START), asked(2, "b")]
        assert [line.split()[1:3] for line in drawn(events)[3:5]] == (
            [["16", "idle"], ["8", "training"]]
        )

    def test_of_a_run_that_waits(self) -> None:
        events = [STARTED, Waiting(1, ("a",), (HOSTILE,), 3, START, time=START)]
        (line,) = (line for line in drawn(events, width=120) if line.startswith("waiting for"))
        assert SHOWN in line
        assert not any("waiting" in line for line in drawn([*events, asked(1, "a")]))

    def test_names_and_reasons_are_shown_literally(self) -> None:
        events = [STARTED, asked(1, HOSTILE), failure(1, HOSTILE, HOSTILE)]
        text = "\n".join(drawn(events, width=160))
        assert text.count(SHOWN) == 4  # in the client's row and among the incidents

    def test_a_silent_run_may_have_been_stopped(self) -> None:
        events = [STARTED, asked(1, "a")]
        assert "last event" not in drawn(events)[1]
        assert drawn(events, seconds=300)[1].endswith("last event 5 min 00 s ago")
        assert "last event" not in drawn([*events, RunFinished(1, time=START)], seconds=300)[1]

    @pytest.mark.parametrize("width", [10, 30, 44, 60, 80, 200])
    @pytest.mark.parametrize("height", [1, 2, 3, 5, 8, 23])
    def test_fits_every_terminal(self, width: int, height: int) -> None:
        names = [f"a-hospital-with-a-long-name-{n}" for n in range(40)]
        events = [*troubled_events(), asked(5, *names, HOSTILE, "\u202eツ" * 50)]
        events.append(failure(5, names[7], "long " * 100))
        for _ in range(2):
            lines = drawn(events, width, height)
            assert lines[0].startswith("prelort"[:width])
            if height >= 8 and width >= 30:
                assert any("failed" in line for line in lines[1:])
            events.append(Waiting(5, (), tuple(names), 50, START, time=START))

    def test_says_how_many_clients_are_not_shown(self) -> None:
        names = [f"site-{n:03d}" for n in range(100)]
        assert drawn([STARTED, asked(1, *names)], height=17)[-1] == "and 87 others (training)"

    def test_shows_the_urgent_first_where_there_is_no_room(self) -> None:
        names = [f"site-{n:03d}" for n in range(100)]
        replies = [reply(1, name) for name in names[:90]]
        history = RunHistory.of([STARTED, asked(1, *names), *replies, failure(1, "site-095")])
        clients = history.clients.values()
        rows, others = most_urgent(clients, 13)
        assert [row.name for row in rows][:3] == ["site-095", "site-090", "site-091"]
        assert others == "and 87 others (answered)"
        assert most_urgent(clients, 5)[1] == "and 95 others (5 training and 90 answered)"
        assert most_urgent(clients, 99)[1] == "and 1 other (answered)"
        rows, others = most_urgent(clients, 100)
        assert ([row.name for row in rows], others) == (names, "")
        assert most_urgent(clients, 0)[0] == []


Step = Callable[[], None] | BaseException


class Writer:
    """Somebody writes runs' logs while `watch` sleeps, one step at a time."""

    def __init__(self, folder: Path, *names: str) -> None:
        self.logs = {name: folder / f"{name}.jsonl" for name in names}
        self.steps: list[Step] = []
        self.seconds = 0.0

    def then(self, name: str, events: Iterable[Event], *, anew: bool = False) -> None:
        """Append the events, or write the log anew, as a resumed run truncates it."""
        text = "".join(encode(event) + "\n" for event in events)

        def step() -> None:
            with self.logs[name].open("w" if anew else "a") as file:
                file.write(text)

        self.steps.append(step)

    def sleep(self, seconds: float) -> None:
        self.seconds += seconds
        step = self.steps.pop(0)
        if isinstance(step, BaseException):
            raise step
        step()

    def watched(self, *, terminal: bool, out: io.StringIO | None = None) -> str:
        out = out or io.StringIO()
        environ = {"TERM": "xterm"} if terminal else {"TERM": "dumb"}
        console = Console(file=out, width=100, height=24, force_terminal=terminal, _environ=environ)
        watch(
            lambda: self.logs,
            "runs/x",
            console,
            clock=lambda: START + timedelta(seconds=self.seconds),
            sleep=self.sleep,
        )
        assert not self.steps
        return out.getvalue()


@pytest.mark.parametrize("terminal", [False, True])
def test_a_run_is_watched_from_before_its_start_to_its_end(tmp_path: Path, terminal: bool) -> None:
    writer = Writer(tmp_path, "prelort")
    for event in run_events(rounds=3):
        writer.then("prelort", [event])
    text = writer.watched(terminal=terminal)
    assert text.count("runs/x has not started") == 1
    assert ("round 3/3  " if terminal else "prelort: round 3/3, 5/5 clients") in text
    if not terminal:
        assert [line.split(",")[0] for line in text.splitlines()[1:]] == [
            f"prelort: round {number}/3" for number in range(4)
        ]


@pytest.mark.parametrize("terminal", [False, True])
def test_a_finished_run_is_shown_at_once(tmp_path: Path, terminal: bool) -> None:
    writer = Writer(tmp_path, "prelort")
    writer.then("prelort", run_events(rounds=3))
    writer.sleep(0)
    text = writer.watched(terminal=terminal)
    assert "has not started" not in text
    assert "round 3/3" in text


@pytest.mark.parametrize("terminal", [False, True])
def test_a_log_truncated_by_a_resumed_run_is_read_again(tmp_path: Path, terminal: bool) -> None:
    events = run_events(rounds=3)
    second = next(i for i, e in enumerate(events) if e.round == 2)
    third = next(i for i, e in enumerate(events) if e.round == 3)
    writer = Writer(tmp_path, "prelort")
    writer.then("prelort", events[: third + 3])
    writer.then("prelort", events[:second], anew=True)
    writer.then("prelort", events[second:])
    text = writer.watched(terminal=terminal)
    assert "round 3/3" in text
    if not terminal:
        lines = [line.split(",")[0] for line in text.splitlines()[1:]]
        assert lines.count("prelort: round 1/3") == 1
        assert "truncated" in text
        assert "after round 1" in text


def test_cells_that_run_side_by_side_are_all_told(tmp_path: Path) -> None:
    first, second = run_events("prelort", rounds=2), run_events("fedit", rounds=2)
    writer = Writer(tmp_path, "prelort", "fedit")
    for place in range(0, len(first), 5):
        writer.then("prelort", first[place : place + 5])
        writer.then("fedit", second[place : place + 5])
    text = writer.watched(terminal=False)
    for name in ("prelort", "fedit"):
        assert f"{name}: round 2/2" in text


def test_on_a_terminal_one_cell_is_shown_until_it_ends(tmp_path: Path) -> None:
    writer = Writer(tmp_path, "prelort", "fedit")
    writer.then("fedit", run_events("fedit", rounds=2)[:-1])
    writer.then("prelort", run_events("prelort", rounds=3)[:-1])
    writer.then("fedit", run_events("fedit", rounds=2)[-1:])
    writer.then("prelort", run_events("prelort", rounds=3)[-1:])
    screens = writer.watched(terminal=True).split("of 2 cells finished")[2:6]
    shown = [next(n for n in ("fedit", "prelort") if n in one) for one in screens]
    assert shown == ["fedit", "fedit", "prelort", "prelort"]
    assert "round 3/3" in screens[-1]


@pytest.mark.parametrize("terminal", [False, True])
def test_ctrl_c_leaves_what_was_seen(tmp_path: Path, terminal: bool) -> None:
    events = run_events(rounds=3)
    writer, out = Writer(tmp_path, "prelort"), io.StringIO()
    writer.then("prelort", [e for e in events if e.round <= 1])
    writer.steps.append(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        writer.watched(terminal=terminal, out=out)
    assert "round 1/3" in out.getvalue()
