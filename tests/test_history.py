"""The state of a run as its events tell it: laws of the fold over any possible course of a run."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from equality import equal
from prelort.errors import PrelortError
from prelort.events import (
    ClientFailed,
    ClientFinished,
    ClientJoined,
    ClientLeft,
    ClientMetrics,
    ClientRefused,
    ClientsEvaluated,
    Evaluated,
    Event,
    EventLog,
    RoundFinished,
    RoundRepeated,
    RoundSeconds,
    RoundStarted,
    RoundStats,
    RunFinished,
    RunStarted,
    Waiting,
)
from prelort.history import RunHistory

START = datetime(2026, 1, 1, tzinfo=UTC)
NAMES = ("a", "b", "c")
any_float = st.floats() | st.floats(0, 10)


@st.composite
def runs(draw: st.DrawFn) -> list[Event]:
    """The events of a run, or of the beginning of one: rounds, repeated rounds, incidents."""
    clock = iter(START + timedelta(seconds=n) for n in range(10_000))
    rounds = draw(st.integers(1, 3))
    events = [*begin(draw, clock, rounds)]
    for number in range(1, rounds + 1):
        for attempt in range(1, draw(st.integers(1, 2)) + 1):
            if attempt > 1:
                events.append(RoundRepeated(number, attempt, "too few", time=next(clock)))
            events += between(draw, clock, number)
            replies = attempt_at(draw, clock, number)
            events += replies
        events.append(round_finished(draw, clock, number, replies))
        if draw(st.booleans()):
            metrics = {rank: {"loss": draw(any_float)} for rank in (2, 4)}
            events.append(Evaluated(number, metrics, 0.5, time=next(clock)))
        if draw(st.booleans()):
            measured = {"a": ClientMetrics(4, 10, {"loss": draw(any_float)})}
            failed = {"b": "no rows"} if draw(st.booleans()) else {}
            events.append(ClientsEvaluated(number, measured, failed, 0.25, time=next(clock)))
    events.append(RunFinished(rounds, time=next(clock)))
    return events[: draw(st.integers(0, len(events)))]


def begin(draw: st.DrawFn, clock: Iterator[datetime], rounds: int) -> Iterator[Event]:
    if draw(st.booleans()):
        yield ClientRefused(0, "z", "another base", time=next(clock))
    levels = (2, 4)
    yield RunStarted(0, "prelort", "causal-lm", 0, rounds, 3, levels, time=next(clock))
    yield Evaluated(0, {}, 0.5, base={"loss": draw(any_float)}, time=next(clock))


def between(draw: st.DrawFn, clock: Iterator[datetime], number: int) -> Iterator[Event]:
    """What may come before a round."""
    if draw(st.booleans()):
        yield ClientLeft(number, "c", time=next(clock))
        until = next(clock)
        yield Waiting(number, ("a", "b"), ("c",), 3, until, time=until)
        yield ClientJoined(number, "c", draw(st.integers(1, 8)), time=next(clock))


def attempt_at(draw: st.DrawFn, clock: Iterator[datetime], number: int) -> list[Event]:
    events: list[Event] = [RoundStarted(number, NAMES, time=next(clock))]
    for name in draw(st.permutations(NAMES)):
        if draw(st.booleans()):
            loss, seconds = draw(any_float), draw(st.floats(0, 9) | st.just(float("nan")))
            events.append(
                ClientFinished(number, name, 4, loss, 10, 2, 4, seconds, 99, time=next(clock))
            )
        else:
            events.append(ClientFailed(number, name, 4, "it broke", time=next(clock)))
    return events


def round_finished(
    draw: st.DrawFn, clock: Iterator[datetime], number: int, replies: list[Event]
) -> Event:
    count = sum(isinstance(event, ClientFinished) for event in replies)
    diagnostics = draw(st.none() | st.just({"failed": "out of memory"}) | st.just({"drift": None}))
    seconds = RoundSeconds(1.5, 0.25, 0.125)
    stats = RoundStats(
        count, 3 - count, draw(any_float), 99 * count, 300, seconds, diagnostics=diagnostics
    )
    return RoundFinished(number, stats, time=next(clock))


@settings(deadline=None)
@given(runs())
def test_a_written_run_is_read_as_it_was(events: list[Event]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        log = EventLog(Path(folder) / "metrics.jsonl")
        for event in events:
            log.append(event)
        assert equal(RunHistory.of(log.read()), RunHistory.of(events))


@settings(deadline=None)
@given(runs(), st.data())
def test_events_that_come_one_by_one_tell_what_all_tell(
    events: list[Event], data: st.DataObject
) -> None:
    """A log that grows is folded where it was left; readers change nothing."""
    cut = data.draw(st.integers(0, len(events)))
    history = RunHistory.of(events[:cut])
    _ = history.current, history.final, history.seconds, history.metrics(), history.to_pandas()
    for event in events[cut:]:
        history.apply(event)
    assert equal(history, RunHistory.of(events))


@settings(deadline=None)
@given(runs())
def test_what_the_history_says_is_what_the_events_say(events: list[Event]) -> None:
    history = RunHistory.of(events)
    finished = {event.round: event.stats for event in events if isinstance(event, RoundFinished)}
    assert history.done == max(finished, default=0)
    assert history.bytes_up == sum(stats.bytes_up for stats in finished.values())
    assert history.bytes_down == sum(stats.bytes_down for stats in finished.values())
    assert history.seconds["train"] == pytest.approx(1.5 * len(finished))
    assert list(history.rounds_to_pandas()["round"]) == sorted(finished)
    assert history.finished == any(isinstance(event, RunFinished) for event in events)
    assert history.time == (events[-1].time if events else None)
    replies = [event for event in events if isinstance(event, ClientFinished)]
    assert history.passes == sum(reply.passes for reply in replies)
    for name, record in history.clients.items():
        own = [reply for reply in replies if reply.client == name]
        assert record.rounds == len({reply.round for reply in own})  # a repeated one counts once
        assert equal(record.last, own[-1] if own else None)
    under_way = history.current
    if under_way is not None:
        assert under_way.number not in finished
        assert {n for n, c in history.clients.items() if c.status == "training"} == set(
            under_way.clients
        ) - under_way.replies.keys() - under_way.failures.keys()
    else:
        assert not any(client.status == "training" for client in history.clients.values())


@settings(deadline=None)
@given(runs())
def test_incidents_are_what_did_not_go_as_planned_once_each_in_order(events: list[Event]) -> None:
    kinds = ClientFailed | ClientRefused | ClientJoined | ClientLeft | RoundRepeated | Waiting
    expected = [
        event
        for event in events
        if isinstance(event, kinds)
        or (isinstance(event, ClientsEvaluated) and event.failures)
        or (isinstance(event, RoundFinished) and "failed" in (event.stats.diagnostics or {}))
    ]
    assert equal(RunHistory.of(events).incidents, expected)


def test_a_round_under_way_has_the_mean_loss_of_its_replies() -> None:
    history = RunHistory()
    history.apply(RoundStarted(1, NAMES))
    assert history.current is not None
    assert history.current.loss is None
    for name, loss, examples in (("a", 1.0, 30), ("b", 3.0, 10)):
        history.apply(ClientFinished(1, name, 4, loss, examples, 2, 4, 0.5, 99))
    assert history.current.loss == 1.5
    history.apply(RoundFinished(1, RoundStats(2, 1, 1.25, 0, 0, RoundSeconds(1, 0, 0))))
    assert history.current is None
    assert history.rounds[1].loss == 1.25


def test_values_are_a_table_with_the_base_at_rank_0() -> None:
    history = RunHistory.of(
        [
            Evaluated(0, {}, 0.1, base={"loss": 3.0, "accuracy": 0.25}),
            Evaluated(2, {4: {"loss": 1.0, "accuracy": 0.5}, 2: {"loss": 2.0}}, 0.1),
        ]
    )
    assert history.metrics() == ["accuracy"]
    table = history.to_pandas()
    assert list(table.columns) == ["round", "rank", "metric", "value"]
    assert [tuple(row) for row in table.itertuples(index=False)] == [
        (0, 0, "loss", 3.0),
        (0, 0, "accuracy", 0.25),
        (2, 2, "loss", 2.0),
        (2, 4, "loss", 1.0),
        (2, 4, "accuracy", 0.5),
    ]
    assert history.final is not None
    assert history.final.prefixes[4]["loss"] == 1.0
    assert len(RunHistory().to_pandas()) == 0


def test_a_reply_of_a_round_that_never_started_is_damage() -> None:
    reply = ClientFinished(
        1, "a", rank=2, loss=1.0, examples=3, steps=1, passes=1, seconds=0.1, bytes_up=4
    )
    with pytest.raises(PrelortError, match="round 1 has no start"):
        RunHistory.of([reply])
