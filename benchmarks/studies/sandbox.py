"""Run untrusted Python: no network, little memory, little time, and nothing of this process.

A program runs in its own user, network and process namespaces (Linux, `unshare` of util-linux), in
an empty folder, with limits on CPU seconds, memory, written files and processes. It can still read
what this user can read. It counts as passed only if it has run to its end: a word that it cannot
know is printed after its last line.
"""

from __future__ import annotations

import resource
import secrets
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Literal

Outcome = Literal["passed", "failed", "timed out"]

UNSHARE = ("unshare", "--user", "--map-root-user", "--net", "--pid", "--fork", "--kill-child")
MOST_FILE_BYTES = 1 << 20
MOST_PROCESSES = 64


def available() -> str:
    """Why programs cannot be run apart on this machine; empty if they can."""
    if shutil.which("unshare") is None:
        return "there is no `unshare` (util-linux)"
    done = subprocess.run([*UNSHARE, "true"], check=False, capture_output=True, text=True)
    return done.stderr.strip() if done.returncode else ""


def run(program: str, *, seconds: float = 5.0, memory: int = 512 << 20) -> Outcome:
    """Whether ``program`` runs to its end within ``seconds`` and ``memory`` bytes.

    Raises RuntimeError where it cannot be run apart: it is never run without.
    """
    reason = available()
    if reason:
        raise RuntimeError(f"untrusted code is not run here: {reason}")
    word = secrets.token_hex(16)

    def limit() -> None:
        limits = {
            resource.RLIMIT_CPU: int(seconds) + 1,
            resource.RLIMIT_AS: memory,
            resource.RLIMIT_FSIZE: MOST_FILE_BYTES,
            resource.RLIMIT_NPROC: MOST_PROCESSES,
            resource.RLIMIT_CORE: 0,
        }
        for kind, most in limits.items():
            resource.setrlimit(kind, (most, most))

    with tempfile.TemporaryDirectory() as folder:
        path, said = Path(folder) / "program.py", Path(folder) / "said"
        path.write_text(f"{program}\n\nprint({word!r})\n", encoding="utf-8")
        with said.open("wb") as out:
            try:
                subprocess.run(
                    [*UNSHARE, sys.executable, "-I", "-B", str(path)],
                    cwd=folder,
                    env={},
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.DEVNULL,
                    timeout=seconds,
                    preexec_fn=limit,  # noqa: PLW1509 -- this process has no other threads here
                    check=False,
                )
            except subprocess.TimeoutExpired:
                return "timed out"
        last = said.read_text(encoding="utf-8", errors="replace").rstrip("\n").rsplit("\n", 1)[-1]
    return "passed" if last == word else "failed"
