"""The studies' own code: data, rates, tables, and the sandbox that runs generated programs."""

from __future__ import annotations

import gzip
import json
import time
import tomllib
from pathlib import Path
from typing import Any

import by_task
import claims
import prepare
import pytest
import raised
import run
import sandbox
import tables

from prelort.events import (
    ClientMetrics,
    ClientsEvaluated,
    Event,
    EventLog,
    RankChanged,
    RunFinished,
)
from prelort.study.definition import load

ROOT = Path(__file__).parents[2]
STUDIES = Path(__file__).parent


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


class TestConfigurations:
    @pytest.mark.parametrize("name", run.ORDER)
    def test_each_study_is_one_and_names_no_place_on_a_machine(self, name: str) -> None:
        file = STUDIES / f"{name}.toml"
        assert len(load(file).compare.seeds) >= 3
        written = tomllib.loads(file.read_text())  # a loaded study has paths as they are here
        data, model = written.get("data", {}), written.get("model", {})
        for path in (data.get("source"), data.get("test"), model.get("name")):
            assert path in (None, "embedded") or path.startswith("runs/studies/")

    def test_all_studies_are_run(self) -> None:
        studies = {path.stem for path in STUDIES.glob("*.toml") if "[compare]" in path.read_text()}
        assert studies == set(run.ORDER)


class TestPrepare:
    @pytest.fixture
    def data(self, tmp_path: Path) -> Path:
        data = tmp_path / "data"
        files = {
            "trec/TREC.train.all": '0 How did serfdom develop ?\n3 Who, "exactly", was Galileo ?\n',
            "trec/TREC.test.all": "1 What is caf\xe9 ?\n",
            "sst2/train.tsv": "sentence\tlabel\ngood \t1\na good  film \t1\nnot good \t0\n",
            "e2e/valid.txt": (
                "name : Alimentum | food : Chinese||It is Chinese .\nname : The Eagle||A pub .\n"
            ),
            "superni/task1_a/train.json": json.dumps(
                {
                    "Definition": ["Say it."],
                    "Instances": [{"input": "x", "output": ["y", "z"]}],
                }
            ),
            "superni/task2_b/train.json": json.dumps(
                {"Definition": "Do it.", "Instances": [{"input": "u", "output": "v"}]}
            ),
            "mbpp/mbpp.jsonl": "\n".join(
                json.dumps(
                    {
                        "task_id": number,
                        "text": "Add.",
                        "code": "def f():\r\n  return 1",
                        "test_list": ["assert f() == 1"],
                        "test_setup_code": "import math",
                    }
                )
                for number in (1, 11, 510, 511, 601, 974)
            ),
            "ag_news/train.jsonl": "\n".join(
                json.dumps({"text": f"{label} {number}", "label": label})
                for label in ("World", "Sports", "Business", "Science")
                for number in range(1000)
            ),
        }
        for name, text in files.items():
            path = data / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text.encode("latin-1" if "trec" in name else "utf-8"))
        (data / "humaneval").mkdir()
        with gzip.open(data / "humaneval" / "HumanEval.jsonl.gz", "wt") as file:
            problem = {
                "prompt": "def f():\n",
                "canonical_solution": "    return 1",
                "test": "def check(f):\n    assert f() == 1",
                "entry_point": "f",
            }
            file.write(json.dumps(problem) + "\n")
        return data

    def test_each_format_becomes_rows(self, data: Path, tmp_path: Path) -> None:
        prepare.prepare(data, tmp_path / "weights", tmp_path / "out")
        made = tmp_path / "out" / "data"
        assert (made / "trec" / "train.csv").read_text(encoding="utf-8") == (
            'text,label\nHow did serfdom develop ?,0\n"Who, ""exactly"", was Galileo ?",3\n'
        )
        assert "café" in (made / "trec" / "test.csv").read_text(encoding="utf-8")
        assert rows_of(made / "sst2" / "train.jsonl") == [
            {"text": "a good film", "label": "1"},
            {"text": "not good", "label": "0"},
        ]
        assert [row["food"] for row in rows_of(made / "e2e" / "train.jsonl")] == ["Chinese", "none"]
        assert rows_of(made / "superni" / "train.jsonl") == [
            {"task": "task1_a", "definition": "Say it.", "input": "x", "output": "y"},
            {"task": "task2_b", "definition": "Do it.", "input": "u", "output": "v"},
        ]
        assert [len(rows_of(made / "mbpp" / f"{part}.jsonl")) for part in ("test", "train")] == [
            2,
            2,
        ]
        assert "\r" not in rows_of(made / "mbpp" / "test.jsonl")[0]["code"]

    def test_news_are_dealt_once_each_and_ten_clients_are_balanced(
        self, data: Path, tmp_path: Path
    ) -> None:
        prepare.prepare(data, tmp_path / "weights", tmp_path / "out")
        rows = rows_of(tmp_path / "out" / "data" / "ag_news" / "clients.jsonl")
        assert len(rows) == len({row["text"] for row in rows}) == 100 * 35
        most = {}
        for client in sorted({row["client"] for row in rows}):
            labels = [row["label"] for row in rows if row["client"] == client]
            assert len(labels) == 35
            most[client] = max(labels.count(label) for label in set(labels)) / 35
        shares = list(most.values())
        assert max(shares[:10]) < 0.5 < sum(shares[10:]) / 90

    def test_solutions_of_both_benchmarks_pass_their_tests(
        self, data: Path, tmp_path: Path, python: str
    ) -> None:
        prepare.prepare(data, tmp_path / "weights", tmp_path / "out")
        made = tmp_path / "out" / "data"
        mbpp = rows_of(made / "mbpp" / "test.jsonl")[0]
        assert sandbox.run(f"{mbpp['code']}\n\n{mbpp['tests']}", python) == "passed"
        human = rows_of(made / "humaneval" / "test.jsonl")[0]
        assert sandbox.run(human["prompt"] + human["code"] + "\n" + human["tests"], python) == (
            "passed"
        )


