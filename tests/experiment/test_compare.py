"""A study is run cell by cell: it goes on where it has stopped and repeats nothing."""

import csv
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from prelort.config import Config, to_toml
from prelort.errors import ConfigError
from prelort.experiment.compare import run as module
from prelort.experiment.compare.run import compare
from prelort.experiment.compare.study import Study, load
from prelort.methods import REGISTRY
from prelort.metrics.scores import aurac
from prelort.report.compared.grid import Grid
from prelort.report.events import Event, base_row, final_evaluation, read, totals
from run_files import adapters_of

METHODS = ["prelort", "zero-padding", "mean", "fedit"]
SECTION = """
[compare]
methods = ["prelort", "zero-padding", "mean", "fedit"]
seeds = [0, 1]
[compare.settings]
"two steps" = []
"three steps" = ["training.local_steps=3", "training.gradient_accumulation=2"]
[compare.overrides]
mean = ["method.name=prelort", "method.objective=mean"]
"""
NEEDS_ONE_RANK = "method 'fedit' needs one rank for all clients"


class Watcher:
    """What a study has told."""

    def __init__(self) -> None:
        self.kept_cells = 0
        self.begun: list[str] = []
        self.reasons: dict[str, str] = {}
        self.rounds: dict[str, list[int]] = {}

    def kept(self, cells: int) -> None:
        self.kept_cells = cells

    def began(self, name: str) -> None:
        self.begun.append(name)

    def heard(self, name: str, event: Event) -> None:
        if event["event"] == "aggregated":
            self.rounds.setdefault(name, []).append(event["round"])

    def ended(self, name: str, reason: str) -> None:
        self.reasons[name] = reason


Write = Callable[..., Path]


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
def finished(
    tmp_path_factory: pytest.TempPathFactory, write: Write
) -> tuple[Study, Path, Grid, Watcher]:
    """A study that has come to its end: its fourth method fails in all its cells."""
    study, out, watcher = load(write()), tmp_path_factory.mktemp("out") / "study", Watcher()
    return study, out, compare(study, out, watcher), watcher


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


