"""A run resumed where something is not as it was, and runs in which clients fail."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import prelort
from backends import in_this_process
from command_line import CommandLine
from prelort.config import Config
from prelort.errors import ConfigError, QuorumError
from prelort.events import ClientFailed, RunStarted
from prelort.experiment.backend import Connect
from prelort.experiment.folder import RunFolder
from prelort.federation.flower import Message
from run_files import assert_same_run, events_of, files_of

Make = Callable[..., Config]


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, make_config: Make, tiny_llama: Path
) -> tuple[Path, Path]:
    """A finished run, and its base model in a folder of its own."""
    folder = tmp_path_factory.mktemp("finished")
    shutil.copytree(tiny_llama, folder / "model")
    config = make_config(
        model={"name": str(folder / "model")}, federation={"rounds": 2, "clients_per_round": 3}
    )
    prelort.run(config, folder / "run")
    return folder / "run", folder / "model"


@pytest.fixture
def run(tmp_path: Path, finished: tuple[Path, Path]) -> Path:
    """A copy of the finished run to do harm to."""
    shutil.copytree(finished[0], tmp_path / "run")
    return tmp_path / "run"


def resume(run: Path) -> None:
    prelort.run(RunFolder(run).read_config(), run, resume=True)


class TestAnotherConfiguration:
    @pytest.mark.parametrize(
        "overrides, keys",
        [
            (["federation.rounds=1"], "federation.rounds"),
            (["lora.rank_pattern={q_proj = 2}"], "lora.rank_pattern, lora.rank_pattern.q_proj"),
            (["method.name=zero-padding"], "method.name"),
            (["threads=2", "ranks.mix=4*1"], "ranks.mix, threads"),
            (["seed=9", "training.learning_rate=0.5"], "seed, training.learning_rate"),
        ],
    )
    def test_the_keys_that_differ_are_named(
        self, run: Path, overrides: list[str], keys: str
    ) -> None:
        before = files_of(run)
        other = prelort.load_config(run / "config.toml", overrides)
        with pytest.raises(ConfigError) as refused:
            prelort.run(other, run, resume=True)
        assert f"these keys differ: {keys}." in str(refused.value)
        assert str(run) in str(refused.value)
        assert files_of(run) == before

    def test_more_rounds_go_on_also_from_elsewhere(
        self,
        finished: tuple[Path, Path],
        command_line: CommandLine,
        tmp_path: Path,
        text_file: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
        shutil.copytree(finished[1], here / "model")
        shutil.copy(text_file, here / "rows.jsonl")
        elsewhere.mkdir()
        monkeypatch.chdir(here)
        paths = [
            part
            for one in ("model.name=model", "data.source=rows.jsonl")
            for part in ("--set", one)
        ]
        begun = command_line("run", finished[0] / "config.toml", *paths, "-o", "run", "-q")
        assert begun.code == 0
        before = events_of(here / "run")
        monkeypatch.chdir(elsewhere)
        longer = ["--set", "federation.rounds=3"]
        assert command_line("run", "--resume", here / "run", *longer, "-q").code == 0
        assert RunFolder(here / "run").read_config().federation.rounds == 3
        assert RunFolder(here / "run").history().done == 3
        events = events_of(here / "run")
        assert events[: len(before) - 1] == before[:-1]  # all but that it was finished
        assert [e.rounds for e in events if isinstance(e, RunStarted)] == [2, 3]
        assert command_line("evaluate", here / "run", "-q").code == 0

    def test_a_damaged_configuration_or_none_is_refused(self, run: Path, tmp_path: Path) -> None:
        (run / "config.toml").write_text("[model")
        with pytest.raises(ConfigError, match="is not valid TOML"):
            resume(run)
        with pytest.raises(ConfigError, match="holds no run"):
            resume(tmp_path / "nowhere")
        assert not (tmp_path / "nowhere").exists()

    def test_the_command_line_takes_the_same_and_refuses_another(
        self, run: Path, command_line: CommandLine, tmp_path: Path
    ) -> None:
        again = tmp_path / "again.toml"
        shutil.copy(run / "config.toml", again)
        assert command_line("run", again, "--set", "seed=0", "--resume", run, "-q").code == 0
        assert command_line("run", "--resume", run, "-m", "prelort", "-q").code == 0
        before = files_of(run)
        error = command_line("run", "--resume", run, "--set", "federation.rounds=1").error
        assert "these keys differ: federation.rounds." in error
        command_line("run", "--resume", run, "-m", "zero-padding").error  # noqa: B018  exit code 2
        error = command_line("run", "--resume", run, "--out", tmp_path / "new").error
        assert "not both" in error
        assert not (tmp_path / "new").exists()
        assert files_of(run) == before


class TestAnotherBaseModel:
    @pytest.fixture
    def retrained(self, finished: tuple[Path, Path]) -> Iterator[None]:
        """The model's folder has other weights now."""
        weights = finished[1] / "model.safetensors"
        before = weights.read_bytes()
        tensors = {name: tensor + 0.01 for name, tensor in load_file(weights).items()}
        save_file(tensors, weights, metadata={"format": "pt"})
        yield
        weights.write_bytes(before)

    @pytest.mark.usefixtures("retrained")
    def test_is_refused_by_every_command(
        self, run: Path, command_line: CommandLine, tmp_path: Path
    ) -> None:
        for arguments in (
            ["run", "--resume", run],
            ["evaluate", run],
            ["export", run, "--out", tmp_path / "adapter"],
        ):
            assert "another base model" in command_line(*arguments).error
        assert not (tmp_path / "adapter").exists()


