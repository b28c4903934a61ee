import importlib.machinery
import json
import sys
import types
import warnings
from typing import ClassVar

import pytest

from prelort.errors import ConfigError
from prelort.report import trackers
from prelort.report.trackers.follow import FILE, Follower, TrackedRun, values_of


class Recorder:
    """A tracker that keeps what it is told; shared by the processes of one test."""

    def __init__(self, fails=()):
        self.calls, self.fails = [], set(fails)

    def __call__(self):
        return self

    def open(self, run, known, first):
        self.calls.append(("open", known, first))
        if "open" in self.fails:
            raise RuntimeError("no network\nsecond line")
        return known or "id-1"

    def log(self, step, values):
        self.calls.append(("log", step))
        if step in self.fails:
            raise ConnectionError("gone")

    def close(self, finished):
        self.calls.append(("close", finished))
        if "close" in self.fails:
            raise OSError("cannot send")

    @property
    def steps(self):
        return [call[1] for call in self.calls if call[0] == "log"]


@pytest.fixture
def run(tmp_path):
    return TrackedRun(tmp_path, {"seed": 0, "method.name": "prelort"})


def follow(recorder, run, events):
    """One process; what it writes is in the run's folder before the listeners hear of it."""
    with Follower({"recorder": recorder}, run) as following:
        for event in events:
            if event["event"] not in ("checkpointed", "resumed"):
                with (run.folder / "metrics.jsonl").open("a") as file:
                    file.write(json.dumps(event) + "\n")
            following(event)


def started_and_measured(make_run, rounds=4):
    events = make_run("prelort", {2: 27.0, 16: 21.0}, every=1, rounds=rounds)
    events.insert(2, {"event": "checkpointed", "round": 0})
    return events


class TestFollower:
    def test_tells_each_round_once(self, run, make_run):
        recorder = Recorder()
        follow(recorder, run, started_and_measured(make_run))
        assert recorder.calls == [
            ("open", None, 0), *(("log", n) for n in range(5)), ("close", True),
        ]  # fmt: skip
        assert json.loads((run.folder / FILE).read_text()) == {
            "recorder": {"id": "id-1", "round": 4}
        }

    @pytest.mark.parametrize("cut", range(2, 34, 3))
    def test_a_resumed_run_goes_on_with_the_same_one(self, run, make_run, cut):
        events = started_and_measured(make_run)
        recorder = Recorder()
        follow(recorder, run, events[:cut])
        done = [e["round"] for e in events[:cut] if e["event"] == "checkpointed"]
        back = max(done, default=0)
        place = next(
            i for i, e in enumerate(events) if e["event"] == "checkpointed" and e["round"] == back
        )
        written = run.folder / "metrics.jsonl"
        # As the log is cut on resuming: at its checkpoint, or where that is the first, altogether.
        kept = [e for e in events[:place] if e["event"] != "checkpointed"] if back else []
        written.write_text("".join(json.dumps(e) + "\n" for e in kept))
        again = [events[0], {"event": "resumed", "round": back}] if back else events[:3]
        follow(recorder, run, [*again, *events[place + 1 :]])
        assert recorder.steps == [0, 1, 2, 3, 4]
        opened = [call for call in recorder.calls if call[0] == "open"]
        assert opened == [("open", None, 0), ("open", "id-1", back + 1 if done else 0)]

    def test_one_added_on_resuming_is_told_what_was(self, run, make_run):
        events = started_and_measured(make_run)
        follow(Recorder(), run, events)
        (run.folder / FILE).unlink()
        recorder = Recorder()
        follow(recorder, run, [{"event": "resumed", "round": 4}])
        assert recorder.steps == []  # it is opened by run_started
        follow(recorder, run, [events[0], {"event": "resumed", "round": 4}])
        assert recorder.steps == [0, 1, 2, 3, 4]

    @pytest.mark.parametrize("where", ["open", 2, "close"])
    def test_trouble_is_one_warning(self, run, make_run, where):
        troubled, sound = Recorder([where]), Recorder()
        events = started_and_measured(make_run)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            with Follower({"mlflow": troubled, "wandb": sound}, run) as following:
                for event in events:
                    following(event)
        (warning,) = told
        assert str(warning.message).startswith(
            "--track mlflow is off, the run goes on without it: "
        )
        assert "\n" not in str(warning.message)
        assert sound.steps == [0, 1, 2, 3, 4]
        assert troubled.steps == {"open": [], 2: [0, 1, 2], "close": [0, 1, 2, 3, 4]}[where]
        # What it was not told, a later process will tell.
        left = json.loads((run.folder / FILE).read_text())["mlflow"]["round"]
        assert left == {"open": -1, 2: 1, "close": 4}[where]

    def test_a_damaged_file_begins_anew(self, run, make_run):
        (run.folder / FILE).write_text('{"recorder": [')
        recorder = Recorder()
        follow(recorder, run, started_and_measured(make_run))
        assert recorder.calls[0] == ("open", None, 0)

    def test_a_run_refused_before_it_begins_leaves_nothing(self, run):
        recorder = Recorder()
        follow(recorder, run, [])
        assert recorder.calls == []
        assert list(run.folder.iterdir()) == []


