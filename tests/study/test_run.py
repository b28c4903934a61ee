"""A study is run cell by cell: it continues where it stopped and repeats nothing."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

import prelort
from prelort.config import Config, to_toml
from prelort.errors import ConfigError
from prelort.events import Checkpointed, Event, RoundFinished
from prelort.experiment.folder import RunFolder
from prelort.history import RunHistory
from prelort.report.results import Results
from prelort.study.definition import Study, load
from prelort.study.results import wait_for
from prelort.study.run import run_study
from prelort.study.worker import Job, Worker
from run_files import adapters_of

METHODS = ["prelort", "mean", "fedit"]
SECTION = """
[compare]
methods = ["prelort", "mean", "fedit"]
seeds = [0, 1]
[compare.settings]
"two steps" = []
"three steps" = ["training.local_steps=3", "training.gradient_accumulation=2"]
[compare.overrides]
mean = ["method.name=prelort", "method.objective=mean"]
"""
ONE = '[compare]\nmethods = ["prelort"]\nseeds = [0]\n'
TWO = '[compare]\nmethods = ["prelort", "zero-padding"]\nseeds = [0]\n'
NEEDS_ONE_RANK = "method 'fedit' needs one rank for all clients"


@dataclass
class Record:
    """What a display was given to show."""

    kept_cells: int = 0
    begun: list[str] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)
    rounds: dict[str, list[int]] = field(default_factory=dict)

    def skipped(self, cells: int) -> None:
        self.kept_cells = cells

    def started(self, name: str) -> None:
        self.begun.append(name)

    def event(self, name: str, event: Event) -> None:
        if isinstance(event, RoundFinished):
            self.rounds.setdefault(name, []).append(event.round)

    def ended(self, name: str, reason: str = "") -> None:
        self.reasons[name] = reason


Write = Callable[..., Path]
Finished = tuple[Study, Path, Results, Record]


@pytest.fixture(scope="module")
def write(tmp_path_factory: pytest.TempPathFactory, make_config: Callable[..., Config]) -> Write:
    """Writes a study's file: a tiny run, and the section ``[compare]``."""

    def write(section: str = SECTION, **changes: Any) -> Path:
        changes = {"federation": {"rounds": 2, "clients_per_round": 3}, **changes}
        file = tmp_path_factory.mktemp("study") / "study.toml"
        file.write_text(to_toml(make_config(**changes)) + section)
        return file

    return write


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, write: Write) -> Finished:
    """A study that is finished; its third method failed in all its cells."""
    study, out, record = load(write()), tmp_path_factory.mktemp("out") / "study", Record()
    return study, out, run_study(study, out, record), record


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def history_of(run: Path) -> RunHistory:
    return RunFolder(run).history()


class TestResults:
    def test_every_cell_has_its_own_run(self, finished: Finished) -> None:
        study, out, results, record = finished
        assert len(results.cells) == 12
        done = {cell.method for cell in results.cells if cell.status == "finished"}
        assert done == set(METHODS) - {"fedit"}
        assert record.kept_cells == 0
        for cell in study.cells:
            rounds = record.rounds.get(cell.name)
            assert rounds == (None if cell.method == "fedit" else [1, 2])
            assert (out / cell.folder / "adapters").is_dir() == (cell.method != "fedit")

    def test_a_cell_that_fails_has_its_reason_and_the_others_are_run(
        self, finished: Finished
    ) -> None:
        _, out, results, record = finished
        failed = [cell for cell in results.cells if cell.status == "failed"]
        assert len(failed) == 4
        assert all(cell.reason.startswith(NEEDS_ONE_RANK) for cell in failed)
        assert sum(bool(reason) for reason in record.reasons.values()) == 4
        for name in ("results.md", "cells.csv"):
            assert NEEDS_ONE_RANK.split("'")[2] in (out / name).read_text()
        assert not (out / "two-steps" / "fedit" / "seed-0").exists()

    def test_costs_are_those_of_the_runs(self, finished: Finished) -> None:
        study, out, _, _ = finished
        rows = {(r["setting"], r["method"], r["seed"]): r for r in table(out / "cells.csv")}
        for cell in study.cells:
            row = rows[cell.setting, cell.method, str(cell.seed)]
            if cell.method == "fedit":
                assert row["status"] == "failed"
                continue
            history = history_of(out / cell.folder)
            assert int(row["bytes_up"]) == history.bytes_up > 0
            replies = [r for record in history.rounds.values() for r in record.replies.values()]
            steps, accumulated = (2, 1) if cell.setting == "two steps" else (3, 2)
            # Rank levels 2, 4 and 8: a client of rank 8 has three of them under `mean`.
            passes = {2: 1, 4: 2, 8: 3} if cell.method == "mean" else {2: 1, 4: 1, 8: 1}
            expected = sum(passes[reply.rank] for reply in replies) * steps * accumulated
            assert int(row["passes"]) == expected
            assert float(row["train_seconds"]) == pytest.approx(sum(r.seconds for r in replies))


