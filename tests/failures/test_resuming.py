"""Resuming a run after a change or a failure."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import prelort
from command_line import CommandLine
from prelort.config import Config
from prelort.errors import CheckpointError, ConfigError, QuorumError
from prelort.experiment.folder import RunFolder
from prelort.federation import client as client_module

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


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


class TestAnotherConfiguration:
    def test_the_keys_that_differ_are_named(self, run: Path) -> None:
        other = RunFolder(run).read_config().model_copy(update={"seed": 9})
        before = files_of(run)
        with pytest.raises(ConfigError, match="these keys differ: seed"):
            prelort.run(other, run, resume=True)
        assert files_of(run) == before

    @pytest.mark.parametrize(
        "overrides, keys",
        [
            (["method.name=zero-padding"], "method.name"),
            (["threads=2", "ranks.mix=4*1"], "ranks.mix, threads"),
        ],
    )
    def test_on_the_command_line_too(
        self, run: Path, command_line: CommandLine, overrides: list[str], keys: str
    ) -> None:
        before = files_of(run)
        options = [part for override in overrides for part in ("--set", override)]
        error = command_line("run", "--resume", run, *options).error
        assert f"these keys differ: {keys}." in error
        assert files_of(run) == before

    def test_the_same_configuration_given_again_is_fine(
        self, run: Path, command_line: CommandLine, tmp_path: Path
    ) -> None:
        again = tmp_path / "again.toml"
        shutil.copy(run / "config.toml", again)
        assert command_line("run", again, "--set", "seed=0", "--resume", run, "-q").code == 0

    def test_another_method_is_refused(self, run: Path, command_line: CommandLine) -> None:
        for methods in (["-m", "zero-padding"], ["-m", "prelort", "-m", "zero-padding"]):
            before = files_of(run)
            error = command_line("run", "--resume", run, *methods).error
            assert "holds the methods ['prelort'], not" in error
            assert files_of(run) == before

    def test_the_same_method_is_fine(self, run: Path, command_line: CommandLine) -> None:
        assert command_line("run", "--resume", run, "-m", "prelort", "-q").code == 0

    def test_out_and_resume_exclude_each_other(
        self, run: Path, command_line: CommandLine, tmp_path: Path
    ) -> None:
        error = command_line("run", "--resume", run, "--out", tmp_path / "new").error
        assert "not both" in error
        assert not (tmp_path / "new").exists()

    def test_a_damaged_configuration_is_refused(self, run: Path, command_line: CommandLine) -> None:
        (run / "config.toml").write_text("[model")
        assert "is not valid TOML" in command_line("run", "--resume", run).error

    def test_where_no_run_is(self, command_line: CommandLine, tmp_path: Path) -> None:
        assert "holds no run" in command_line("run", "--resume", tmp_path / "nowhere").error
        assert list(tmp_path.iterdir()) == []


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
    def test_is_refused_with_both_fingerprints(self, run: Path) -> None:
        before = files_of(run)
        facts = json.loads((run / "checkpoints" / "00002" / "state.json").read_text())
        with pytest.raises(CheckpointError) as refused:
            prelort.run(RunFolder(run).read_config(), run, resume=True)
        text = str(refused.value)
        assert "was trained on another base model" in text
        assert f"fingerprint {facts['base']}" in text
        assert files_of(run) == before

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

    def test_given_on_the_command_line_is_refused_too(
        self, run: Path, command_line: CommandLine, tiny_gpt2: Path
    ) -> None:
        error = command_line("evaluate", run, "--set", f"model.name={tiny_gpt2}").error
        assert "another base model" in error


class TestDamagedCheckpoints:
    def test_the_one_before_is_used_with_a_warning(
        self, run: Path, finished: tuple[Path, Path], command_line: CommandLine
    ) -> None:
        newest = run / "checkpoints" / "00002" / "state.safetensors"
        newest.write_bytes(newest.read_bytes()[:100])

        outcome = command_line("run", "--resume", run, "-q")

        assert outcome.code == 0
        assert "warning: checkpoint" in outcome.err
        assert "falling back to the checkpoint before it" in outcome.err
        adapters = {n: d for n, d in files_of(run).items() if n.startswith("adapters")}
        assert adapters == {
            n: d for n, d in files_of(finished[0]).items() if n.startswith("adapters")
        }

    def test_none_left_is_an_error(self, run: Path, command_line: CommandLine) -> None:
        for path in (run / "checkpoints").iterdir():
            (path / "state.json").write_text("{")
        error = command_line("run", "--resume", run).error
        assert "all checkpoints in" in error
        assert "are damaged" in error

    def test_no_checkpoint_at_all_starts_from_the_beginning(
        self, run: Path, finished: tuple[Path, Path], command_line: CommandLine
    ) -> None:
        shutil.rmtree(run / "checkpoints")
        shutil.rmtree(run / "adapters")
        assert command_line("run", "--resume", run, "-q").code == 0
        assert (
            files_of(run)["adapters/rank-8/adapter_model.safetensors"]
            == (files_of(finished[0])["adapters/rank-8/adapter_model.safetensors"])
        )
        events = [
            json.loads(line)["event"] for line in (run / "metrics.jsonl").read_text().splitlines()
        ]
        assert events.count("run_started") == 1

    def test_evaluate_and_export_without_a_checkpoint(
        self, run: Path, command_line: CommandLine, tmp_path: Path
    ) -> None:
        shutil.rmtree(run / "checkpoints")
        assert "has no checkpoint yet" in command_line("evaluate", run).error
        out = tmp_path / "adapter"
        assert "has no checkpoint yet" in command_line("export", run, "--out", out).error
        assert not out.exists()


HOLD = """
import sys
from pathlib import Path
from prelort.experiment.folder import RunFolder
folder = RunFolder(Path(sys.argv[1]))
folder.lock()
print("locked", flush=True)
sys.stdin.read()
"""


def test_a_run_in_use_by_another_process_is_refused(run: Path, command_line: CommandLine) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        before = files_of(run)
        assert "is in use: another prelort process" in command_line("run", "--resume", run).error
        assert files_of(run) == before
    finally:
        holder.kill()
        holder.communicate()
    assert command_line("run", "--resume", run, "-q").code == 0


class TestClientsThatFail:
    @pytest.fixture
    def failing(self, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
        """``failing(names, index)``: these clients raise in the round of this index."""
        real = client_module.train

        def fail(names: set[str], index: int) -> None:
            def train(model: Any, truncation: Any, task: Any, examples: Any, *rest: Any) -> Any:
                assignment = next(a for a in rest if hasattr(a, "round_index"))
                if assignment.client in names and assignment.round_index == index:
                    raise MemoryError("CUDA out of memory, say")
                return real(model, truncation, task, examples, *rest)

            monkeypatch.setattr(client_module, "train", train)

        return fail

    def config(self, make_config: Make, **federation: Any) -> Config:
        return make_config(federation={"rounds": 2, "clients_per_round": 6, **federation})

    def test_one_is_left_out_with_its_reason_in_metrics_and_log(
        self, tmp_path: Path, make_config: Make, failing: Callable[..., None]
    ) -> None:
        failing({"site-3"}, 1)
        result = prelort.run(self.config(make_config), tmp_path / "run")

        lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
        (failed,) = [e for e in map(json.loads, lines) if e["event"] == "client_failed"]
        assert (failed["round"], failed["client"]) == (2, "site-3")
        assert failed["reason"] == "MemoryError: CUDA out of memory, say"
        log = (tmp_path / "run" / "log.txt").read_text()
        assert "Traceback" in log
        assert "CUDA out of memory, say" in log
        assert all(bool(t.isfinite().all()) for t in result.adapter.tensors().values())

    def test_too_many_end_the_run_which_can_be_resumed(
        self,
        tmp_path: Path,
        make_config: Make,
        failing: Callable[..., None],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        config = self.config(make_config, quorum=6)
        expected = prelort.run(config, tmp_path / "undisturbed")
        failing({"site-3"}, 1)
        with pytest.raises(QuorumError, match="round 2 has 5 usable replies of 6"):
            prelort.run(config, tmp_path / "run")
        failing(set(), 1)

        result = prelort.run(config, tmp_path / "run", resume=True)

        for name, tensor in expected.adapter.tensors().items():
            assert torch.equal(result.adapter.tensors()[name], tensor)

    def test_too_many_are_one_sentence(
        self,
        tmp_path: Path,
        make_config: Make,
        failing: Callable[..., None],
        command_line: CommandLine,
    ) -> None:
        from prelort.config import to_toml

        failing({"site-1", "site-2", "site-3", "site-4"}, 0)
        file = tmp_path / "run.toml"
        file.write_text(to_toml(self.config(make_config)))
        error = command_line("run", file, "-q", "--out", tmp_path / "run").error
        assert "round 1 has 2 usable replies of 6, but federation.quorum = 0.5 needs 3" in error
        assert "site-1: MemoryError" in error

    def test_a_learning_rate_that_diverges_is_named(
        self, tmp_path: Path, make_config: Make
    ) -> None:
        config = make_config(
            training={
                "learning_rate": 1e30,
                "optimizer": "sgd",
                "max_grad_norm": 0,
                "local_steps": 4,
            }
        )
        with pytest.raises(QuorumError, match="lower the rate"):
            prelort.run(config, tmp_path / "run")

    def test_a_client_that_takes_too_long_is_left_out(
        self, tmp_path: Path, make_config: Make
    ) -> None:
        with pytest.raises(QuorumError, match="timed out after 1e-06 s at local step 1 of 2"):
            prelort.run(self.config(make_config, timeout=1e-6), tmp_path / "run")


def test_a_client_with_an_impossible_name_is_refused_and_stays_in_the_log(
    tmp_path: Path, make_config: Make, text_file: Path
) -> None:
    """Names come from the data; one of more than 200 letters is refused at its introduction."""
    source = tmp_path / "rows.jsonl"
    source.write_text(text_file.read_text().replace("site-5", "s" * 300))
    config = make_config(
        data={"source": str(source)}, federation={"rounds": 2, "clients_per_round": 3}
    )

    class Stop(Exception):
        pass

    def stop(event: dict[str, Any]) -> None:
        if event["event"] == "aggregated" and event["round"] == 2:
            raise Stop

    with pytest.raises(Stop):
        prelort.run(config, tmp_path / "run", listeners=[stop])
    prelort.run(config, tmp_path / "run", resume=True)

    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    refused = [e for e in map(json.loads, lines) if e["event"] == "client_refused"]
    assert len(refused) == 1
    assert refused[0]["round"] == 0