def test_values_have_names_of_their_own(make_run):
    base, measured = (e for e in make_run("p", {2: 27.0, 16: 21.0}) if e["event"] == "evaluated")
    assert values_of(base)["perplexity/base"] == 700.0
    assert values_of(measured)["perplexity/rank-2"] == pytest.approx(27.0)
    aggregated = next(e for e in make_run("p", {2: 27.0}) if e["event"] == "aggregated")
    assert values_of(aggregated) == {
        "train/loss": pytest.approx(5.24), "bytes/up": 5000.0, "bytes/down": 7500.0,
        "clients/answered": 5.0, "clients/failed": 0.0, "seconds/train": 2.0,
        "seconds/aggregate": 0.1, "seconds/total": 2.1,
    }  # fmt: skip
    own = {"a": {"metrics": {"accuracy": 0.5}}, "b": {"metrics": {"accuracy": 1.0}}}
    at_clients = {"event": "evaluated_at_clients", "round": 1, "clients": own}
    assert values_of(at_clients)["accuracy/clients-mean"] == 0.75
    assert values_of({"event": "aggregated", "round": 1, "loss": None}) == {}
    assert values_of({"event": "something-new", "loss": 1}) == {}


class TestCheck:
    def test_names_what_is_allowed(self):
        with pytest.raises(ConfigError) as error:
            trackers.check(["tensorbord"])
        assert str(error.value) == (
            "--track 'tensorbord' is not known: allowed are tensorboard, mlflow, wandb"
        )

    @pytest.mark.parametrize(
        "name,title", [("tensorboard", "TensorBoard"), ("mlflow", "MLflow"),
                       ("wandb", "Weights & Biases")]
    )  # fmt: skip
    def test_says_what_to_install(self, monkeypatch, name, title):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ConfigError) as error:
            trackers.check([name])
        assert str(error.value) == (f"--track {name} needs {title}: pip install 'prelort[{name}]'")

    def test_a_folder_of_that_name_is_no_library(self, monkeypatch, tmp_path):
        (tmp_path / "wandb").mkdir()
        monkeypatch.setattr(sys, "path", [str(tmp_path)])
        monkeypatch.delitem(sys.modules, "wandb", raising=False)
        importlib.invalidate_caches()
        with pytest.raises(ConfigError, match="needs Weights & Biases"):
            trackers.check(["wandb"])


def stand_in(monkeypatch, name, **attributes):
    """A module that records instead of the library."""
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None, origin="stand-in")
    for key, value in attributes.items():
        setattr(module, key, value)
    monkeypatch.setitem(sys.modules, name, module)


def test_mlflow_gets_params_and_a_batch_a_round(monkeypatch, run, make_run):
    calls = []

    class Client:
        def get_experiment_by_name(self, name):
            calls.append(("experiment", name))

        def create_experiment(self, name):
            return "7"

        def create_run(self, experiment, run_name):
            calls.append(("run", experiment, run_name))
            return types.SimpleNamespace(info=types.SimpleNamespace(run_id="abc"))

        def update_run(self, run_id, status):
            calls.append(("again", run_id, status))

        def log_batch(self, run_id, metrics=(), params=()):
            calls.append(("batch", run_id, list(params), [(m[0], m[3]) for m in metrics]))

        def set_terminated(self, run_id, status):
            calls.append(("end", run_id, status))

    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    stand_in(monkeypatch, "mlflow")
    stand_in(monkeypatch, "mlflow.entities", Param=lambda *a: a, Metric=lambda *a: a)
    stand_in(monkeypatch, "mlflow.tracking", MlflowClient=Client)
    trackers.check(["mlflow"])
    events = make_run("prelort", {2: 27.0}, rounds=1)
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    for part in (events[:1], [events[0], {"event": "resumed", "round": 1}, events[-1]]):
        with trackers.follower(["mlflow"], run) as following:
            for event in part:
                following(event)
    first = [("experiment", "prelort"), ("run", "7", run.folder.name)]
    params = [("seed", "0"), ("method.name", "prelort")]
    assert calls[:4] == [*first, ("batch", "abc", params, []), ("end", "abc", "KILLED")]
    assert calls[4] == ("again", "abc", "RUNNING")
    assert ("perplexity/base", 0) in calls[5][3]
    assert ("train/loss", 1) in calls[6][3]
    assert calls[7:] == [("end", "abc", "FINISHED")]