class TestContinuing:
    def test_finished_cells_are_kept_and_failed_ones_tried_again(self, finished: Finished) -> None:
        study, out, _, _ = finished
        logs = sorted(out.rglob("metrics.jsonl"))
        before = {log: (log.read_bytes(), log.stat().st_mtime_ns) for log in logs}
        assert len(before) == 8
        again = Record()
        run_study(study, out, again)
        assert again.kept_cells == 8
        assert len(again.begun) == 4
        assert all("fedit" in name for name in again.begun)
        assert {log: (log.read_bytes(), log.stat().st_mtime_ns) for log in logs} == before

    def test_more_seeds_and_methods_join(self, tmp_path: Path, write: Write) -> None:
        file, more = write(ONE), Record()
        run_study(load(file), tmp_path / "out")
        study = load(file, methods=["prelort", "zero-padding"], seeds=[0, 1])
        results = run_study(study, tmp_path / "out", more)
        assert more.kept_cells == 1
        assert "prelort, seed 0" not in more.begun
        assert len(more.begun) == 3
        assert all(cell.status == "finished" for cell in results.cells)

    def test_another_configuration_is_refused_before_anything_runs(
        self, tmp_path: Path, write: Write
    ) -> None:
        file, record = write(ONE), Record()
        run_study(load(file), tmp_path / "out")
        before = (tmp_path / "out" / "study.toml").read_text()
        changed = load(file, ["training.learning_rate=0.5"], methods=["zero-padding", "prelort"])
        with pytest.raises(ConfigError, match=r"these keys differ: training.learning_rate\."):
            run_study(changed, tmp_path / "out", record)
        assert record.begun == []
        assert (tmp_path / "out" / "study.toml").read_text() == before

    def test_a_folder_of_something_else_is_refused(self, tmp_path: Path, write: Write) -> None:
        (tmp_path / "thesis.txt").write_text("mine")
        with pytest.raises(ConfigError, match="holds no study"):
            run_study(load(write()), tmp_path)
        with pytest.raises(ConfigError, match="is not empty: choose another --out"):
            run_study(load(write()), tmp_path, new=True)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["thesis.txt"]

    def test_interrupted_it_writes_the_results_so_far(self, tmp_path: Path, write: Write) -> None:
        study, out = load(write(TWO)), tmp_path / "out"

        class Impatient(Record):
            def event(self, name: str, event: Event) -> None:
                if name.startswith("zero") and isinstance(event, Checkpointed) and event.round:
                    raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run_study(study, out, Impatient())
        assert "after round 1 of 2" in (out / "results.md").read_text()
        assert (out / "report.html").is_file()
        second = Record()
        results = run_study(study, out, second)
        assert all(cell.status == "finished" for cell in results.cells)
        assert second.rounds == {"zero-padding, seed 0": [2]}

    @pytest.mark.parametrize("jobs", [1, pytest.param(2, marks=pytest.mark.chaos)])
    def test_if_every_cell_is_refused_nothing_is_left(
        self, tmp_path: Path, write: Write, jobs: int
    ) -> None:
        study = load(write(TWO), ["data.text_column=txt"])
        with pytest.raises(ConfigError, match="'txt'"):
            run_study(study, tmp_path / "out", jobs=jobs)
        assert list(tmp_path.iterdir()) == []


class TestReading:
    def test_a_folder_that_is_no_study_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "mine").write_text("mine")
        with pytest.raises(ConfigError, match="holds no run"):
            prelort.read(tmp_path)
        with pytest.raises(ConfigError, match="holds no run"):
            wait_for(tmp_path, 0)

    def test_a_damaged_log_is_the_reason_why_a_cell_has_no_result(
        self, tmp_path: Path, write: Write
    ) -> None:
        out = tmp_path / "out"
        run_study(load(write(TWO)), out)
        with (out / "prelort" / "seed-0" / "metrics.jsonl").open("a") as log:
            log.write("no event\n")
        first, second = prelort.read(out).cells
        assert (first.status, second.status) == ("failed", "finished")
        assert "is not an event" in first.reason
        with pytest.raises(prelort.PrelortError, match="is not an event"):
            prelort.read(out / "prelort" / "seed-0")


KILLED_ROUNDS = 60


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, write: Write) -> tuple[Path, Path]:
    """A study of two longer runs, and the folder in which it was run to its end."""
    file = write(
        TWO,
        federation={"rounds": KILLED_ROUNDS, "clients_per_round": 1},
        training={"local_steps": 1},
        evaluation={"diagnostics": False},
    )
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    run_study(load(file), out)
    return file, out


