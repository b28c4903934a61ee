"""Runs in processes that are killed or hindered, and the comparison of what they leave."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

LAST = 3
"""Rounds of the run."""


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

    def _tell(self, order: dict[str, Any]) -> dict[str, int]:
        assert self.process.stdin is not None
        places = {"output": str(self.output), "folder": str(self.folder)}
        self.process.stdin.write(json.dumps({**order, **places}) + "\n")
        self.process.stdin.flush()
        return dict(json.loads(self._answer()))

    def run(self, config: Path, out: Path, kill: dict[str, Any], resume: bool = False) -> Any:
        order = {"task": "run", "config": str(config), "out": str(out), "kill": kill}
        return self._tell({**order, "resume": resume})

    def cli(self, *arguments: str, largest_file: int | None = None) -> tuple[int, str]:
        """The command line in a process of its own: exit code and what it printed.

        ``largest_file``: bytes above which the system refuses to write to a file.
        """
        order = {"task": "cli", "arguments": arguments}
        ended = self._tell({**order, "largest_file": largest_file})
        return ended["code"], self.output.read_text()


def adapters_of(run: Path) -> dict[str, bytes]:
    """Every file of every adapter, as bytes."""
    files = sorted(path for path in (run / "adapters").rglob("*") if path.is_file())
    return {str(path.relative_to(run)): path.read_bytes() for path in files}


def events_of(run: Path) -> list[Any]:
    """The written events without their times."""

    def timeless(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: timeless(v) for k, v in value.items() if k not in ("seconds", "phases")}
        return value

    return [timeless(json.loads(line)) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(run: Path, expected: Path) -> None:
    assert adapters_of(run).keys() == adapters_of(expected).keys()
    for name, data in adapters_of(expected).items():
        assert adapters_of(run)[name] == data, name
    assert events_of(run) == events_of(expected)
    checkpoints = [sorted(p.name for p in (r / "checkpoints").iterdir()) for r in (run, expected)]
    assert checkpoints[0] == checkpoints[1]
