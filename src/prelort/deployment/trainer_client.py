"""Talking to the site's trainer: it is started on demand, and again after a crash."""

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

from prelort.deployment.ipc import Order, Place, Reply, place_of, receive_reply, send
from prelort.deployment.settings import SiteSettings
from prelort.errors import PrelortError

START_SECONDS = 60.0
"""How long a new trainer may take until it listens (it loads everything else after that)."""
PREPARING_SECONDS = 1800.0
"""How long loading the base model and the data may take beside the work itself."""
DYING_SECONDS = 3.0
"""How long a killed trainer may take to be gone."""
LOG_BYTES = 10_000_000


def ask(site_file: Path, own: SiteSettings, order: Order) -> Reply:
    """The trainer's reply. Where there is no trainer, or it dies, a new one gets the order.

    Raises `PrelortError` if that one does not survive the order either, or does not answer.
    """
    place = place_of(site_file)
    for last in (False, True):
        line = _connected(place, site_file, own)
        served_by = _pid(place)
        try:
            with line:
                send(line, order)
                if not line.poll(_patience(order)):
                    _kill(place)
                    raise PrelortError("its trainer did not answer in time and was ended")
                return receive_reply(line)
        except (EOFError, OSError):
            if last:
                raise PrelortError(
                    "its trainer died twice on this message: the log at the site says why"
                ) from None
            _wait_for_end(served_by)
    raise AssertionError("not reached")


def end(site_file: Path) -> None:
    """End the site's trainer, if it has one and it is idle; one at work ends when it is done."""
    place = place_of(site_file)
    with contextlib.suppress(OSError, EOFError), _line(place) as line:
        send(line, Order("end", "", (), ""))
        if line.poll(5.0):
            receive_reply(line)


def stop(site_file: Path, seconds: float = 10.0) -> None:
    """End the site's trainer and wait until it is gone; killed if it does not end by itself."""
    end(site_file)
    place = place_of(site_file)
    deadline = time.monotonic() + seconds
    while place.socket.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    _kill(place)
    for path in (place.socket, place.socket.with_suffix(".pid")):
        path.unlink(missing_ok=True)


def _patience(order: Order) -> float:
    """Seconds until the reply must be there: the round's own time-out and time to load."""
    try:
        stated = float(json.loads(order.text).get("timeout", 3600.0))
    except (ValueError, TypeError, AttributeError):
        stated = 3600.0
    return stated + PREPARING_SECONDS


def _connected(place: Place, site_file: Path, own: SiteSettings) -> Connection:
    """A line to the trainer, which is started if none listens."""
    with contextlib.suppress(OSError):
        return _line(place)
    # One at a time: two messages at once must not start two trainers.
    with FileLock(f"{place.lock}.start", timeout=START_SECONDS + 5):
        with contextlib.suppress(OSError):
            return _line(place)
        process = _start(site_file, own)
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and process.poll() is None:
            with contextlib.suppress(OSError):
                return _line(place)
            time.sleep(0.05)
    raise PrelortError("its trainer cannot be started: the log at the site says why")


def _line(place: Place) -> Connection:
    """Raises `OSError` if nobody listens."""
    connecting = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connecting.connect(str(place.socket))
    except OSError:
        connecting.close()
        raise
    return Connection(connecting.detach())


def _start(site_file: Path, own: SiteSettings) -> subprocess.Popen[bytes]:
    """A trainer in a session of its own: it outlives the short process that starts it."""
    folder = own.state_folder(site_file)
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "trainer.log"
    if log.exists() and log.stat().st_size > LOG_BYTES:
        log.replace(log.with_suffix(".log.1"))
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "prelort.deployment.trainer", str(site_file)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


def _kill(place: Place) -> None:
    """End a trainer that hangs; the next order starts another."""
    pid = _pid(place)
    if pid is not None:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)


def _pid(place: Place) -> int | None:
    """The process that serves the place, None if none says so."""
    with contextlib.suppress(OSError, ValueError):
        return int(place.socket.with_suffix(".pid").read_text())
    return None


def _wait_for_end(pid: int | None) -> None:
    """Until a process that is dying is gone: it may still take calls that nobody will answer."""
    deadline = time.monotonic() + DYING_SECONDS
    with contextlib.suppress(OSError):
        while pid is not None and time.monotonic() < deadline:
            os.kill(pid, 0)
            time.sleep(0.05)
