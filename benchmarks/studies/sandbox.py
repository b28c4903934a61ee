"""Run untrusted Python: no network, little memory, little time, and nothing of this process.

A program runs in its own user, network and process namespaces (`unshare` of Linux' util-linux), in
an empty folder, with limits on CPU seconds, memory, written files and processes; root becomes
`nobody`, because the kernel does not count root's processes. It can still read what its user can
read. It passes only if it runs to its end: a random word is printed after its last line.
"""

from __future__ import annotations

import os
import resource
import secrets
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal

Outcome = Literal["passed", "failed", "timed out"]

UNSHARE = ("unshare", "--user", "--map-root-user", "--net", "--pid", "--fork", "--kill-child")
MOST_FILE_BYTES = 1 << 20
# Set within the namespace: before, the limit would count all that this user runs.
FEW = ("prlimit", "--nproc=64")
NOBODY = 65534
PYTHONS = (os.path.realpath(sys.executable), "/usr/local/bin/python3", "/usr/bin/python3")
"""This environment's base interpreter, or the system's if only root can read the former."""


def interpreter() -> str:
    """A Python that runs in a sandbox. Raises RuntimeError with the reason if none does."""
    if shutil.which("unshare") is None:
        raise RuntimeError("untrusted code is not run here: there is no `unshare` (util-linux)")
    reasons = []
    for python in filter(os.path.exists, PYTHONS):
        command = [*UNSHARE, *FEW, python, "-I", "-c", ""]
        done = subprocess.run(command, check=False, capture_output=True, text=True, **_user())
        if done.returncode == 0:
            return python
        reasons.append(done.stderr.strip())
    raise RuntimeError(f"untrusted code is not run here: {'; '.join(reasons)}")


def run(program: str, python: str, *, seconds: float = 5.0, memory: int = 512 << 20) -> Outcome:
    """Whether ``program`` runs to its end within ``seconds`` and ``memory`` bytes.

    ``python``: the result of `interpreter`.
    """
    word = secrets.token_hex(16)

    def limit() -> None:
        limits = {
            resource.RLIMIT_CPU: int(seconds) + 1,
            resource.RLIMIT_AS: memory,
            resource.RLIMIT_FSIZE: MOST_FILE_BYTES,
            resource.RLIMIT_CORE: 0,
        }
        for kind, most in limits.items():
            resource.setrlimit(kind, (most, most))

    with tempfile.TemporaryDirectory() as folder:
        path, said = Path(folder) / "program.py", Path(folder) / "said"
        if os.getuid() == 0:
            os.chown(folder, NOBODY, NOBODY)
        path.write_text(f"{program}\n\nprint({word!r})\n", encoding="utf-8")
        with said.open("wb") as out:
            try:
                subprocess.run(
                    [*UNSHARE, *FEW, python, "-I", "-B", str(path)],
                    cwd=folder,
                    env={},
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.DEVNULL,
                    timeout=seconds,
                    preexec_fn=limit,
                    check=False,
                    **_user(),
                )
            except subprocess.TimeoutExpired:
                return "timed out"
        last = said.read_text(encoding="utf-8", errors="replace").rstrip("\n").rsplit("\n", 1)[-1]
    return "passed" if last == word else "failed"


def _user() -> dict[str, Any]:
    """Arguments of `subprocess.run` for the user that a program runs as."""
    return {"user": NOBODY, "group": NOBODY, "extra_groups": []} if os.getuid() == 0 else {}
