"""The line between Flower's short-lived client process and the site's trainer.

A Unix socket in a folder that only the site's user can enter. A message is one JSON header and,
where an adapter travels, its bytes; nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import tempfile
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from prelort.errors import PrelortError

HEADER_BYTES = 1 << 20
BLOB_BYTES = 1 << 34
"""More than these is not read."""


@dataclass(frozen=True, slots=True)
class Order:
    """A message of the federation, and the configuration that it belongs to.

    ``federation``: the file; ``overrides``: what the run sets differently (``a.b=value``).
    """

    kind: str
    federation: str
    overrides: tuple[str, ...]
    text: str = field(repr=False)
    blob: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Reply:
    """The trainer's reply; ``refused`` says why there is no other."""

    text: str = ""
    blob: bytes | None = field(default=None, repr=False)
    refused: str | None = None


@dataclass(frozen=True, slots=True)
class Place:
    """Where the trainer of one site listens: a socket and a lock."""

    socket: Path
    lock: Path


def place_of(site_file: Path) -> Place:
    """The place for this site's file. Raises `PrelortError` if somebody else could listen in."""
    folder = _private_folder()
    name = hashlib.sha256(str(site_file.resolve()).encode()).hexdigest()[:16]
    return Place(folder / f"{name}.sock", folder / f"{name}.lock")


def send(line: Connection, message: Order | Reply) -> None:
    """Send one message."""
    values = asdict(message)
    blob = values.pop("blob")
    line.send_bytes(json.dumps({**values, "with_blob": blob is not None}).encode())
    if blob is not None:
        line.send_bytes(blob)


def receive_order(line: Connection) -> Order:
    """The next order. Raises `EOFError` or `OSError` when the other side is gone."""
    values, blob = _receive(line)
    overrides = tuple(values.pop("overrides"))
    return Order(**values, overrides=overrides, blob=blob)


def receive_reply(line: Connection) -> Reply:
    """The reply. Raises `EOFError` or `OSError` when the other side is gone."""
    values, blob = _receive(line)
    return Reply(**values, blob=blob)


def _receive(line: Connection) -> tuple[dict[str, Any], bytes | None]:
    values: dict[str, Any] = json.loads(line.recv_bytes(HEADER_BYTES))
    blob = line.recv_bytes(BLOB_BYTES) if values.pop("with_blob") else None
    return values, blob


def _private_folder() -> Path:
    """A folder of this user's alone. Socket paths must be short, so it is not the site's own."""
    base = os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()
    folder = Path(base) / f"prelort-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise PrelortError(
            f"{str(folder)!r} is not a folder of this user alone: remove it, so that nobody else "
            "can talk to the site's trainer"
        )
    return folder
