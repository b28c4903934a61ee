"""One cell: its run begun, or gone on with, in this process or in one of its own.

As a program (``python -m prelort.experiment.compare.cell PARENT``, the number of the process that
it ends with) it reads a line of JSON for each cell, the folder and the configuration, and answers
with a line of JSON, the reason why the cell failed or none.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from prelort.config import Config, check
from prelort.errors import PrelortError
from prelort.experiment.folder import RunFolder
from prelort.experiment.parent_watchdog import end_with_parent
from prelort.library_logging import quiet_libraries
from prelort.report import events as reading
from prelort.report.events import Event
from prelort.report.follow import Log

if TYPE_CHECKING:
    from prelort.experiment.stage import StageOf

Told = Callable[[Event], None]
"""Called with the events of a cell's run."""

PATIENCE = 5.0
"""Seconds to wait for a process to leave the folder, which may be that of a killed study."""

LOOK_SECONDS = 0.3
"""How often the log of a run in another process is looked at."""

LONGEST_REASON = 500


def is_finished(folder: Path) -> bool:
    """Whether the cell's run has come to its end; not if its log is damaged."""
    log = RunFolder(folder).metrics_file
    try:
        return log.is_file() and reading.is_finished(reading.read(log))
    except PrelortError:
        return False


def configuration_of(folder: Path, config: Config) -> Config:
    """The configuration to run a cell with: a begun one keeps its number of threads.

    Its result depends on it in the last bits, while ``--jobs`` may change from call to call.
    """
    run = RunFolder(folder)
    if not run.config_file.is_file():
        return config
    return config.model_copy(update={"threads": run.read_config().threads})


def run_here(folder: Path, config: Config, told: Told, stage_of: StageOf) -> str:
    """Run a cell in this process, to the end; the reason in one line if it fails, else nothing."""
    from prelort.experiment.run import run

    begun = RunFolder(folder).config_file.is_file()
    try:
        run(config, folder, resume=begun, listeners=[told], stage_of=stage_of, patience=PATIENCE)
    except Exception as error:  # whatever it is, the other cells can be run
        return reason_of(error)
    return ""


def reason_of(error: Exception) -> str:
    """An error in one line; of one that is not ours its kind too."""
    text = " ".join(str(error).split()) or "no reason given"
    return _short(text if isinstance(error, PrelortError) else f"{type(error).__name__}: {text}")


class Apart:
    """A process of its own in which cells are run, one after the other.

    It starts with the first cell and is kept, so that libraries are imported and data are tokenised
    once for all of them; one that died is replaced for the next cell.
    """

    def __init__(self, stop: threading.Event) -> None:
        self._stop = stop
        self._process: subprocess.Popen[str] | None = None
        self._err: IO[str] | None = None

    def run(self, folder: Path, config: Config, told: Told, parallel: int | None = None) -> str:
        """As `run_here`, with ``parallel`` clients side by side at most.

        A process that dies is a reason too. It is killed when the event given at the start is set.
        The run's events are read off its log.
        """
        log = Log(RunFolder(folder).metrics_file)
        order = {"folder": str(folder), "config": config.model_dump(mode="json")}
        process = self._started()
        assert process.stdin is not None
        assert process.stdout is not None
        assert self._err is not None
        earlier = os.fstat(self._err.fileno()).st_size
        try:
            process.stdin.write(json.dumps({**order, "parallel": parallel}) + "\n")
            process.stdin.flush()
            while not select.select([process.stdout], [], [], LOOK_SECONDS)[0]:
                if self._stop.is_set():
                    self.close()
                    return "stopped"
                _tell(log, told)
            answer = process.stdout.readline()
        except OSError:  # it has died before it could read what to do
            answer = ""
        _tell(log, told)
        if answer:
            return str(json.loads(answer)["reason"])
        return _last_words(process.wait(), self._err, earlier)

    def close(self) -> None:
        """End the process at once, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None
        if self._err is not None:
            self._err.close()
            self._err = None

    def _started(self) -> subprocess.Popen[str]:
        if self._process is not None and self._process.poll() is not None:
            self.close()
        if self._process is None:
            self._err = tempfile.TemporaryFile("w+")  # noqa: SIM115 -- lives as the process
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._err,
                text=True,
                start_new_session=True,  # Ctrl-C is this process's to hear
            )
        return self._process


def main() -> None:
    """The program: for each line with what is to be done one goes out with how it has ended."""
    quiet_libraries()
    end_with_parent(int(sys.argv[1]))
    # What is printed on the way, by a method of one's own for instance, is no answer.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    from prelort.experiment.stage import InProcess

    stages: dict[int | None, StageOf] = {}
    for line in sys.stdin:
        order: dict[str, Any] = json.loads(line)
        parallel = order["parallel"]
        stage_of = stages.setdefault(parallel, InProcess(most_threads=parallel))
        config = check(order["config"])
        reason = run_here(Path(order["folder"]), config, lambda event: None, stage_of)
        print(json.dumps({"reason": reason}), file=answers, flush=True)


def _tell(log: Log, told: Told) -> None:
    try:
        found, _ = log.look(time.time())
    except PrelortError:  # the run itself says what is wrong with its log
        return
    for event, _ in found:
        told(event)


def _last_words(code: int, err: IO[str], earlier: int) -> str:
    """How a process has ended, by what it wrote last after so many bytes of other cells' errors."""
    err.seek(earlier)
    complained = err.read().strip().splitlines()
    last = f": {complained[-1]}" if complained else ""
    if code < 0:
        return _short(f"its process was killed by signal {-code}{last}")
    return _short(f"its process ended with code {code}{last}")


def _short(text: str) -> str:
    return text if len(text) <= LONGEST_REASON else text[: LONGEST_REASON - 1] + "…"


if __name__ == "__main__":
    main()
