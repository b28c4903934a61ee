import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from prelort.config import Config, check, load
from prelort.errors import ConfigError
from prelort.experiment.folder import RunFolder, is_running
from prelort.files import replace_folder

HOLD = """
import sys
from pathlib import Path
from prelort.experiment.folder import RunFolder, is_running
folder = RunFolder(Path(sys.argv[1]))
folder.lock()
print("locked", flush=True)
sys.stdin.read()
"""


@contextmanager
def another_process_that_holds(path: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        yield process
    finally:
        process.kill()
        process.communicate()


class TestCreate:
    def test_writes_the_configuration_and_the_versions(self, tmp_path: Path) -> None:
        config = check({"seed": 7, "lora": {"target_modules": ["q_proj"]}})
        folder = RunFolder(tmp_path / "deep" / "run")
        folder.create(config)

        assert folder.read_config() == load(folder.config_file) == config
        versions = json.loads((folder.path / "versions.json").read_text())
        assert {"python", "torch", "flwr", "peft"} <= versions.keys()

    def test_a_start_that_was_killed_does_not_take_the_folder(self, tmp_path: Path) -> None:
        killed = RunFolder(tmp_path)
        killed.create(Config(seed=1))
        killed.metrics_file.write_text("begun")
        killed.unlock()
        RunFolder(tmp_path).create(Config(seed=2))
        assert killed.read_config().seed == 2
        assert not killed.metrics_file.exists()

    def test_somebodys_configuration_is_left_alone(self, tmp_path: Path) -> None:
        (tmp_path / "config.toml").write_text("mine")
        with pytest.raises(ConfigError, match="exists and is not empty: choose another --out"):
            RunFolder(tmp_path).create(Config())
        assert (tmp_path / "config.toml").read_text() == "mine"

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
    def test_no_permission_is_refused(self, tmp_path: Path) -> None:
        tmp_path.chmod(0o500)
        with pytest.raises(ConfigError, match="cannot be written: Permission denied"):
            RunFolder(tmp_path / "run").create(Config())


class TestDiscard:
    def test_keeps_a_run_that_has_begun(self, tmp_path: Path) -> None:
        folder = RunFolder(tmp_path / "run")
        folder.create(Config())
        folder.checkpoints.mkdir()
        folder.discard()
        assert folder.config_file.is_file()

    def test_keeps_what_somebody_else_has_put_there(self, tmp_path: Path) -> None:
        folder = RunFolder(tmp_path / "run")
        folder.create(Config())
        (folder.path / "notes.txt").write_text("mine")
        folder.discard()
        assert [path.name for path in folder.path.iterdir()] == ["notes.txt"]


class TestLock:
    def test_a_killed_process_holds_it_no_longer(self, tmp_path: Path) -> None:
        folder = RunFolder(tmp_path)
        folder.create(Config())
        folder.unlock()
        with another_process_that_holds(tmp_path) as process:
            assert is_running(tmp_path)
            process.kill()
            process.wait()
            assert not is_running(tmp_path)
            folder.lock()
        folder.unlock()
        assert not is_running(tmp_path / "nothing")


class TestAtomically:
    def test_a_crash_while_filling_leaves_the_old_folder(self, tmp_path: Path) -> None:
        path = tmp_path / "folder"
        replace_folder(path, lambda target: (target / "a").write_text("old") and None)

        def crash(target: Path) -> None:
            (target / "a").write_text("new")
            raise RuntimeError("power cut")

        with pytest.raises(RuntimeError):
            replace_folder(path, crash)
        assert (path / "a").read_text() == "old"
        replace_folder(path, lambda target: (target / "b").write_text("new") and None)
        assert [file.name for file in path.iterdir()] == ["b"]
        assert [folder.name for folder in tmp_path.iterdir()] == ["folder"]