class TestCheckpoints:
    @pytest.mark.parametrize("event_log", ["whole", "unfinished line", "gone"])
    def test_none_at_all_starts_from_the_beginning(
        self, run: Path, finished: tuple[Path, Path], event_log: str
    ) -> None:
        shutil.rmtree(run / "checkpoints")
        shutil.rmtree(run / "adapters")
        log = run / "metrics.jsonl"
        if event_log == "unfinished line":
            log.write_bytes(log.read_bytes()[:-20])
        if event_log == "gone":
            log.unlink()
        resume(run)
        assert_same_run(run, finished[0])
        assert sum(isinstance(event, RunStarted) for event in events_of(run)) == 1

    def test_evaluate_and_export_need_one(
        self, run: Path, command_line: CommandLine, tmp_path: Path
    ) -> None:
        shutil.rmtree(run / "checkpoints")
        assert "has no checkpoint yet" in command_line("evaluate", run).error
        out = tmp_path / "adapter"
        assert "has no checkpoint yet" in command_line("export", run, "--out", out).error
        assert not out.exists()


def failing(names: set[str], number: int) -> Connect:
    """A backend of which these clients raise in the round of this number."""

    def train(name: str, of_round: int, usual: Callable[[], Message]) -> Message:
        if name in names and of_round == number:
            raise MemoryError("CUDA out of memory, say")
        return usual()

    return in_this_process(train)


class TestClientsThatFail:
    def config(self, make_config: Make, **federation: Any) -> Config:
        return make_config(federation={"rounds": 2, "clients_per_round": 6, **federation})

    def test_one_is_left_out_with_its_reason_in_events_and_log(
        self, tmp_path: Path, make_config: Make
    ) -> None:
        config = self.config(make_config)
        result = prelort.run(config, tmp_path / "run", backend=failing({"site-3"}, 2))
        (failed,) = [e for e in events_of(tmp_path / "run") if isinstance(e, ClientFailed)]
        assert (failed.round, failed.client) == (2, "site-3")
        assert failed.reason == "MemoryError: CUDA out of memory, say"
        assert result.history.rounds[2].failures.keys() == {"site-3"}
        log = (tmp_path / "run" / "log.txt").read_text()
        assert "Traceback" in log
        assert "CUDA out of memory, say" in log
        assert all(bool(t.isfinite().all()) for t in result.global_adapter.tensors().values())

    def test_too_many_end_the_run_and_it_can_be_resumed(
        self, tmp_path: Path, make_config: Make
    ) -> None:
        config = self.config(make_config, quorum=6)
        prelort.run(config, tmp_path / "undisturbed")
        with pytest.raises(QuorumError, match="round 2 has 5 usable replies of 6") as raised:
            prelort.run(config, tmp_path / "run", backend=failing({"site-3"}, 2))
        assert "site-3: MemoryError" in str(raised.value)
        prelort.run(config, tmp_path / "run", resume=True)
        assert_same_run(tmp_path / "run", tmp_path / "undisturbed")

    def test_a_rate_that_breaks_the_loss_is_named(self, tmp_path: Path, make_config: Make) -> None:
        training = {"learning_rate": 1e30, "optimizer": "sgd", "max_grad_norm": 0}
        config = make_config(training={**training, "local_steps": 4})
        with pytest.raises(QuorumError, match="lower training"):
            prelort.run(config, tmp_path / "run")

    def test_a_client_that_takes_too_long_is_left_out(
        self, tmp_path: Path, make_config: Make
    ) -> None:
        with pytest.raises(QuorumError, match="timed out after 1e-06 s at local step 1 of 2"):
            prelort.run(self.config(make_config, timeout=1e-6), tmp_path / "run")


def test_a_client_with_an_impossible_name_is_refused(
    tmp_path: Path, make_config: Make, text_file: Path
) -> None:
    """Names come from the data: none is dropped silently."""
    source = tmp_path / "rows.jsonl"
    source.write_text(text_file.read_text().replace("site-5", "s" * 300))
    config = make_config(data={"source": str(source)})
    with pytest.raises(ConfigError, match="300 characters: 200 are allowed"):
        prelort.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_control_characters_of_a_clients_name_are_not_in_its_files(
    tmp_path: Path, make_config: Make, text_file: Path
) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_text(text_file.read_text().replace("site-5", r"\u001b[31mred"))
    config = make_config(data={"source": str(source)}, federation={"rounds": 1})
    prelort.run(config, tmp_path / "run")
    text = (tmp_path / "run" / "clients.txt").read_text()
    assert "[31mred" in text
    assert all(line.isprintable() for line in text.split("\n"))
