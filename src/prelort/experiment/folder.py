"""A run is a folder.

config.toml          the resolved configuration; `prelort run config.toml` repeats the run
versions.json        of Python, of the libraries that matter, and of the machine
metrics.jsonl        one event a line, written while the run goes
log.txt              tracebacks of clients that failed
site_keys.jsonl      real sites: each client's name with the key of its node
labels.json          classification: the names of the classes, in the order of their numbers
base/, tokenizer/    from Python: a model that is in no other files, and a tokenizer
checkpoints/00012/   the server's state after a round, the last two kept
adapters/rank-8/     the result: standard PEFT folders, one for each rank
results.md, *.png    tables and pictures
report.html          the page
privacy.json         with differential privacy: the noise, and how often it was drawn
privacy/             the same of each client, where its examples are private
rows.sha256          the digest of rows given in Python, which a resumed run must have again
trackers.json        the ids of the run in the trackers, and the last rounds logged there
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import platform
import shutil
from importlib import metadata
from pathlib import Path

from filelock import FileLock, Timeout

from prelort import config as configuration
from prelort.config import Config
from prelort.errors import ConfigError
from prelort.events import EventLog
from prelort.files import write_atomically
from prelort.history import RunHistory
from prelort.privacy.example import FOLDER

LIBRARIES = ("prelort", "torch", "transformers", "peft", "datasets", "flwr", "safetensors", "numpy")

GLANCE_SECONDS = 0.2
"""`is_running` may hold a lock for an instant: wait for that long."""

BASE, TOKENIZER, ROWS = "base", "tokenizer", "rows.sha256"
"""Of what was given in Python: folders for a base model that was in no files and for a tokenizer,
and a file for the digest of rows."""

_LEFTOVERS = (".versions.json.tmp", ".config.toml.tmp", ".study.toml.tmp", ".lock")
_BEFORE_THE_ROUNDS = (
    "config.toml",
    "versions.json",
    "metrics.jsonl",
    "log.txt",
    "clients.txt",
    "labels.json",
    "site_keys.jsonl",
    "clients.png",
    "privacy.json",
    "trackers.json",
    ROWS,
)


class RunFolder:
    """The paths of one run, its lock, and its event log."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "config.toml"
        self.versions_file = path / "versions.json"
        self.metrics_file = path / "metrics.jsonl"
        self.log_file = path / "log.txt"
        self.checkpoints = path / "checkpoints"
        self.adapters = path / "adapters"
        self._lock = FileLock(path / ".lock")
        self._made = False

    def create(self, config: Config, patience: float = 0.0) -> None:
        """Make and `lock` the folder for a new run.

        Raises `ConfigError` if it holds a run already, is in use or cannot be written.
        """
        try:
            self.check_free()
            self._made = not self.path.exists()
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock(patience)
            self.check_free()  # another process may have been faster
            self._clear()  # what a start that crashed has left
            write_atomically(self.versions_file, json.dumps(versions(), indent=2).encode())
            self.write_config(config)
        except OSError as error:
            raise ConfigError(
                f"{str(self.path)!r} cannot be written: {error.strerror or error}"
            ) from None

    def write_config(self, config: Config) -> None:
        """Write the resolved configuration."""
        write_atomically(self.config_file, configuration.to_toml(config).encode())

    def check_free(self) -> None:
        """Raise `ConfigError` if the folder holds something that a new run must not touch."""
        if self.path.is_file():
            raise ConfigError(f"{str(self.path)!r} is a file: choose another --out")
        if is_taken(self.path):
            self.unlock()
            raise ConfigError(
                f"{str(self.path)!r} exists and is not empty: choose another --out, or "
                f"continue the run in it by --resume {self.path}"
            )

    def discard(self) -> None:
        """Delete what `create` and the run have written, unless there is a checkpoint."""
        if self.checkpoints.exists():
            return
        self.unlock()
        self._clear()
        (self.path / ".lock").unlink(missing_ok=True)
        if self._made:
            with contextlib.suppress(OSError):  # somebody has put a file of their own there
                self.path.rmdir()

    def _clear(self) -> None:
        for name in _BEFORE_THE_ROUNDS:
            (self.path / name).unlink(missing_ok=True)
        for name in (BASE, TOKENIZER, FOLDER):
            shutil.rmtree(self.path / name, ignore_errors=True)

    def read_config(self) -> Config:
        """The configuration of the run in the folder. Raises `ConfigError` if there is none."""
        if not self.config_file.is_file():
            runs = sorted(repr(str(file.parent)) for file in self.path.rglob("config.toml"))
            advice = f"; name one of its runs: {', '.join(runs)}" if runs else ""
            raise ConfigError(f"{str(self.path)!r} holds no run: config.toml is missing{advice}")
        return configuration.load(self.config_file)

    def lock(self, seconds: float = 0.0) -> None:
        """Lock the folder for this process.

        Raises `ConfigError` if another process still holds it after ``seconds``.
        """
        try:
            self._lock.acquire(timeout=max(seconds, GLANCE_SECONDS))
        except Timeout:
            raise ConfigError(
                f"{str(self.path)!r} is in use: another prelort process is running it"
            ) from None
        except OSError as error:
            raise ConfigError(
                f"{str(self.path)!r} cannot be written: {error.strerror or error}"
            ) from None

    def unlock(self) -> None:
        """Release the folder for other processes."""
        self._lock.release()

    @property
    def events(self) -> EventLog:
        """The run's log."""
        return EventLog(self.metrics_file)

    def history(self) -> RunHistory:
        """The history of the logged events. Raises `PrelortError` for a damaged log."""
        return RunHistory.of(self.events.read())


def is_running(path: Path) -> bool:
    """Whether a process holds the lock of a run's or a study's folder."""
    try:
        with (path / ".lock").open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # until the file is closed
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def is_taken(path: Path) -> bool:
    """Whether a path holds something that a new run must not touch.

    What a run has left that was killed before its first checkpoint does not count. Such a run has
    written the versions first; a configuration without them is the user's own file.
    """
    if path.is_dir():
        left = {child.name for child in path.iterdir()}.difference(_LEFTOVERS)
        before = (*_BEFORE_THE_ROUNDS, BASE, TOKENIZER)
        return bool(left.difference(before if "versions.json" in left else ()))
    return path.exists()


def versions() -> dict[str, str]:
    """Versions of the libraries and the machine that a result may depend on."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for library in LIBRARIES:
        try:
            found[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            found[library] = "not installed"
    return found
