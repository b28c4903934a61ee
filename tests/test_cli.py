import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import prelort
from command_line import CommandLine, Outcome
from prelort import cli
from prelort import config as configuration
from prelort.cli.screen import from_library
from prelort.config import Config, check, load, to_toml
from prelort.events import Evaluated, EventLog
from prelort.federation import client as client_module
from prelort.tasks import TASKS
from run_files import adapters_of

COMMANDS = (
    "run",
    "compare",
    "watch",
    "plan",
    "evaluate",
    "report",
    "export",
    "new",
    "site",
    "methods",
    "config",
)


@pytest.fixture(scope="module")
def config_file(
    tmp_path_factory: pytest.TempPathFactory, make_config: Callable[..., Config]
) -> Path:
    path = tmp_path_factory.mktemp("config") / "my.toml"
    # A rate at which the adapter changes the function a lot.
    config = make_config(
        federation={"rounds": 2, "clients_per_round": 3}, training={"learning_rate": 5e-2}
    )
    path.write_text(to_toml(config))
    return path


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory, config_file: Path) -> Path:
    """A study of two methods, made by the command line."""
    out = tmp_path_factory.mktemp("runs") / "first"
    methods = ["-m", "prelort", "-m", "zero-padding"]
    cli.app(["run", str(config_file), *methods, "--out", str(out), "-q"], standalone_mode=False)
    return out


class TestHelp:
    def test_lists_the_commands(self, command_line: CommandLine) -> None:
        outcome = command_line("--help")
        assert outcome.code == 0
        for name in COMMANDS:
            assert re.search(rf"\b{name}\b", outcome.out)

    @pytest.mark.parametrize("name", COMMANDS)
    @pytest.mark.parametrize("option", ["--help", "-h"])
    def test_of_each_command(self, command_line: CommandLine, name: str, option: str) -> None:
        outcome = command_line(name, option)
        assert outcome.code == 0
        assert f"prelort {name}" in outcome.out
        assert outcome.err == ""

    @pytest.mark.parametrize("module", ["prelort", "prelort.cli"])
    def test_is_quick_because_nothing_heavy_is_imported(self, module: str) -> None:
        code = f"import sys, {module}; print([m for m in HEAVY if m in sys.modules])"
        heavy = ("torch", "transformers", "peft", "flwr", "datasets", "altair", "vl_convert")
        heavy += ("pandas", "pydantic", "numpy")
        ended = subprocess.run(
            [sys.executable, "-c", code.replace("HEAVY", repr(heavy))],
            capture_output=True,
            text=True,
            check=True,
        )
        assert ended.stdout == "[]\n"