class TestTheResults:
    def test_every_cell_has_a_run_of_its_own(
        self, finished: tuple[Study, Path, Grid, Watcher]
    ) -> None:
        study, _, grid, watcher = finished
        assert len(grid.cells) == 16
        assert {cell.method for cell in grid.cells if cell.finished} == set(METHODS) - {"fedit"}
        assert watcher.kept_cells == 0
        assert set(watcher.begun) == {cell.name for cell in study.cells}
        for cell in study.cells:
            done = watcher.rounds.get(cell.name)
            assert done == (None if cell.method == "fedit" else [1, 2])

    def test_a_cell_that_fails_is_told_with_its_reason_and_the_others_go_on(
        self, finished: tuple[Study, Path, Grid, Watcher]
    ) -> None:
        _, out, grid, watcher = finished
        failed = [cell for cell in grid.cells if cell.status == "failed"]
        assert len(failed) == 4
        assert all(cell.reason.startswith(NEEDS_ONE_RANK) for cell in failed)
        assert sum(bool(reason) for reason in watcher.reasons.values()) == 4
        for name in ("results.md", "report.html", "cells.csv"):
            assert NEEDS_ONE_RANK.split("'")[2] in (out / name).read_text()
        assert not (out / "cells" / "two-steps" / "fedit" / "seed-0").exists()

    def test_the_measurements_are_those_of_the_runs(
        self, finished: tuple[Study, Path, Grid, Watcher]
    ) -> None:
        study, out, _, _ = finished
        rows = table(out / "measurements.csv")
        for cell in study.cells:
            if cell.method == "fedit":
                continue
            events = read(out / cell.folder / "metrics.jsonl")
            final = final_evaluation(events)
            assert final is not None
            own = [
                row
                for row in rows
                if (row["setting"], row["method"], row["seed"])
                == (cell.setting, cell.method, str(cell.seed))
                and row["metric"] == "perplexity"
            ]
            last = {int(r["rank"]): float(r["value"]) for r in own if r["round"] == "2"}
            assert last == final.by_rank("perplexity")
            (base,) = (float(r["value"]) for r in own if r["rank"] == "base")
            assert base == base_row(events)["perplexity"]

    def test_the_summary_is_made_of_the_measurements(
        self, finished: tuple[Study, Path, Grid, Watcher]
    ) -> None:
        _, out, _, _ = finished
        curves: dict[tuple[str, str, str], dict[int, float]] = {}
        for row in table(out / "measurements.csv"):
            if row["metric"] == "perplexity" and row["round"] == "2":
                key = (row["setting"], row["method"], row["seed"])
                curves.setdefault(key, {})[int(row["rank"])] = float(row["value"])
        areas = {key: aurac(curve) for key, curve in curves.items()}
        (row,) = (
            row
            for row in table(out / "summary.csv")
            if (row["setting"], row["method"], row["at"]) == ("two steps", "zero-padding", "AURAC")
        )
        own = [areas["two steps", "zero-padding", seed] for seed in "01"]
        apart = [area - areas["two steps", "prelort", seed] for seed, area in enumerate_str(own)]
        assert float(row["mean"]) == pytest.approx(statistics.mean(own))
        assert float(row["deviation"]) == pytest.approx(statistics.stdev(own))
        assert float(row["difference"]) == pytest.approx(statistics.mean(apart))
        assert (float(row["low"]), float(row["high"])) == pytest.approx((min(apart), max(apart)))
        assert (row["seeds"], row["pairs"], row["reference"]) == ("2", "2", "prelort")

    def test_costs_are_counted(self, finished: tuple[Study, Path, Grid, Watcher]) -> None:
        study, out, _, _ = finished
        rows = {(r["setting"], r["method"], r["seed"]): r for r in table(out / "cells.csv")}
        for cell in study.cells:
            row = rows[cell.setting, cell.method, str(cell.seed)]
            assert row["status"] == ("failed" if cell.method == "fedit" else "finished")
            if cell.method == "fedit":
                continue
            events = read(out / cell.folder / "metrics.jsonl")
            assert int(row["bytes_up"]) == totals(events).bytes_up > 0
            assert int(row["bytes_down"]) == totals(events).bytes_down > 0
            replies = [e for e in events if e["event"] == "client_finished"]
            assert len(replies) == 6
            steps, accumulated = (2, 1) if cell.setting == "two steps" else (3, 2)
            # Rank levels 2, 4 and 8: a client of rank 8 has three of them under `mean`.
            a_step = {2: 1, 4: 2, 8: 3} if cell.method == "mean" else {2: 1, 4: 1, 8: 1}
            passes = sum(a_step[e["rank"]] for e in replies) * steps * accumulated
            assert int(row["passes"]) == passes
            assert float(row["train_seconds"]) == pytest.approx(sum(e["seconds"] for e in replies))

    def test_tables_page_and_pictures_have_every_method_and_setting(
        self, finished: tuple[Study, Path, Grid, Watcher]
    ) -> None:
        study, out, _, _ = finished
        for name in ("results.md", "report.html"):
            text = (out / name).read_text()
            for word in (*METHODS, *study.settings, "AURAC", "lower is better"):
                assert word in text, (name, word)
        for setting in ("two-steps", "three-steps"):
            assert (out / f"{setting}.png").read_bytes().startswith(b"\x89PNG")

    def test_all_methods_of_a_cell_have_the_same_base(
        self, finished: tuple[Study, Path, Grid, Watcher]
    ) -> None:
        _, _, grid, _ = finished
        for setting in grid.settings:
            rows = {
                (cell.seed, base_row(cell.events)["perplexity"]) for cell in grid.finished(setting)
            }
            assert len(rows) == len(grid.seeds)


def enumerate_str(values: list[float]) -> Iterator[tuple[str, float]]:
    return ((str(index), value) for index, value in enumerate(values))


