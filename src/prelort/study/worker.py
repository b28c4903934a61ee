"""A cell's run, in this process or in a worker process that runs cells one after the other.

As a program (``python -m prelort.study.worker PARENT``, which ends with the process PARENT) it
reads a line of JSON for each cell and writes the run's events, one a line, and then a line with the
reason why the cell failed (empty if it did not).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

from prelort import config as configuration
from prelort.config import Config
from prelort.errors import PrelortError
from prelort.events import Event, Listener, decode, encode
from prelort.experiment.folder import RunFolder
from prelort.experiment.parent_watchdog import end_with_parent
from prelort.library_logging import quiet_libraries

PATIENCE = 5.0
"""Seconds to wait while another process uses the folder: that of a killed study ends soon."""

MAX_REASON = 500
"""Maximum number of characters of a reason."""


@dataclass(frozen=True, slots=True)
class Job:
    """A cell's run: its configuration, its folder and its trackers."""

    config: Config
    folder: Path
    track: Sequence[str] = ()


Run = Callable[..., object]
"""`prelort.experiment.run.run` at some place."""


def run_cell(job: Job, listener: Listener, run: Run) -> None:
    """Start a cell's run, or continue it, in this process."""
    run(
        job.config,
        job.folder,
        resume=RunFolder(job.folder).config_file.is_file(),
        listeners=[listener],
        track=job.track,
    )


def reason_of(error: Exception) -> str:
    """An error in one line, with its type unless it is one of `prelort.errors`."""
    text = " ".join(str(error).split()) or "no reason given"
    return _short(text if isinstance(error, PrelortError) else f"{type(error).__name__}: {text}")


class Worker:
    """A process that runs cells one after the other.

    It starts with its first cell, and imports libraries and tokenises data once for all of them.
    One that died is replaced for the next cell.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._closed = False
        self._process: subprocess.Popen[str] | None = None
        self._err: IO[str] | None = None

    def run(self, job: Job, listener: Listener, max_parallel: int | None = None) -> str:
        """Run a cell to its end and return the reason why it failed, empty if it did not.

        A process that dies is a reason too. At most ``max_parallel`` clients train side by side.
        """
        started = self._start()
        if started is None:
            return "stopped"
        process, err = started
        assert process.stdin is not None
        assert process.stdout is not None
        start = os.fstat(err.fileno()).st_size
        message = {
            "config": job.config.model_dump(mode="json"),
            "folder": str(job.folder),
            "track": list(job.track),
            "max_parallel": max_parallel,
        }
        try:
            process.stdin.write(json.dumps(message) + "\n")
            process.stdin.flush()
        except OSError:  # it died before it could read the job
            return _exit_reason(process.wait(), err, start)
        for line in process.stdout:
            if not line.endswith("\n"):  # it was killed while it wrote
                break
            values = json.loads(line)
            if "event" not in values:  # the last line of a cell
                return str(values["reason"])
            listener(decode(line))
        return _exit_reason(process.wait(), err, start)

    def close(self) -> None:
        """Kill the process, if there is one, and start no other. Callable from any thread."""
        with self._lock:
            self._closed = True
            if self._process is not None:
                self._process.kill()
                self._process.wait()

    def _start(self) -> tuple[subprocess.Popen[str], IO[str]] | None:
        with self._lock:
            if self._closed:
                return None
            if self._process is None or self._err is None or self._process.poll() is not None:
                self._err = tempfile.TemporaryFile("w+")  # noqa: SIM115 -- lives as the process
                self._process = subprocess.Popen(
                    [sys.executable, "-m", __name__, str(os.getpid())],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=self._err,
                    text=True,
                    encoding="utf-8",
                    start_new_session=True,  # Ctrl-C is for this process
                )
            return self._process, self._err


def begin(parent: int, jobs: int) -> None:
    """Begin one of several processes of a pool, before libraries are imported."""
    quiet_libraries()
    end_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    import torch

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // jobs))


def main() -> None:
    """The program."""
    quiet_libraries()
    end_with_parent(int(sys.argv[1]))
    # What else is printed, for instance by a user's own method, goes to stderr.
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    from prelort.experiment.backend import InProcess
    from prelort.experiment.run import run

    def send_line(line: str) -> None:
        print(line, file=replies, flush=True)

    def send_event(event: Event) -> None:
        send_line(encode(event))

    backends: dict[int | None, InProcess] = {}
    for line in sys.stdin:
        message: dict[str, Any] = json.loads(line)
        job = Job(configuration.check(message["config"]), Path(message["folder"]), message["track"])
        max_parallel, reason = message["max_parallel"], ""
        backend = backends.setdefault(max_parallel, InProcess(max_parallel=max_parallel))
        try:
            run_cell(job, send_event, partial(run, backend=backend, patience=PATIENCE))
        except Exception as error:  # whatever it is, the other cells can be run
            reason = reason_of(error)
        send_line(json.dumps({"reason": reason}))


def _exit_reason(code: int, err: IO[str], start: int) -> str:
    """How a process ended, with the last line that it wrote after the first ``start`` bytes."""
    err.seek(start)
    output = err.read().strip().splitlines()
    last = f": {output[-1]}" if output else ""
    if code < 0:
        return _short(f"its process was killed by signal {-code}{last}")
    return _short(f"its process ended with code {code}{last}")


def _short(text: str) -> str:
    return text if len(text) <= MAX_REASON else text[: MAX_REASON - 1] + "…"


if __name__ == "__main__":
    main()