class TestConfig:
    def test_what_it_prints_is_the_default(self, command_line: CommandLine, tmp_path: Path) -> None:
        outcome = command_line("config")
        assert outcome.code == 0
        assert check(tomllib.loads(outcome.out)) == load()
        (tmp_path / "my.toml").write_text(outcome.out)
        assert load(tmp_path / "my.toml") == load()
        assert outcome.out == configuration.EMBEDDED_FILE.read_text()

    def test_all_keys_at_their_defaults_are_a_configuration_and_the_documented_one(
        self, command_line: CommandLine
    ) -> None:
        text = command_line("config", "--all").out
        assert check(tomllib.loads(text)) == configuration.Config()
        for key in configuration.flat(configuration.Config()):
            assert re.search(rf"^(# )?{key.rpartition('.')[2]} =", text, re.MULTILINE), key
        assert "None" not in text  # as where a key has no description
        page = Path(__file__).parents[1] / "docs" / "configuration-reference.md"
        assert text in page.read_text(), "paste what `prelort config --all` prints"

    @pytest.mark.parametrize("task", TASKS)
    def test_a_starter_is_a_configuration_for_its_task(
        self, command_line: CommandLine, task: str
    ) -> None:
        starter = check(tomllib.loads(command_line("config", "--task", task).out))
        assert starter.task == task
        assert starter.threads is None
        assert starter.training.learning_rate < load().training.learning_rate

    def test_a_starter_suits_its_model_and_runs(
        self, command_line: CommandLine, tmp_path: Path, tiny_bert: Path, text_file: Path
    ) -> None:
        text = command_line("config", "--task", "classification", "--model", tiny_bert).out
        (tmp_path / "my.toml").write_text(text)
        starter = load(tmp_path / "my.toml")
        assert starter.model.name == str(tiny_bert)
        assert starter.data.max_length == 128  # the model's positions
        sets = [f"data.source={text_file}", "federation.rounds=1", "ranks.mix=4*0.5, 8*0.5"]
        options = [part for one in sets for part in ("--set", one)]
        outcome = command_line("run", tmp_path / "my.toml", *options, "-q", "-o", tmp_path / "run")
        assert outcome.code == 0

    @pytest.mark.parametrize("task", ["causal-lm", "chat"])
    def test_a_starter_is_refused_for_a_model_of_another_kind(
        self, command_line: CommandLine, task: str, tiny_bert: Path
    ) -> None:
        outcome = command_line("config", "--task", task, "--model", tiny_bert)
        assert "is no causal language model but of type 'bert'" in outcome.error
        assert not outcome.out

    def test_says_that_a_model_has_no_chat_template(
        self, command_line: CommandLine, tiny_llama: Path
    ) -> None:
        outcome = command_line("config", "--task", "chat", "--model", tiny_llama)
        assert outcome.code == 0
        assert "has no chat template: add model.chat_template" in outcome.err
        assert tomllib.loads(outcome.out)["task"] == "chat"

    @pytest.mark.parametrize(
        "options, words",
        [
            (["--task", "regression"], "unknown task 'regression': known are causal-lm, instruct"),
            (["--model", "x"], "--model x needs --task: causal-lm"),
            (["--all", "--task", "chat"], "give --all alone"),
        ],
    )
    def test_of_what_does_not_go_together(
        self, command_line: CommandLine, options: list[str], words: str
    ) -> None:
        assert words in command_line("config", *options).error