class TestGoingOn:
    def test_finished_cells_are_not_run_again(
        self, finished: tuple[Study, Path, Grid, Watcher], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        study, out, _, _ = finished
        logs = sorted(out.rglob("metrics.jsonl"))
        before = {log: (log.read_bytes(), log.stat().st_mtime_ns) for log in logs}
        assert len(before) == 12
        monkeypatch.setattr(module.running, "run_here", lambda *arguments: "refused")
        again = Watcher()
        compare(study, out, again)
        assert again.kept_cells == 12
        assert {name.split(", ")[1] for name in again.begun} == {"fedit"}
        assert {log: (log.read_bytes(), log.stat().st_mtime_ns) for log in logs} == before

    def test_more_seeds_and_methods_join_what_is_there(self, tmp_path: Path, write: Write) -> None:
        file = write('[compare]\nmethods = ["prelort"]\nseeds = [0]\n')
        compare(load(file), tmp_path / "out", Watcher())
        more = Watcher()
        study = load(file, names=["prelort", "zero-padding"], seeds=[0, 1])
        grid = compare(study, tmp_path / "out", more)
        assert more.kept_cells == 1
        assert "prelort, seed 0" not in more.begun
        assert len(more.begun) == 3
        assert all(cell.finished for cell in grid.cells)

    def test_a_cell_of_another_configuration_is_refused_before_anything_runs(
        self, tmp_path: Path, write: Write
    ) -> None:
        file = write('[compare]\nmethods = ["prelort"]\nseeds = [0]\n')
        compare(load(file), tmp_path / "out", Watcher())
        watcher = Watcher()
        changed = load(file, ["training.learning_rate=0.5"], names=["zero-padding", "prelort"])
        with pytest.raises(
            ConfigError, match=r"these keys differ: training.learning_rate\. Choose"
        ):
            compare(changed, tmp_path / "out", watcher)
        assert watcher.begun == []

    def test_a_folder_of_something_else_is_refused(self, tmp_path: Path, write: Write) -> None:
        (tmp_path / "thesis.txt").write_text("mine")
        with pytest.raises(ConfigError, match="holds no study"):
            compare(load(write()), tmp_path, Watcher())
        assert sorted(p.name for p in tmp_path.iterdir()) == ["thesis.txt"]

    def test_one_process_at_a_time(self, tmp_path: Path, write: Write) -> None:
        study = load(write('[compare]\nmethods = ["prelort"]\nseeds = [0]\n'))
        with (
            module.claimed(tmp_path / "out"),
            pytest.raises(ConfigError, match="is in use: another prelort compare"),
        ):
            compare(study, tmp_path / "out", Watcher())

    def test_interrupted_it_writes_what_there_is(self, tmp_path: Path, write: Write) -> None:
        study = load(write('[compare]\nmethods = ["prelort", "zero-padding"]\nseeds = [0]\n'))

        class Impatient(Watcher):
            def heard(self, name: str, event: Event) -> None:
                if name.startswith("zero") and event["event"] == "checkpointed" and event["round"]:
                    raise KeyboardInterrupt

        out = tmp_path / "out"
        with pytest.raises(KeyboardInterrupt):
            compare(study, out, Impatient())
        assert (
            "zero-padding, seed 0 | stopped | after round 1 of 2"
            in (out / "results.md").read_text()
        )
        assert (out / "report.html").is_file()
        second = Watcher()
        assert all(cell.finished for cell in compare(study, out, second).cells)
        assert second.rounds == {"zero-padding, seed 0": [2]}


KILLED_ROUNDS = 60


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, write: Write) -> tuple[Path, Path]:
    """A study of two longer runs, and the folder in which it has come to its end."""
    file = write(
        '[compare]\nmethods = ["prelort", "zero-padding"]\nseeds = [0]\n',
        federation={"rounds": KILLED_ROUNDS, "clients_per_round": 1},
        training={"local_steps": 1},
        evaluation={"diagnostics": False},
    )
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    compare(load(file), out, Watcher())
    return file, out


