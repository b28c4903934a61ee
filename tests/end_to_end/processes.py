"""Runs in processes that are killed or hindered."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

LAST = 3
"""Rounds of the run."""
KILLED = {"signal": signal.SIGKILL}


class Killer:
    """Talks to `killer.py`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.output = folder / "output.txt"
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("killer.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._answer() == "ready"

    def _answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def _order(self, order: dict[str, Any]) -> dict[str, int]:
        assert self.process.stdin is not None
        places = {"output": str(self.output), "folder": str(self.folder)}
        self.process.stdin.write(json.dumps({**order, **places}) + "\n")
        self.process.stdin.flush()
        return dict(json.loads(self._answer()))

    def run(self, config: Path, out: Path, kill: dict[str, Any], resume: bool = False) -> Any:
        """A run that is killed: how it ended."""
        order = {"task": "run", "config": str(config), "out": str(out), "kill": kill}
        return self._order({**order, "resume": resume})

    def finish(self, config: Path, out: Path, resume: bool = True) -> str:
        """A run that is not killed: what it printed."""
        ended = self.run(config, out, {}, resume)
        assert ended == {"code": 0}, self.output.read_text()
        return self.output.read_text()

    def cli(self, *arguments: str, largest_file: int | None = None) -> tuple[int, str]:
        """The command line in a process of its own: exit code and what it printed.

        ``largest_file``: bytes above which the system refuses to write to a file.
        """
        order = {"task": "cli", "arguments": arguments}
        ended = self._order({**order, "largest_file": largest_file})
        return ended["code"], self.output.read_text()
