"""Trackers get each round exactly once, and never stop a run."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate import tracking

from histories import run_events
from prelort.errors import ConfigError
from prelort.events import (
    Checkpointed,
    ClientMetrics,
    ClientsEvaluated,
    Evaluated,
    Event,
    EventLog,
    RoundFinished,
    RunFinished,
    RunResumed,
)
from prelort.report import trackers
from prelort.report.trackers import FILE, Tracking, values_of

CONFIG = {"seed": 0, "method.name": "prelort", "model.layers": [1, 2], "threads": None}
ROUNDS = 4


class Recorder(tracking.GeneralTracker):
    """A tracker of the user's own, as accelerate takes them; its calls are the class's."""

    name = "recorder"
    requires_logging_directory = False
    calls: list[tuple[Any, ...]]
    fails: set[Any]

    def __init__(self, run_name: str) -> None:
        super().__init__()

    @property
    def tracker(self) -> None:
        return None

    def _called(self, *call: Any) -> None:
        self.calls.append(call)
        if call[0] in self.fails or call[-1] in self.fails:
            raise ConnectionError("no network\nsecond line")

    def start(self) -> None:
        self._called("start")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self._called("configuration", values["method.name"])

    def log(self, values: dict[str, float], step: int | None = None, **more: Any) -> None:
        assert values
        self._called("log", step)

    def finish(self) -> None:
        self._called("finish")

    @classmethod
    def steps(cls) -> list[int]:
        return [call[1] for call in cls.calls if call[0] == "log"]


class Other(Recorder):
    name = "other"


@pytest.fixture(autouse=True)
def recorders(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (Recorder, Other):
        monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, kind.name, kind)
        kind.calls, kind.fails = [], set()


def live_events(rounds: int = ROUNDS) -> list[Event]:
    """A run's events with its checkpoints, as listeners get them."""

    def steps() -> Iterator[Event]:
        events = run_events(finals={2: 27.0, 16: 21.0}, rounds=rounds, every=1)
        for event, following in zip(events, [*events[1:], None], strict=True):
            yield event
            if event.round < getattr(following, "round", event.round) or (
                isinstance(following, RunFinished)
            ):
                yield Checkpointed(event.round)

    return list(steps())


def process(folder: Path, events: Iterable[Event], names: Iterable[str] = ("recorder",)) -> None:
    """One process of a run; events are in its log before the listeners get them."""
    log = EventLog(folder / "metrics.jsonl")
    with Tracking(list(names), folder, CONFIG) as track:
        for event in events:
            if event.logged:
                log.append(event)
            track(event)


def resume(folder: Path, events: list[Event], names: Iterable[str] = ("recorder",)) -> int:
    """The next process: the log is truncated to the last checkpoint in it, and goes on."""
    log = EventLog(folder / "metrics.jsonl")
    done = [event.round for event in events if isinstance(event, Checkpointed)]
    back = max(done, default=0)
    log.truncate(0)
    live = live_events()
    place = live.index(next(e for e in live if isinstance(e, Checkpointed) and e.round == back))
    if back == 0:  # everything is done again
        process(folder, live, names)
        return back
    started, *kept = (event for event in live[:place] if event.logged)
    for event in (started, *kept):
        log.append(event)
    with Tracking(list(names), folder, CONFIG) as track:
        for event in (started, RunResumed(back), *live[place + 1 :]):
            if event.logged and event is not started:
                log.append(event)
            track(event)
    return back


class TestTracking:
    def test_logs_each_round_once(self, tmp_path: Path) -> None:
        process(tmp_path, live_events())
        assert Recorder.calls == [
            ("start",),
            ("configuration", "prelort"),
            *(("log", number) for number in range(ROUNDS + 1)),
            ("finish",),
        ]
        assert json.loads((tmp_path / FILE).read_text())["recorder"]["round"] == ROUNDS

    @pytest.mark.parametrize("killed", range(2, 40, 3))
    def test_also_when_a_run_is_killed_and_resumed(self, tmp_path: Path, killed: int) -> None:
        events = live_events()
        process(tmp_path, events[:killed])
        resume(tmp_path, events[:killed])
        assert Recorder.steps() == list(range(ROUNDS + 1))

    def test_one_that_is_added_on_resuming_gets_all_rounds(self, tmp_path: Path) -> None:
        events = live_events()
        process(tmp_path, events[:-2])
        resume(tmp_path, events[:-2], ["recorder", "other"])
        assert Other.steps() == Recorder.steps() == list(range(ROUNDS + 1))

    @pytest.mark.parametrize("where", ["start", "configuration", 2, "finish"])
    def test_one_that_fails_is_one_warning_and_catches_up(
        self, tmp_path: Path, where: str | int
    ) -> None:
        Recorder.fails = {where}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            process(tmp_path, live_events(), ["recorder", "other"])
        (warning,) = caught
        assert str(warning.message).startswith("tracker recorder is off")
        assert str(warning.message).endswith("no network")
        assert Other.steps() == list(range(ROUNDS + 1))
        Recorder.fails, Recorder.calls = set(), []
        resume(tmp_path, live_events()[:-1])
        missed = {"start": 0, "configuration": 0, 2: 2, "finish": ROUNDS + 1}[where]
        assert Recorder.steps() == list(range(missed, ROUNDS + 1))

    def test_a_damaged_file_starts_anew(self, tmp_path: Path) -> None:
        (tmp_path / FILE).write_text('{"recorder": [')
        process(tmp_path, live_events())
        assert Recorder.steps() == list(range(ROUNDS + 1))

    def test_a_run_that_is_refused_leaves_nothing(self, tmp_path: Path) -> None:
        process(tmp_path, [])
        assert Recorder.calls == []
        assert list(tmp_path.iterdir()) == []