def test_wandb_gets_the_configuration_and_a_row_a_round(monkeypatch, run, make_run):
    calls = []

    class Run:
        id = "xyz"

        def log(self, values, step):
            calls.append(("log", step, values.get("train/loss")))

        def finish(self, exit_code):
            calls.append(("finish", exit_code))

    def init(**options):
        calls.append(("init", options))
        return Run()

    for variable in ("WANDB_PROJECT", "WANDB_DIR"):
        monkeypatch.delenv(variable, raising=False)
    stand_in(monkeypatch, "wandb", init=init, Settings=lambda **options: options)
    events = make_run("prelort", {2: 27.0}, rounds=1)
    for _ in range(2):
        with trackers.follower(["wandb"], run) as following:
            for event in events:
                following(event)
    options = calls[0][1]
    assert (options["project"], options["id"], options["resume"]) == ("prelort", None, None)
    assert options["config"] == run.params
    assert options["dir"] == str(run.folder)
    assert [call[:2] for call in calls[1:4]] == [("log", 0), ("log", 1), ("finish", 0)]
    assert (calls[4][1]["id"], calls[4][1]["resume"]) == ("xyz", "allow")
    assert calls[5:] == [("finish", 0)]  # nothing is told twice


class TestTheLibraries:
    """With the real libraries, where they are installed; nothing leaves the machine."""

    EXPECTED: ClassVar = [(0, None), (1, 5.24), (2, 4.568)]

    def tell(self, name, run, make_run):
        events = make_run("prelort", {2: 27.0, 16: 21.0}, rounds=2, every=1)
        end = next(i for i, e in enumerate(events) if e["event"] == "checkpointed")
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            for part in (events[: end + 1], [events[0], *events[end + 1 :]]):  # stopped, resumed
                with trackers.follower([name], run) as following:
                    for event in part:
                        following(event)

    def test_tensorboard_reads_it_back(self, run, make_run):
        pytest.importorskip("tensorboard", reason="needs tensorboard (an optional extra)")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        self.tell("tensorboard", run, make_run)
        found = EventAccumulator(str(run.folder / "tensorboard"))
        found.Reload()
        losses = [(s.step, pytest.approx(s.value)) for s in found.Scalars("train/loss")]
        assert losses == self.EXPECTED[1:]
        assert [s.step for s in found.Scalars("perplexity/rank-16")] == [0, 1, 2]
        text = found.Tensors("configuration/text_summary")[0].tensor_proto.string_val[0].decode()
        assert "| method.name | `prelort` |" in text

    def test_mlflow_reads_it_back(self, run, make_run, monkeypatch):
        pytest.importorskip("mlflow", reason="needs mlflow-skinny (an optional extra)")
        from mlflow.tracking import MlflowClient

        monkeypatch.chdir(run.folder)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{run.folder}/mlflow.db")
        self.tell("mlflow", run, make_run)
        name = json.loads((run.folder / FILE).read_text())["mlflow"]["id"]
        found = MlflowClient().get_metric_history(name, "train/loss")
        assert [(m.step, pytest.approx(m.value)) for m in found] == self.EXPECTED[1:]
        assert MlflowClient().get_run(name).info.status == "FINISHED"
        assert MlflowClient().get_run(name).data.params["method.name"] == "prelort"

    def test_wandb_works_offline(self, run, make_run, monkeypatch):
        pytest.importorskip("wandb", reason="needs wandb (an optional extra)")
        monkeypatch.setenv("WANDB_MODE", "offline")
        self.tell("wandb", run, make_run)
        name = json.loads((run.folder / FILE).read_text())["wandb"]["id"]
        assert list((run.folder / "wandb").glob(f"offline-run-*-{name}/run-{name}.wandb"))