@pytest.mark.chaos
@pytest.mark.parametrize("jobs", [1, 2])
def test_killed_it_continues_to_the_same_bits(
    tmp_path: Path, undisturbed: tuple[Path, Path], jobs: int
) -> None:
    file, expected = undisturbed
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "prelort", "compare", str(file), "--out", str(out), "-q"]
    process = subprocess.Popen([*command, "--jobs", str(jobs)], stderr=subprocess.PIPE)
    # One at a time, the second cell shows that the first is finished.
    last = out / "zero-padding" / "seed-0"
    try:
        wait_until(lambda: any((last / "checkpoints").glob("000[1-9]*")), process)
        family = psutil.Process(process.pid).children(recursive=True)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert not history_of(last).finished
    gone, alive = psutil.wait_procs(family, timeout=20)
    assert alive == []
    assert bool(gone) == (jobs > 1)  # they end with the process that started them

    record, study = Record(), load(file)
    results = run_study(study, out, record)
    assert all(cell.status == "finished" for cell in results.cells)
    assert 0 < len(record.rounds["zero-padding, seed 0"]) <= KILLED_ROUNDS - 9
    if jobs == 1:
        assert record.begun == ["zero-padding, seed 0"]
    for cell in study.cells:
        found, right = adapters_of(out / cell.folder), adapters_of(expected / cell.folder)
        assert found == right
        assert sum(name.endswith("adapter_model.safetensors") for name in right) == 3  # ranks


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    ends = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < ends
        time.sleep(0.01)


@pytest.fixture
def own_methods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Methods of the user's own: one that prints, and one whose process dies."""
    (tmp_path / "own.py").write_text(
        "import os, signal, sys\nfrom prelort.methods import PrefixMethod\n"
        "class Talking(PrefixMethod):\n"
        "    name = 'talking'\n    summary = paper = ''\n    default_objective = 'plain'\n"
        "    def check(self, state, clients):\n"
        '        print(\'{"reason": "printed"}\', flush=True)\n'
        "        print('an earlier word', file=sys.stderr)\n"
        "class Dying(Talking):\n"
        "    def check(self, state, clients):\n        os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))


@pytest.mark.chaos
class TestSideBySide:
    def test_gives_the_same_adapters_and_events(
        self, finished: Finished, write: Write, tmp_path: Path
    ) -> None:
        _, alone, _, _ = finished
        section = SECTION.replace(SECTION.splitlines()[6], "")
        study = load(write(section), methods=["prelort", "fedit"], seeds=[1])
        assert study.settings == ("two steps",)
        record = Record()
        results = run_study(study, tmp_path / "out", record, jobs=2)
        assert record.rounds == {"two steps, prelort, seed 1": [1, 2]}
        first, second = results.cells
        assert (first.status, second.status) == ("finished", "failed")
        assert second.reason.startswith(NEEDS_ONE_RANK)
        folder = study.cells[0].folder
        assert adapters_of(tmp_path / "out" / folder) == adapters_of(alone / folder)

    def test_each_has_its_share_of_the_cores_and_keeps_it(
        self, tmp_path: Path, write: Write
    ) -> None:
        file, out = write(TWO), tmp_path / "out"
        file.write_text(file.read_text().replace("threads = 1\n", ""))
        study = load(file)
        assert study.base.threads is None
        run_study(study, out, jobs=2)
        share = max(1, (os.cpu_count() or 1) // 2)
        for cell in study.cells:
            assert RunFolder(out / cell.folder).read_config().threads == share
        record = Record()
        run_study(study, out, record)  # not another configuration
        assert record.kept_cells == 2
        with pytest.raises(ConfigError, match="keys differ: threads"):
            run_study(load(file, [f"threads={share + 1}"]), out)

    @pytest.mark.usefixtures("own_methods")
    def test_a_worker_is_kept_for_the_next_cell_and_replaced_if_it_died(
        self, tmp_path: Path, write: Write
    ) -> None:
        names = ["own:Talking", "fedit", "own:Dying", "prelort"]
        study = load(write(f"[compare]\nmethods = {json.dumps(names)}\nseeds = [0]\n"))
        worker, reasons = Worker(), []
        children: list[set[int]] = []
        try:
            for cell in study.cells:
                order = Job(cell.config, tmp_path / "out" / cell.folder)
                reasons.append(worker.run(order, lambda event: None))
                children.append({p.pid for p in psutil.Process().children() if p.is_running()})
        finally:
            worker.close()
        assert [reasons[0], reasons[3]] == ["", ""]
        assert reasons[1].startswith(NEEDS_ONE_RANK)
        assert reasons[2] == "its process was killed by signal 9"
        assert children[0] == children[1] != children[3]
        assert worker.run(order, lambda event: None) == "stopped"


def test_all_methods_of_a_cell_train_the_same_clients_on_the_same_batches(
    tmp_path: Path, write: Write
) -> None:
    """In the first round, before they differ: losses to the bit."""
    study, out = load(write(TWO), ["method.objective=plain"]), tmp_path / "out"
    first, second = run_study(study, out).cells
    records = [cell.history.rounds[1] for cell in (first, second)]
    assert records[0].clients == records[1].clients
    losses = [{name: r.loss for name, r in record.replies.items()} for record in records]
    assert losses[0] == losses[1]
    assert len({(out / cell.folder / "clients.txt").read_text() for cell in study.cells}) == 1
    (other,) = run_study(load(write(ONE), seeds=[1]), tmp_path / "other").cells
    assert {name: r.loss for name, r in other.history.rounds[1].replies.items()} != losses[0]
