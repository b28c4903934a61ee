"""One cell: its run begun, or gone on with, in this process or in one of its own.

As a program (``python -m prelort.experiment.compare.cell``) it reads one line of JSON, the folder
and the configuration, and prints one line of JSON, the reason why it failed or none.
"""

from __future__ import annotations

import json
import os
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
from prelort.experiment.parent import end_with_parent
from prelort.quiet import quiet_libraries
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


def run_apart(
    folder: Path, config: Config, told: Told, stop: threading.Event, parallel: int | None = None
) -> str:
    """Run a cell in a process of its own, which is killed when ``stop`` is set.

    As `run_here`, with ``parallel`` clients side by side at most; a process that dies is a reason
    too. Its events are read off its log.
    """
    log = Log(RunFolder(folder).metrics_file)
    order = {
        "folder": str(folder),
        "config": config.model_dump(mode="json"),
        "parent": os.getpid(),
        "parallel": parallel,
    }
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=err,
            text=True,
            start_new_session=True,  # Ctrl-C is this process's to hear
        )
        try:
            assert process.stdin is not None
            process.stdin.write(json.dumps(order) + "\n")
            process.stdin.close()
            while process.poll() is None:
                if stop.wait(LOOK_SECONDS):
                    return "stopped"
                _tell(log, told)
        except OSError as error:  # it has died before it could read what to do
            process.wait()
            return _last_words(process.returncode, out, err) or str(error)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        _tell(log, told)
        return _last_words(process.returncode, out, err)


def main() -> None:
    """The program: what is to be done comes in, and how it has ended goes out."""
    quiet_libraries()
    order: dict[str, Any] = json.loads(sys.stdin.readline())
    end_with_parent(order["parent"])
    from prelort.experiment.stage import InProcess

    stage_of = InProcess(most_threads=order["parallel"])
    reason = run_here(Path(order["folder"]), check(order["config"]), lambda event: None, stage_of)
    print(json.dumps({"reason": reason}), flush=True)


def _tell(log: Log, told: Told) -> None:
    try:
        found, _ = log.look(time.time())
    except PrelortError:  # the run itself says what is wrong with its log
        return
    for event, _ in found:
        told(event)


def _last_words(code: int, out: IO[str], err: IO[str]) -> str:
    """How a process has ended, by what it printed last."""
    out.seek(0)
    err.seek(0)
    said, complained = out.read().splitlines(), err.read().strip().splitlines()
    if code == 0 and said:
        return str(json.loads(said[-1])["reason"])
    last = f": {complained[-1]}" if complained else ""
    if code < 0:
        return _short(f"its process was killed by signal {-code}{last}")
    return _short(f"its process ended with code {code}{last}")


def _short(text: str) -> str:
    return text if len(text) <= LONGEST_REASON else text[: LONGEST_REASON - 1] + "…"


if __name__ == "__main__":
    main()
