"""Diagnostics beside a round: what is told, its own time, and that it never stops a run."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from prelort.config import Config, MethodConfig
from prelort.diagnostics.collector import Collector
from prelort.diagnostics.diagnosis import Diagnosis
from prelort.federation.flower import Context, Error, Message
from prelort.federation.transport import Engine
from prelort.methods import Broadcast, PreLort, ServerState, Update
from small_federation import (
    clients_of,
    in_process,
    make_config,
    make_state,
    make_strategy,
    run_rounds,
    same_bits,
    small_client_app,
)

RANKS = (2, 4, 8, 8)


def rounds_of(config: Config, **more: Any) -> tuple[ServerState, list[dict[str, Any]]]:
    """Two rounds; the state after them and the ``aggregated`` events."""
    clients = clients_of(RANKS)
    strategy, events = make_strategy(clients, config, **more)
    engine = Engine(in_process(small_client_app(clients), len(clients)), 1, float("inf"))
    state = run_rounds(strategy, engine, lambda state: None)
    return state, [event for event in events if event["event"] == "aggregated"]


def without_diagnostics() -> Config:
    config = make_config()
    evaluation = config.evaluation.model_copy(update={"diagnostics": False})
    return config.model_copy(update={"evaluation": evaluation})


def test_every_round_is_diagnosed() -> None:
    _, events = rounds_of(make_config())
    assert len(events) == 2
    for event in events:
        found = event["diagnostics"]
        assert found["layers"] == {"measured": 2, "of": 2}
        assert list(found["truncation_noise"]) == ["2", "4", "8"]
        assert found["aggregation_noise"] > 0
        assert found["client_drift"]["mean"] > 0
        assert len(found["slot_energy"]) == 8


def test_its_time_is_its_own() -> None:
    _, events = rounds_of(make_config())
    for event in events:
        seconds = event["seconds"]
        assert list(seconds) == ["train", "aggregate", "diagnose", "total"]
        assert min(seconds.values()) > 0
        parts = seconds["train"] + seconds["aggregate"] + seconds["diagnose"]
        assert parts == pytest.approx(seconds["total"])


def test_it_can_be_left_out_and_changes_nothing() -> None:
    with_them, diagnosed = rounds_of(make_config())
    state, events = rounds_of(without_diagnostics())
    assert same_bits(state.adapter, with_them.adapter)
    for event, other in zip(events, diagnosed, strict=True):
        assert "diagnostics" not in event
        assert event["seconds"]["diagnose"] == 0
        same = {"seconds": 0, "diagnostics": 0}
        assert other | same == event | same


def test_a_refused_reply_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    clients = clients_of(RANKS)
    app, seen, add = small_client_app(clients), [], Collector.add

    def refusing(message: Message, context: Context) -> Message:
        if context.node_config["partition-id"] == 1:
            return Message(Error(100, "no time"), reply_to=message)
        return app(message, context)

    def watched(self: Collector, sent: Broadcast, update: Update) -> None:
        seen.append(update.client.name)
        add(self, sent, update)

    monkeypatch.setattr(Collector, "add", watched)
    strategy, _ = make_strategy(clients)
    engine = Engine(in_process(refusing, len(clients)), 1, float("inf"))
    run_rounds(strategy, engine, lambda state: None)
    assert seen == ["site-0", "site-2", "site-3"] * 2


def test_without_a_global_model_there_is_nothing_to_diagnose() -> None:
    class Personal(PreLort):
        name = "own-parts"
        personal = True

    clients = clients_of(RANKS)
    method = Personal(MethodConfig(), sorted(set(RANKS)), 0)
    diagnosis = Diagnosis(make_config(), method, make_state(), clients, (2, 4, 8))
    assert diagnosis.result(make_state()) == {}
    assert diagnosis.seconds == pytest.approx(0.0, abs=1e-3)


class Breaking(PreLort):
    """A method whose readout fails."""

    name = "breaking"
    calls = 0
    fails_from = 0

    def global_adapter(self, state: ServerState, rank: int | None = None) -> Any:
        type(self).calls += 1
        if self.calls > self.fails_from:
            raise RuntimeError("no readout today")
        return super().global_adapter(state, rank)


@pytest.mark.parametrize("calls", [0, 1, 3])
def test_a_failure_is_told_and_the_run_goes_on(
    calls: int, caplog: pytest.LogCaptureFixture
) -> None:
    """At the beginning of a round, at its end, and in the middle of the end."""

    class Failing(Breaking):
        fails_from = calls

    method = Failing(MethodConfig(), sorted(set(RANKS)), 0)
    with caplog.at_level(logging.ERROR, logger="prelort"):
        state, events = rounds_of(make_config(), method=method)
    assert state.round == 2
    for event in events:
        assert event["diagnostics"] == {"failed": "RuntimeError: no readout today"}
    assert "no readout today" in caplog.text
    expected, _ = rounds_of(without_diagnostics())
    assert same_bits(state.adapter, expected.adapter)


def test_it_fails_once_a_round(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(self: Collector, sent: Broadcast, update: Update) -> None:
        raise ValueError("no place")

    monkeypatch.setattr(Collector, "add", failing)
    with caplog.at_level(logging.ERROR, logger="prelort"):
        _, events = rounds_of(make_config())
    assert caplog.text.count("ValueError: no place") == 2
    assert [event["diagnostics"] for event in events] == [{"failed": "ValueError: no place"}] * 2