@pytest.mark.parametrize("jobs", [1, 2])
def test_killed_in_the_middle_it_goes_on_to_the_same_bits(
    tmp_path: Path, undisturbed: tuple[Path, Path], jobs: int
) -> None:
    file, expected = undisturbed
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "prelort.cli", "compare", str(file), "--out", str(out), "-q"]
    process = subprocess.Popen([*command, "--jobs", str(jobs)], stderr=subprocess.PIPE)
    # One at a time the second cell shows that the first is finished.
    last = out / "cells" / "zero-padding" / "seed-0"
    try:
        wait_until(lambda: any((last / "checkpoints").glob("000[1-9]*")), process)
        family = psutil.Process(process.pid).children(recursive=True)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert not is_done(last)
    gone, alive = psutil.wait_procs(family, timeout=20)
    assert alive == []
    assert bool(gone) == (jobs > 1)  # they end with the process that has started them

    watcher = Watcher()
    study = load(file)
    grid = compare(study, out, watcher)
    assert all(cell.finished for cell in grid.cells)
    assert 0 < len(watcher.rounds["zero-padding, seed 0"]) <= KILLED_ROUNDS - 9
    if jobs == 1:
        assert watcher.begun == ["zero-padding, seed 0"]
    for cell in study.cells:
        found, right = adapters_of(out / cell.folder), adapters_of(expected / cell.folder)
        assert found == right
        assert len(right) == 3


def is_done(folder: Path) -> bool:
    return '"run_finished"' in (folder / "metrics.jsonl").read_text()


def wait_until(condition: Callable[[], bool], process: "subprocess.Popen[bytes]") -> None:
    ends = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < ends
        time.sleep(0.01)