class TestValues:
    def test_have_names_of_their_own(self) -> None:
        base, _ = (e for e in run_events(rounds=1) if isinstance(e, Evaluated))
        _, last = (e for e in run_events(finals={2: 27.0, 16: 21.0}) if isinstance(e, Evaluated))
        assert values_of(base)["perplexity/base"] == 150.0
        assert values_of(last)["perplexity/rank-2"] == pytest.approx(27.0)
        assert values_of(last)["seconds/evaluate"] == 0.5
        done = next(e for e in run_events() if isinstance(e, RoundFinished))
        assert values_of(done) == {
            "train/loss": pytest.approx(5.44),
            "bytes/up": 5000.0,
            "bytes/down": 7500.0,
            "clients/answered": 5.0,
            "clients/failed": 0.0,
            "seconds/train": 2.0,
            "seconds/aggregate": 0.1,
            "seconds/diagnose": 0.0,
            "seconds/total": 2.1,
        }
        own = {n: ClientMetrics(2, 9, {"accuracy": a}) for n, a in (("a", 0.5), ("b", 1.0))}
        assert values_of(ClientsEvaluated(1, own, {}, 1.0))["accuracy/clients-mean"] == 0.75


class TestCheck:
    def test_an_unknown_name_lists_what_is_allowed(self) -> None:
        with pytest.raises(ConfigError, match="'tensorbord' is unknown") as error:
            trackers.check(["tensorbord"])
        for name in ("tensorboard", "wandb", "mlflow", "comet_ml", "aim", "clearml", "dvclive"):
            assert name in str(error.value)

    def test_one_that_is_not_installed_says_what_is(self) -> None:
        pytest.importorskip("tensorboard", reason="needs tensorboard (an optional extra)")
        installed = {str(name) for name in tracking.get_available_trackers()}
        missing = sorted(
            set(map(str, tracking.LOGGER_TYPE_TO_CLASS)) - installed - {"recorder", "other"}
        )
        with pytest.raises(ConfigError, match=r"not installed .*tensorboard"):
            trackers.check(["tensorboard", missing[0]])


class TestTheLibraries:
    """The real libraries, where they are installed; nothing leaves the machine."""

    def track(self, folder: Path, name: str) -> str:
        """A run that is killed in its third round and resumed; the tracker's id of it."""
        trackers.check([name])
        events = live_events()
        killed = next(i for i, e in enumerate(events) if e.round == 3)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            process(folder, events[: killed + 3], [name])
            resume(folder, events[: killed + 3], [name])
        return str(json.loads((folder / FILE).read_text())[name]["id"])

    LOSSES = tuple(
        (e.round, pytest.approx(e.stats.loss))
        for e in live_events()
        if isinstance(e, RoundFinished)
    )

    def test_tensorboard(self, tmp_path: Path) -> None:
        pytest.importorskip("tensorboard", reason="needs tensorboard (an optional extra)")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        self.track(tmp_path, "tensorboard")
        found = EventAccumulator(str(tmp_path / "tensorboard"))
        found.Reload()
        assert tuple((s.step, s.value) for s in found.Scalars("train/loss")) == self.LOSSES
        assert [s.step for s in found.Scalars("perplexity/rank-16")] == list(range(ROUNDS + 1))

    def test_mlflow(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("mlflow", reason="needs mlflow-skinny (an optional extra)")
        from mlflow.tracking import MlflowClient

        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
        run = self.track(tmp_path, "mlflow")
        found = MlflowClient().get_metric_history(run, "train/loss")
        assert tuple((m.step, m.value) for m in found) == self.LOSSES
        assert MlflowClient().get_run(run).data.params["method.name"] == "prelort"

    def test_wandb(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("wandb", reason="needs wandb (an optional extra)")
        monkeypatch.setenv("WANDB_MODE", "offline")
        run = self.track(tmp_path, "wandb")
        assert len(list((tmp_path / "wandb").glob(f"offline-run-*-{run}/run-{run}.wandb"))) >= 1

    def test_dvclive(self, tmp_path: Path) -> None:
        pytest.importorskip("dvclive", reason="needs dvclive")
        self.track(tmp_path, "dvclive")
        file = tmp_path / "dvclive" / "plots" / "metrics" / "train" / "loss.tsv"
        rows = [line.split("\t") for line in file.read_text().splitlines()[1:]]
        assert tuple((int(step), float(value)) for step, value in rows) == self.LOSSES
