"""Requests to the site's trainer, which is started on demand and again after a crash."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

from filelock import FileLock

from prelort.deployment import ipc
from prelort.deployment.ipc import Address, Reply, Request, address_of
from prelort.deployment.settings import SiteSettings
from prelort.errors import PrelortError

START_SECONDS = 60.0
"""Time for a new trainer to start listening (it loads everything else later)."""
LOADING_SECONDS = 1800.0
"""Time for loading the base model and the data, besides the work itself."""
ENDING_SECONDS = 3.0
"""Time for a killed trainer to end."""
LOG_BYTES = 10_000_000


def send(site_file: Path, site: SiteSettings, request: Request) -> Reply:
    """The trainer's reply. A trainer is started if there is none, and once more if it dies.

    Raises `PrelortError` if the second one dies too, or if it does not answer in time.
    """
    address = address_of(site_file)
    for _ in range(2):
        connection = _connect_or_start(address, site_file, site)
        pid = _pid(address)
        try:
            with connection:
                ipc.send(connection, request)
                if not connection.poll(_timeout(request)):
                    _kill(address)
                    raise PrelortError("its trainer did not answer in time and was ended")
                return ipc.receive_reply(connection)
        except (EOFError, OSError):
            _wait_for_end(pid)
    raise PrelortError("its trainer died twice on this message: the log at the site says why")


def end(site_file: Path) -> None:
    """End the site's trainer if it has one; a busy one ends after its work."""
    address = address_of(site_file)
    with contextlib.suppress(OSError, EOFError), _connect(address) as connection:
        ipc.send(connection, ipc.END)
        if connection.poll(5.0):
            ipc.receive_reply(connection)


def stop(site_file: Path, seconds: float = 10.0) -> None:
    """End the site's trainer and wait for its end; after ``seconds`` it is killed."""
    end(site_file)
    address = address_of(site_file)
    deadline = time.monotonic() + seconds
    while address.socket.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    _kill(address)
    address.socket.unlink(missing_ok=True)
    address.pid.unlink(missing_ok=True)


def _timeout(request: Request) -> float:
    """Seconds to wait for the reply: the round's own timeout and the time to load."""
    try:
        timeout = float(json.loads(request.text).get("timeout", 3600.0))
    except (ValueError, TypeError, AttributeError):
        timeout = 3600.0
    return timeout + LOADING_SECONDS


def _connect_or_start(address: Address, site_file: Path, site: SiteSettings) -> Connection:
    """A connection to the trainer, which is started if none listens."""
    with contextlib.suppress(OSError):
        return _connect(address)
    # One at a time: two simultaneous messages must not start two trainers.
    with FileLock(f"{address.lock}.start", timeout=START_SECONDS + 5):
        with contextlib.suppress(OSError):
            return _connect(address)
        process = _start(site_file, site)
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and process.poll() is None:
            with contextlib.suppress(OSError):
                return _connect(address)
            time.sleep(0.05)
    raise PrelortError("its trainer cannot be started: the log at the site says why")


def _connect(address: Address) -> Connection:
    """Raises `OSError` if nobody listens."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as unix:
        unix.connect(str(address.socket))
        return Connection(unix.detach())


def _start(site_file: Path, site: SiteSettings) -> subprocess.Popen[bytes]:
    """Start a trainer in a session of its own: it outlives this short-lived process."""
    folder = site.state_folder(site_file)
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "trainer.log"
    if log.exists() and log.stat().st_size > LOG_BYTES:
        log.replace(log.with_suffix(".log.1"))
    command = [sys.executable, "-m"]
    if site.trainer.accelerate is not None:
        config = site_file.parent / Path(site.trainer.accelerate).expanduser()
        command += ["accelerate.commands.launch", "--config_file", str(config)]
        command += ["--main_process_port", "0", "--module"]
    with log.open("ab") as output:
        return subprocess.Popen(
            [*command, "prelort.deployment.trainer", str(site_file)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


def _kill(address: Address) -> None:
    """Kill a trainer that hangs; the next request starts another."""
    pid = _pid(address)
    if pid is not None:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)


def _pid(address: Address) -> int | None:
    """The process that serves the address, None if there is none."""
    with contextlib.suppress(OSError, ValueError):
        return int(address.pid.read_text())
    return None


def _wait_for_end(pid: int | None) -> None:
    """Wait until a killed process is gone: it might still accept connections."""
    deadline = time.monotonic() + ENDING_SECONDS
    with contextlib.suppress(OSError):
        while pid is not None and time.monotonic() < deadline:
            os.kill(pid, 0)
            time.sleep(0.05)
