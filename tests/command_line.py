"""The command line called in this process, with what it printed and its exit code."""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass

import pytest
import transformers

from prelort import cli


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one sentence that a user gets for what they can put right."""
        assert self.code == 2, f"exit code {self.code}: {self.out}{self.err}"
        assert "Traceback" not in self.out + self.err
        lines = [line for line in self.err.splitlines() if not line.startswith("warning:")]
        (line,) = (line for line in lines if line.strip())
        assert line.startswith("error: "), line
        return line.removeprefix("error: ")


class CommandLine:
    """``command_line("run", "--out", ...)`` does what a shell would."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        # The command line asks for that before it imports transformers, which is imported here.
        transformers.logging.disable_progress_bar()
        self.monkeypatch = monkeypatch
        self.capsys = capsys

    def __call__(self, *arguments: object) -> Outcome:
        self.capsys.readouterr()
        with self.monkeypatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("default")
            patch.setattr(sys, "argv", ["prelort", *map(str, arguments)])
            patch.setattr(sys, "path", list(sys.path))
            patch.setattr(warnings, "showwarning", warnings.showwarning)
            code = _exit_code()
        captured = self.capsys.readouterr()
        return Outcome(code, captured.out, captured.err)


def _exit_code() -> int:
    try:
        cli.main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0