@pytest.fixture(scope="session")
def python() -> str:
    try:
        return str(sandbox.interpreter())
    except RuntimeError as error:
        pytest.skip(str(error))


class TestSandbox:
    @pytest.mark.parametrize(
        "program",
        [
            "assert 1 + 1 == 3",
            "def f(:",
            "import sys; sys.exit(0)",
            "import os; os._exit(0)",
            "x = [0] * 10**9",
            "open('x', 'w').write('a' * 10**7)",
            "open('/etc/prelort-was-here', 'w')",
            "print('a' * 10**8)",
            "import socket; socket.create_connection(('127.0.0.1', 9), 1)",
            "import socket; socket.getaddrinfo('example.com', 80)",
            # Bounded on purpose: where the limit does not hold this must not harm the machine.
            "import os, time\nfor _ in range(150):\n"
            "    if os.fork() == 0:\n        time.sleep(1); os._exit(0)",
        ],
    )
    def test_what_goes_beyond_the_limits_or_fails_does_not_pass(
        self, program: str, python: str
    ) -> None:
        assert sandbox.run(program, python) == "failed"

    def test_what_runs_to_its_end_passes(self, python: str) -> None:
        assert sandbox.run("assert sum(range(10)) == 45\nprint('text')", python) == "passed"

    def test_network_can_be_reached_from_here_or_the_test_above_shows_nothing(
        self, python: str
    ) -> None:
        import socket

        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
            program = f"import socket; socket.create_connection(('127.0.0.1', {port}), 2)"
            exec(program, {})
            assert sandbox.run(program, python) == "failed"

    def test_time_is_limited_and_nothing_is_left_running(self, python: str, tmp_path: Path) -> None:
        mark = f"mark-{tmp_path.name}"
        program = (
            "import subprocess, sys\n"
            f"subprocess.Popen([sys.executable, '-c', 'while True: pass', {mark!r}])\n"
            "while True: pass"
        )
        assert sandbox.run(program, python, seconds=1) == "timed out"
        import psutil

        def left() -> list[list[str]]:
            found = [p.info["cmdline"] or [] for p in psutil.process_iter(["cmdline"])]
            return [line for line in found if mark in line]

        # The kernel ends a process namespace a moment after its first process.
        deadline = time.monotonic() + 20
        while left() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not left()

    def test_nothing_is_run_where_it_cannot_be_run_apart(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PATH", "")
        with pytest.raises(RuntimeError, match="is not run here: there is no `unshare`"):
            sandbox.interpreter()


class TestReadFromRuns:
    @staticmethod
    def log(folder: Path, *events: Event) -> None:
        folder.mkdir(parents=True)
        for event in events:
            EventLog(folder / "metrics.jsonl").append(event)

    def test_a_metric_task_by_task_is_what_the_clients_measured_last(self, tmp_path: Path) -> None:
        def measured(number: int, **values: float) -> ClientsEvaluated:
            clients = {
                task: ClientMetrics(4, 2, {"rouge_l": value}) for task, value in values.items()
            }
            return ClientsEvaluated(number, clients, {}, 0.1)

        cells, end = tmp_path / "study", RunFinished(2)
        for seed, values in enumerate([(10.0, 1.0), (20.0, 3.0)]):
            folder = cells / "prelort" / f"seed-{seed}"
            last = measured(2, a=values[0], b=values[1])
            self.log(folder, measured(1, a=99.0, b=99.0), last, end)
        self.log(cells / "zero-padding" / "seed-0", measured(2, a=5.0, b=7.0), end)
        self.log(cells / "zero-padding" / "seed-1", measured(1, a=99.0, b=99.0))
        found = by_task.read(cells, "rouge_l")
        assert found == {
            "a": {"prelort": [10.0, 20.0], "zero-padding": [5.0]},
            "b": {"prelort": [1.0, 3.0], "zero-padding": [7.0]},
        }
        assert by_task.read(cells, "accuracy") == {}
        rows = by_task.table(found)
        assert rows[0] == {"task": "a", "prelort": "15.0 (7.1)", "zero-padding": "5.0"}
        assert rows[-1]["prelort"] == "8.5 (4.2)"

    def test_who_was_raised(self, tmp_path: Path) -> None:
        rows = tmp_path / "clients.jsonl"
        labels = {"c00": "wxyz", "c01": "wwxy", "c10": "wwww", "c11": "wwwx"}
        lines = [
            json.dumps({"client": name, "label": label}) + "\n"
            for name, own in labels.items()
            for label in own
        ]
        rows.write_text("".join(lines))
        changed = [RankChanged(1, client, 4, 8, "by loss") for client in ("c10", "c01")]
        self.log(tmp_path / "by-loss" / "seed-3", *changed)
        (row,) = raised.table(tmp_path, rows, balanced={"c00", "c01"})
        assert list(row.values()) == ["3", 2, 1, "75", "38", "62"]


class TestTables:
    def test_every_table_in_the_documentation_is_what_was_kept(self) -> None:
        found = 0
        for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
            text = path.read_text(encoding="utf-8")
            found += len(tables.BLOCK.findall(text))
            assert tables.filled(text) == text, f"{path}: run benchmarks/studies/tables.py"
        assert found > 0

    def test_a_table_has_means_spread_difference_and_costs(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = tmp_path / "studies" / "one"
        folder.mkdir(parents=True)
        (folder / "summary.csv").write_text(
            "setting,method,metric,at,seeds,mean,deviation,reference,pairs,difference,low,high\n"
            ",prelort,accuracy,4,3,0.5,0.01,prelort,0,,,\n"
            ",other,accuracy,4,3,0.625,0.02,prelort,3,0.125,0.1,0.15\n"
            ",prelort,accuracy,AURAC,3,0.5,0.01,prelort,0,,,\n"
            ",other,accuracy,AURAC,3,0.625,0.02,prelort,3,0.125,0.1,0.15\n"
            ",other,accuracy,96,3,0.7,0.02,prelort,0,,,\n"
            ",prelort,accuracy,at clients,3,0.4,0.01,prelort,0,,,\n"
            ",other,accuracy,at clients,3,0.2,0.01,prelort,3,-0.2,-0.3,-0.1\n"
        )
        (folder / "cells.csv").write_text(
            "setting,method,seed,status,bytes_up,bytes_down,passes\n"
            ",prelort,0,finished,1000000,2000000,480\n,other,0,failed,,,\n"
        )
        monkeypatch.setattr(tables, "RESULTS", tmp_path)
        found = tables.study_table("one", "", "accuracy").replace(tables.GAP, " ")
        difference = "+12.5 [+10.0, +15.0]"
        assert found.splitlines()[2:] == [
            "| prelort | 50.0 ± 1.0 | 50.0 ± 1.0 | **40.0** ± 1.0 | – | 1 / 2 | 480 |",
            f"| other | **62.5** ± 2.0 | **62.5** ± 2.0 | 20.0 ± 1.0 | {difference} | – / – | – |",
        ]
        assert tables.study_table("one", "", "accuracy", "other").count("\n") == 2
        with pytest.raises(SystemExit, match="no setting 'iid'"):
            tables.study_table("one", "iid", "accuracy")


class TestClaims:
    def test_what_the_documentation_says_about_winners_is_what_was_kept(self) -> None:
        assert claims.in_pages() == []

    @pytest.fixture
    def kept(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        values = {
            "a": {4: (10.0, 20.0, 30.0), 8: (9.0, 18.0, 27.0)},
            "b": {4: (11.0, 21.0, 32.0), 8: (8.0, 20.0, 28.0)},
            "homogeneous-min": {4: (5.0, 5.0, 5.0), 8: (5.0, 5.0, 5.0)},
        }
        lines = ["setting,method,seed,round,rank,metric,value"]
        for method, at in values.items():
            for rank, seeds in at.items():
                for seed, value in enumerate(seeds):
                    own = f",{method},{seed},"
                    lines.append(f"{own}1,{rank},perplexity,{99 - value}")
                    lines.append(f"{own}2,{rank},perplexity,{value}")
        folder = tmp_path / "studies" / "one"
        folder.mkdir(parents=True)
        (folder / "measurements.csv").write_text("\n".join(lines))
        monkeypatch.setattr(tables, "RESULTS", tmp_path)

    @pytest.mark.parametrize(
        "statement, holds",
        [
            ("4 | a > b", True),
            ("4 | b > a", False),
            ("8 | a > b", False),  # better in the mean, worse with one seed
            ("8 | a >= b", True),
            ("8 | b >= a", False),
            ("8 | a = b", True),
            ("4 | a = b", False),
            ("AURAC | a >= *", True),
            ("4 AURAC | a >= b; homogeneous-min", False),
            ("4 8 | a rises", True),
            ("8 4 | a rises", False),
            ("4 | a > c", False),
            ("4 | a wins", False),
            ("| a > b", False),
            ("4 | a rises", False),
        ],
    )
    def test_a_claim_holds_if_the_final_values_say_so(
        self, kept: None, statement: str, holds: bool
    ) -> None:
        text = f"It wins.\n<!-- claim:\n  one || perplexity | {statement} -->"
        assert (list(claims.problems(text)) == []) == holds

    @pytest.mark.parametrize(
        "text", ["- It wins.\n- It does not <!-- claim:\n -->", "It is\nthe best."]
    )
    def test_a_winner_without_a_claim_is_found(self, text: str) -> None:
        (problem,) = claims.problems(text)
        assert "has no claim" in problem