class TestRun:
    @pytest.mark.usefixtures("pictures")
    def test_of_one_method(
        self, command_line: CommandLine, config_file: Path, tmp_path: Path
    ) -> None:
        out = tmp_path / "run"
        outcome = command_line("run", config_file, "--set", "seed=4", "--out", out)

        assert outcome.code == 0
        assert outcome.err == ""
        assert "Perplexity by rank prefix" in outcome.out
        assert "untuned base" in outcome.out
        assert "round 2/2" in outcome.out  # progress, as lines where nobody watches
        for name in ("rank_curves.png", "report.html", "adapters"):
            assert str(out / name) in outcome.out
        assert load(out / "config.toml") == load(config_file, ["seed=4"])
        assert (out / "rank_curves.png").read_bytes().startswith(b"\x89PNG")
        assert (out / "clients.png").read_bytes().startswith(b"\x89PNG")
        assert "| prelort |" in (out / "results.md").read_text()
        for rank in (2, 4, 8):
            assert (out / "adapters" / f"rank-{rank}" / "adapter_config.json").is_file()

    def test_without_out_it_makes_a_folder_below_runs(
        self,
        command_line: CommandLine,
        config_file: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.chdir(tmp_path)
        assert command_line("run", config_file, "-q").code == 0
        (out,) = (tmp_path / "runs").iterdir()
        assert re.fullmatch(r"prelort-\d{8}-\d{6}", out.name)
        assert (out / "adapters" / "rank-8").is_dir()

    def test_of_several_methods_compares_them(self, study: Path) -> None:
        results = (study / "results.md").read_text()
        assert "| prelort |" in results
        assert "| zero-padding |" in results
        assert "untuned base" in results
        one, two = (load(study / n / "config.toml") for n in ("prelort", "zero-padding"))
        assert configuration.differences(one, two) == ["method.name"]

    def test_an_interrupt_says_how_to_continue(
        self,
        command_line: CommandLine,
        config_file: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:

        def interrupted(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        out = tmp_path / "run"
        with monkeypatch.context() as patch:
            patch.setattr(client_module, "train", interrupted)
            outcome = command_line("run", config_file, "-o", out)
        assert outcome.code == 130
        assert outcome.err.strip() == f"stopped; continue with: prelort run --resume {out}"
        untrained = command_line("export", out, "--out", tmp_path / "adapter")
        assert untrained.error == f"'{out}' has nothing to export: no round has finished"
        assert command_line("run", "--resume", out, "-q").code == 0

    def test_several_methods_are_resumed_at_one_that_has_not_started(
        self, command_line: CommandLine, study: Path, tmp_path: Path
    ) -> None:
        out = tmp_path / "study"
        shutil.copytree(study, out)
        shutil.rmtree(out / "zero-padding")
        assert command_line("run", "--resume", out, "-q", "--jobs", 2).code == 0
        assert adapters_of(out / "zero-padding") == adapters_of(study / "zero-padding")

    def test_what_is_given_again_on_resuming_must_be_the_same(
        self, command_line: CommandLine, config_file: Path, study: Path
    ) -> None:
        error = command_line("run", "--resume", study, "-m", "fedit").error
        assert "holds prelort; zero-padding, not fedit" in error
        error = command_line("run", "--resume", study, "--set", "seed=9").error
        assert "these keys differ: seed" in error
        assert command_line("run", config_file, "--resume", study, "-q").code == 0
        error = command_line("run", "--resume", study / "prelort", "--set", "seed=9").error
        assert "these keys differ: seed" in error
        error = command_line("run", "--resume", study, "--out", study).error
        assert "not both" in error

    @pytest.mark.parametrize("option", [["--parallel", 2], ["--engine", "simulation"]])
    def test_jobs_are_for_runs_in_process(
        self, command_line: CommandLine, config_file: Path, option: list[object]
    ) -> None:
        assert "--jobs" in command_line("run", config_file, "--jobs", 2, *option).error

    @pytest.mark.parametrize("code", [13, 27, 28, 30, 122])
    def test_what_the_system_refuses_is_one_sentence(
        self,
        command_line: CommandLine,
        config_file: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        code: int,
    ) -> None:
        import os

        from prelort.events import Event, EventLog

        def refuse(self: EventLog, event: Event) -> None:
            raise OSError(code, os.strerror(code), "/somewhere/metrics.jsonl")

        with monkeypatch.context() as patch:
            patch.setattr(EventLog, "append", refuse)
            error = command_line("run", config_file, "-q", "-o", tmp_path / "run").error
        assert error.startswith(f"{os.strerror(code)} '/somewhere/metrics.jsonl': ")
        assert command_line("run", "--resume", tmp_path / "run", "-q").code == 0

    def test_a_bug_is_not_taken_for_the_users_mistake(
        self,
        command_line: CommandLine,
        config_file: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        from prelort.experiment import backend as module

        def broken(*arguments: Any) -> None:
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(module, "assemble", broken)
        with pytest.raises(OSError, match="Input/output error"):
            command_line("run", config_file, "-q", "-o", tmp_path / "run")


class TestWarnings:
    def test_a_library_in_a_folder_of_our_name_is_still_a_library(self) -> None:
        package = Path(prelort.__file__).parent
        assert from_library("/home/me/prelort/.venv/lib/site-packages/torch/nn.py")
        assert not from_library(str(package / "experiment" / "checkpoint.py"))
        assert not from_library("/home/me/my_method.py")


@pytest.fixture
def run(study: Path) -> Path:
    return study / "prelort"


def test_version(command_line: CommandLine) -> None:
    assert command_line("--version").out == f"prelort {metadata.version('prelort')}\n"


def test_start_from_an_adapter_goes_on_where_it_was(
    command_line: CommandLine, config_file: Path, run: Path, tmp_path: Path
) -> None:
    def start(out: str, adapter: Path, *more: str) -> Outcome:
        options = [part for one in ("federation.rounds=1", *more) for part in ("--set", one)]
        given = ["--start-from", adapter, "-o", tmp_path / out, "-q"]
        return command_line("run", config_file, *options, *given)

    assert start("run", run, "evaluation.every=1").code == 0
    assert start("wider", run / "adapters" / "rank-4", "evaluation.every=1").code == 0
    whole, cut = (
        [e for e in EventLog(tmp_path / out / "metrics.jsonl").read() if isinstance(e, Evaluated)]
        for out in ("run", "wider")
    )
    final = EventLog(run / "metrics.jsonl").read()
    (expected,) = [e.prefixes for e in final if isinstance(e, Evaluated) and e.round == 2]
    assert whole[0].prefixes == expected
    assert cut[0].prefixes[4] == expected[4]
    assert cut[0].prefixes[8]["loss"] == pytest.approx(expected[4]["loss"])
    assert "its scale is constant 2, and that of" in start("scale", run, "lora.scale=4.0").error
    assert "'ffa-lora', whose clients draw" in start("ffa", run, "method.name=ffa-lora").error
    several = start("several", tmp_path).error
    assert "not a PEFT adapter folder; name one of its runs: " in several
    assert repr(str(tmp_path / "wider")) in several


class TestEvaluate:
    def test_saves_json_and_lists_the_runs_of_a_folder(
        self, command_line: CommandLine, run: Path, study: Path, tmp_path: Path
    ) -> None:
        assert command_line("evaluate", run, "-q", "--out", tmp_path / "found.json").code == 0
        found = json.loads((tmp_path / "found.json").read_text())
        assert found["prefixes"].keys() == {"2", "4", "8"}
        for command in (["evaluate", study], ["export", study, "--out", tmp_path / "out"]):
            error = command_line(*command).error
            assert error.endswith(f"runs: {str(run)!r}, {str(study / 'zero-padding')!r}")

    def test_gives_what_the_run_gave(self, command_line: CommandLine, run: Path) -> None:
        before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
        outcome = command_line("evaluate", run)
        assert outcome.code == 0

        events = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        final = [e for e in events if e["event"] == "evaluated"][-1]
        for values in final["prefixes"].values():
            assert f"{values['perplexity']:.1f}" in outcome.out
        assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before

    def test_at_other_prefixes(self, command_line: CommandLine, run: Path) -> None:
        outcome = command_line("evaluate", run, "--set", "evaluation.prefixes=[1, 3]")
        assert "rank 1" in outcome.out
        assert "rank 3" in outcome.out

    @pytest.mark.parametrize("override", ["lora.scale=4.0", "method.name=", "ranks.mix=2*1"])
    def test_what_was_trained_cannot_be_changed(
        self, command_line: CommandLine, run: Path, override: str
    ) -> None:
        error = command_line("evaluate", run, "--set", override).error
        key = override.partition("=")[0]
        assert f"{key} cannot differ from the run's own: only keys of data," in error


class TestReport:
    def test_of_one_run(self, command_line: CommandLine, study: Path, tmp_path: Path) -> None:
        out = tmp_path / "page.html"
        outcome = command_line("report", study / "prelort", "--out", out)
        assert outcome.code == 0
        assert outcome.out.split() == ["wrote", str(out)]
        text = out.read_text()
        assert "learning_rate = 0.05" in text  # the resolved configuration
        assert 'prelort/adapters/rank-2/">rank 2</a>' in text
        assert not (study / "prelort" / "report.html").exists()

    def test_of_no_run_is_one_sentence(self, command_line: CommandLine, tmp_path: Path) -> None:
        error = command_line("report", tmp_path).error
        assert error == f"{str(tmp_path)!r} holds no run: config.toml is missing"


class TestWatch:
    def test_of_a_study_ends_with_its_table(self, command_line: CommandLine, study: Path) -> None:
        outcome = command_line("watch", study)
        assert outcome.code == 0
        for name in ("prelort", "zero-padding"):
            assert f"{name}: round 2/2" in outcome.out
        assert "untuned base" in outcome.out

    def test_waits_for_a_folder_for_a_while(
        self, command_line: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("prelort.cli.inspect.WAIT_SECONDS", 1)
        path = tmp_path / "typo"
        outcome = command_line("watch", path)
        assert outcome.out == f"{path} does not exist: waiting 1 s for a run to start there\n"
        assert outcome.error == f"{str(path)!r} holds no run after 1 s"

    def test_ctrl_c_ends_it_and_is_no_error(
        self, command_line: CommandLine, study: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupted(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr("prelort.report.live.watch", interrupted)
        outcome = command_line("watch", study)
        assert (outcome.code, outcome.out, outcome.err) == (0, "", "")

    def test_of_a_run_that_was_stopped_says_so(
        self, command_line: CommandLine, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("prelort.report.live.POLL_SECONDS", 0.01)
        stopped = tmp_path / "stopped"
        shutil.copytree(run, stopped)
        lines = (stopped / "metrics.jsonl").read_text().splitlines(keepends=True)
        (stopped / "metrics.jsonl").write_text("".join(lines[:-1]))
        outcome = command_line("watch", stopped)
        assert outcome.code == 2
        assert "untuned base" in outcome.out
        assert outcome.error == f"{str(stopped)!r} was stopped: no process runs it any more"

    def test_of_what_will_never_be_a_run_is_one_sentence(
        self, command_line: CommandLine, tmp_path: Path
    ) -> None:
        (tmp_path / "notes.txt").write_text("mine")
        for path in (tmp_path, tmp_path / "notes.txt"):
            error = command_line("watch", path).error
            assert error == f"{str(path)!r} holds no run: config.toml is missing"


class TestExport:
    @pytest.mark.parametrize("rank", [3, None])
    def test_of_any_prefix_is_a_peft_folder(
        self, command_line: CommandLine, run: Path, tmp_path: Path, rank: int | None
    ) -> None:
        out = tmp_path / "adapter"
        outcome = command_line("export", run, "--out", out, *([] if rank is None else ["-r", rank]))
        assert outcome.code == 0
        assert f"wrote {out}" in outcome.out
        assert json.loads((out / "adapter_config.json").read_text())["r"] == (rank or 8)

    def test_merged_is_a_model_without_adapters(
        self, command_line: CommandLine, run: Path, tmp_path: Path
    ) -> None:
        """Its logits are compared with the adapter's by the command itself."""
        out = tmp_path / "model"
        assert command_line("export", run, "--rank", 2, "--merge", "--out", out).code == 0
        merged = AutoModelForCausalLM.from_pretrained(out)
        assert not any("lora" in name for name in merged.state_dict())
        assert AutoTokenizer.from_pretrained(out)("lazy dogs")["input_ids"]

    @pytest.mark.parametrize("rank", [0, -1, 9, 100])
    def test_of_a_rank_that_is_not_there_is_refused(
        self, command_line: CommandLine, run: Path, tmp_path: Path, rank: int
    ) -> None:
        error = command_line("export", run, f"--rank={rank}", "--out", tmp_path / "a").error
        assert error == f"rank {rank} is not allowed: the adapter has ranks 1 to 8"
        assert not (tmp_path / "a").exists()

    @pytest.mark.parametrize("merge", [[], ["--merge"]])
    def test_nothing_is_written_over(
        self, command_line: CommandLine, run: Path, tmp_path: Path, merge: list[str]
    ) -> None:
        (tmp_path / "mine.txt").write_text("mine")
        error = command_line("export", run, *merge, "--out", tmp_path).error
        assert "exists and is not empty" in error
        error = command_line("export", run, *merge, "--out", tmp_path / "mine.txt").error
        assert "exists and is not empty" in error
        assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
        assert (tmp_path / "mine.txt").read_text() == "mine"

    def test_names_the_base_where_its_users_find_it(
        self, command_line: CommandLine, run: Path, tmp_path: Path
    ) -> None:
        options = ["--base-name", "org/model"]
        assert command_line("export", run, *options, "--out", tmp_path / "a").code == 0
        written = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
        assert written["base_model_name_or_path"] == "org/model"
        error = command_line("export", run, *options, "--merge", "--out", tmp_path / "b").error
        assert "--base-name is for adapters" in error
