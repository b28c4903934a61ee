"""A whole federation on this machine: each SuperLink, SuperNode and trainer is a process."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import psutil
import tomli_w

from prelort.deployment import trainer_client
from prelort.deployment.ipc import address_of
from prelort.deployment.new import create
from prelort.events import Event, EventLog
from prelort.history import RunHistory

E = TypeVar("E", bound=Event)

BIN = Path(sys.executable).parent
FLOWER = (sys.executable, "-m", "prelort.deployment.flower_commands")
TINY: dict[str, Any] = {
    "seed": 3,
    "threads": 1,
    "partition": {"by": "iid", "clients": 3},
    "data": {"max_train_examples": 36, "max_test_examples": 12, "max_length": 32},
    "ranks": {"mix": "2, 4, 8", "assign": "in-order"},
    "training": {"local_steps": 2},
    "evaluation": {"diagnostics": False, "every": 1},
    "federation": {
        "rounds": 3,
        "clients_per_round": 1.0,
        "min_clients": 3,
        "quorum": 1,
        "timeout": 120.0,
        "wait": 120.0,
        "verify_names": False,  # without TLS a SuperNode has a new key at each start
    },
}
"""Two optimiser steps a round of the embedded model, for sites that are dealt its texts."""


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Nested values with some changed."""
    values = dict(base)
    for key, value in changes.items():
        inner = values.get(key)
        values[key] = merged(inner, value) if isinstance(inner, dict) else value
    return values