class TestSideBySide:
    def test_gives_the_same_adapters_and_tells_what_fails(
        self, finished: tuple[Study, Path, Grid, Watcher], write: Write, tmp_path: Path
    ) -> None:
        _, alone, _, _ = finished
        section = SECTION.replace(SECTION.splitlines()[6], "")
        study = load(write(section), names=["zero-padding", "fedit"], seeds=[1])
        assert study.settings == ("two steps",)
        watcher = Watcher()
        grid = compare(study, tmp_path / "out", watcher, jobs=2)
        assert watcher.rounds["two steps, zero-padding, seed 1"] == [1, 2]
        assert {(cell.method, cell.status) for cell in grid.cells} == {
            ("zero-padding", "finished"),
            ("fedit", "failed"),
        }
        assert all(c.reason.startswith(NEEDS_ONE_RANK) for c in grid.cells if c.method == "fedit")
        for cell in study.cells:
            if cell.method == "zero-padding":
                assert adapters_of(tmp_path / "out" / cell.folder) == adapters_of(
                    alone / cell.folder
                )

    def test_each_has_its_share_of_the_cores_and_keeps_it(
        self, tmp_path: Path, write: Write, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        section = '[compare]\nmethods = ["prelort", "zero-padding"]\nseeds = [0]\n'
        text = write(section).read_text().replace("threads = 1\n", "")
        (tmp_path / "study.toml").write_text(text)
        study = load(tmp_path / "study.toml")
        assert study.base.threads is None
        given: dict[str, int | None] = {}

        def run(apart: Any, folder: Path, config: Config, *more: Any) -> str:
            given[config.method.name] = config.threads
            return "not run"

        monkeypatch.setattr(os, "cpu_count", lambda: 6)
        monkeypatch.setattr(module.running.Apart, "run", run)
        compare(study, tmp_path / "out", Watcher(), jobs=2)
        assert given == {"prelort": 3, "zero-padding": 3}
        begun = study.cells[0]
        (tmp_path / "out" / begun.folder).mkdir(parents=True)
        kept = begun.config.model_copy(update={"threads": 5})
        (tmp_path / "out" / begun.folder / "config.toml").write_text(to_toml(kept))
        compare(study, tmp_path / "out", Watcher(), jobs=2)
        assert given == {"prelort": 5, "zero-padding": 3}

    def test_a_process_that_dies_is_a_reason(
        self, tmp_path: Path, write: Write, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        text = '[compare]\nmethods = ["dying:Dying", "prelort"]\nseeds = [0]\n'
        (tmp_path / "dying.py").write_text(
            "import os, signal\nfrom prelort.methods import PrefixMethod\n"
            "class Dying(PrefixMethod):\n"
            "    name = 'dying'\n    summary = paper = ''\n    default_objective = 'plain'\n"
            "    def check(self, clients):\n        os.kill(os.getpid(), signal.SIGKILL)\n"
        )
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
        grid = compare(load(write(text)), tmp_path / "out", Watcher(), jobs=2)
        status = {cell.method: (cell.status, cell.reason) for cell in grid.cells}
        assert status["prelort"] == ("finished", "")
        assert status["dying:Dying"][0] == "failed"
        assert "killed by signal 9" in status["dying:Dying"][1]

    def test_a_process_is_kept_for_the_next_cell_and_replaced_if_it_died(
        self, tmp_path: Path, write: Write, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        names = ["talking:Talking", "fedit", "talking:Dying", "prelort"]
        text = f"[compare]\nmethods = {json.dumps(names)}\nseeds = [0]\n"
        (tmp_path / "talking.py").write_text(
            "import os, signal, sys\nfrom prelort.methods import PrefixMethod\n"
            "class Talking(PrefixMethod):\n"
            "    name = 'talking'\n    summary = paper = ''\n    default_objective = 'plain'\n"
            "    def check(self, clients):\n"
            "        print('heard by', 'nobody', flush=True)\n"
            "        print('an earlier word', file=sys.stderr)\n"
            "class Dying(Talking):\n"
            "    def check(self, clients):\n        os.kill(os.getpid(), signal.SIGKILL)\n"
        )
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
        study = load(write(text))
        apart = module.running.Apart(threading.Event())
        numbers, reasons = [], []
        try:
            for cell in study.cells:
                folder = tmp_path / "out" / cell.folder
                reasons.append(apart.run(folder, cell.config, lambda event: None))
                assert apart._process is not None
                numbers.append(apart._process.pid)
        finally:
            apart.close()
        assert [reasons[0], reasons[3]] == ["", ""]
        assert reasons[1].startswith(NEEDS_ONE_RANK)
        assert reasons[2] == "its process was killed by signal 9"
        assert numbers[0] == numbers[1] == numbers[2] != numbers[3]


def test_all_methods_of_a_cell_train_the_same_clients_on_the_same_batches(
    tmp_path: Path, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prelort.training import local

    drawn: dict[str, list[Any]] = {}
    current = [""]
    real = local.batches

    def recorded(examples: int, config: Any, **what: Any) -> Iterator[list[int]]:
        for batch in real(examples, config, **what):
            drawn[current[0]].append((what["client"], what["round_index"], tuple(batch)))
            yield batch

    class Recorder(Watcher):
        def began(self, name: str) -> None:
            current[0] = name
            drawn[name] = []

    monkeypatch.setattr(local, "batches", recorded)
    names = [name for name in REGISTRY if name != "fedit"]  # which refuses mixed ranks
    section = f"[compare]\nmethods = {json.dumps(names)}\nseeds = [0]\n"
    study_file = write(section, evaluation={"diagnostics": False})
    study = load(study_file)
    grid = compare(study, tmp_path / "out", Recorder())
    assert all(cell.finished for cell in grid.cells), [c.reason for c in grid.cells]
    first = drawn["prelort, seed 0"]
    assert len(first) == 2 * 3 * 2  # rounds, clients, steps
    for name in names:
        assert sorted(drawn[f"{name}, seed 0"]) == sorted(first), name
    clients = {(tmp_path / "out" / c.folder / "clients.txt").read_text() for c in study.cells}
    assert len(clients) == 1  # who holds how much, and has which rank
    assert grid.unlike("") == []
    compare(load(study_file, names=["prelort"], seeds=[1]), tmp_path / "out", Recorder())
    assert sorted(drawn["prelort, seed 1"]) != sorted(first)