def missing() -> list[str]:
    """The commands that the scripts need and that this machine does not have."""
    return [name for name in ("openssl", "ssh-keygen", "setsid", "pgrep") if not shutil.which(name)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until(what: Callable[[], Any], seconds: float, why: str) -> Any:
    """The first true value of ``what``; fails after so many seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = what()
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError(f"after {seconds:g} s still waiting for {why}")


class Federation:
    """A folder as `prelort new` makes it, and its processes; all of them end with the block."""

    def __init__(
        self, path: Path, changes: dict[str, Any] | None = None, *, tls: bool = False
    ) -> None:
        self.path = path / "federation"
        self.tls = tls
        self.port = free_port()
        create(self.path, 3)
        self.config = self.path / "app" / "federation.toml"
        self.configure(changes or {})
        self.environment = {
            **os.environ,
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "FLWR_HOME": str(self.path / ".flower"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "SERVER": "127.0.0.1",
            "BIND": "127.0.0.1",
            "PORT": str(self.port),
            "OMP_NUM_THREADS": "1",
        }
        (self.path / ".flower").mkdir()
        (self.path / "logs").mkdir()
        self.superlink: subprocess.Popen[bytes] | None = None
        self.nodes: dict[str, subprocess.Popen[bytes]] = {}
        self.runs: list[subprocess.Popen[bytes]] = []

    # Settings

    def configure(self, changes: dict[str, Any]) -> None:
        self.config.write_text(tomli_w.dumps(merged(TINY, changes)))

    def site_file(self, site: str) -> Path:
        return self.path / "sites" / site / "site.toml"

    def set_site(self, site: str, **values: Any) -> Path:
        """The site's file; by default it is dealt the part of its number."""
        file = self.site_file(site)
        file.parent.mkdir(parents=True, exist_ok=True)
        number = int(site.rsplit("-", 1)[1])
        file.write_text(tomli_w.dumps(values or {"partition": number - 1}))
        return file

    # Processes

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            for file in self.path.glob("runs/*/metrics.jsonl"):
                print(file.read_text()[-20_000:])
            for log in sorted(self.path.glob("logs/*")) + sorted(
                self.path.glob("sites/*/state/*.log")
            ):
                print(f"=== {log.name} of {log.parent}\n{log.read_text()[-4000:]}")
        for process in [*self.runs, *self.nodes.values(), self.superlink]:
            if process is not None:
                kill_group(process)
        for file in self.path.glob("sites/*/site.toml"):
            resume_trainer(file)
            trainer_client.stop(file, seconds=0.5)

    def script(self, name: str, *arguments: str) -> str:
        """One of the scripts, to its end."""
        found = subprocess.run(
            [str(self.path / "scripts" / name), *arguments],
            cwd=self.path,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        return found.stdout

    def background(self, log: str, *command: str) -> subprocess.Popen[bytes]:
        with (self.path / "logs" / log).open("ab") as output:
            return subprocess.Popen(
                command,
                stdout=output,
                stderr=output,
                stdin=subprocess.DEVNULL,
                env=self.environment,
                start_new_session=True,
            )

    def start_superlink(self, *options: str) -> None:
        if self.tls:
            self.script("certificates.sh")
            self.script("connection.sh")
            command = [str(self.path / "scripts" / "superlink.sh")]
        else:
            address = {"address": f"127.0.0.1:{self.port}", "insecure": True}
            superlink = {"superlink": {"default": "federation", "federation": address}}
            (self.path / ".flower" / "config.toml").write_text(tomli_w.dumps(superlink))
            command = [
                *FLOWER,
                "superlink",
                "--insecure",
                *("--host", "127.0.0.1", "--port", str(self.port)),
                *("--database", str(self.path / ".flower" / "superlink.db")),
                "--disable-runtime-dependency-installation",
                *options,
            ]
        self.superlink = self.background("superlink.log", *command)
        until(self.superlink_listens, 60, "the SuperLink")

    def superlink_listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def start_node(self, site: str) -> subprocess.Popen[bytes]:
        if not self.tls:
            return self.start_plain_node(site, f'site="{self.site_file(site)}"')
        script = str(self.path / "scripts" / "supernode.sh")
        self.nodes[site] = self.background(f"{site}.log", script, site, str(free_port()))
        return self.nodes[site]

    def start_plain_node(
        self, name: str, node_config: str, port: int | None = None
    ) -> subprocess.Popen[bytes]:
        """A SuperNode without TLS; ``port``: of what is between it and the SuperLink."""
        self.nodes[name] = self.background(
            f"{name}.log",
            *FLOWER,
            "supernode",
            "--insecure",
            *("--superlink", f"127.0.0.1:{port or self.port}"),
            *("--host", "127.0.0.1", "--port", str(free_port())),
            *("--node-config", node_config),
        )
        return self.nodes[name]

    def pause(self, seconds: float) -> None:
        time.sleep(seconds)

    def start(self, sites: int = 3) -> Self:
        """The SuperLink and so many SuperNodes with a part of the data each."""
        self.start_superlink()
        for number in range(1, sites + 1):
            self.set_site(f"site-{number}")
            self.start_node(f"site-{number}")
        return self

    # Runs

    def start_run(self, name: str = "run", settings: str = "") -> subprocess.Popen[bytes]:
        self._cut(name)
        process = self.background(
            f"flwr-{len(self.runs)}.log",
            str(self.path / "scripts" / "run.sh"),
            str(self.folder(name)),
            settings,
        )
        self.runs.append(process)
        return process

    def _cut(self, name: str) -> None:
        """Cut the log where its last checkpoint ends, as going on does: what follows is new.

        Not that of a run that is still going on, or has ended.
        """
        going_on = any(process.poll() is None for process in self.runs)
        if going_on or self.history(name).finished:
            return
        checkpoints = sorted(self.folder(name).glob("checkpoints/*/state.json"))
        log = self.folder(name) / "metrics.jsonl"
        if log.is_file():
            size = json.loads(checkpoints[-1].read_text())["metrics_bytes"] if checkpoints else 0
            if log.stat().st_size > size:
                os.truncate(log, size)

    def run(self, name: str = "run", settings: str = "", seconds: float = 240) -> str:
        """Run to the end; what `flwr run` showed."""
        process = self.start_run(name, settings)
        process.wait(seconds)
        return self.shown()

    def shown(self) -> str:
        return (self.path / "logs" / f"flwr-{len(self.runs) - 1}.log").read_text()

    def folder(self, name: str = "run") -> Path:
        return self.path / "runs" / name

    def events(self, name: str = "run") -> list[Event]:
        return EventLog(self.folder(name) / "metrics.jsonl").read()

    def history(self, name: str = "run") -> RunHistory:
        return RunHistory.of(self.events(name))

    def wait_for(
        self,
        kind: type[E],
        of_round: int | None = None,
        name: str = "run",
        seconds: float = 180,
        client: str | None = None,
    ) -> E:
        """The event, as soon as it is in the run's log."""

        def look() -> E | None:
            for event in self.events(name):
                same_client = client in (None, getattr(event, "client", None))
                if isinstance(event, kind) and of_round in (None, event.round) and same_client:
                    return event
            return None

        found: E = until(look, seconds, f"{kind.__name__} of round {of_round}")
        return found

    def server_app(self) -> psutil.Process:
        """The process of the server's app."""
        assert self.superlink is not None

        def look() -> psutil.Process | None:
            for process in psutil.Process(self.superlink.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if "flwr-serverapp" in " ".join(process.cmdline()):
                        return process
            return None

        found: psutil.Process = until(look, 60, "the server's app")
        return found

    def trainer(self, site: str) -> int:
        """The process id of a site's trainer."""
        return trainer_of(self.site_file(site))


def trainer_of(site_file: Path) -> int:
    file = address_of(site_file).pid
    return int(until(lambda: file.is_file() and file.read_text(), 60, "the trainer"))


def resume_trainer(site_file: Path) -> None:
    with contextlib.suppress(OSError, ValueError):
        os.kill(int(address_of(site_file).pid.read_text()), signal.SIGCONT)


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to a process and all that it has started."""
    children: Sequence[psutil.Process] = ()
    with contextlib.suppress(psutil.Error):
        children = psutil.Process(process.pid).children(recursive=True)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for child in children:
        with contextlib.suppress(psutil.Error):
            if "prelort.deployment.trainer" not in " ".join(child.cmdline()):
                child.kill()
    process.wait(30)
