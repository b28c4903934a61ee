"""Messages between Flower's short-lived client process and the site's trainer.

They go through a Unix socket in a folder that only the site's user can enter. A message is a JSON
header and, optionally, the bytes of an adapter; nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from prelort.errors import PrelortError

HEADER_BYTES = 1 << 20
BLOB_BYTES = 1 << 34
"""Limits of what is read."""


class Channel(Protocol):
    """What messages go through: a `Connection`, or the processes of a trainer."""

    def send_bytes(self, data: bytes, /) -> None:
        """Send these bytes."""

    def recv_bytes(self, most: int, /) -> bytes:
        """The next bytes. Raises `OSError` if they are more than ``most``."""


@dataclass(frozen=True, slots=True)
class Request:
    """A message from the server and its configuration.

    ``federation``: the configuration file; ``overrides``: the run's ``a.b=value``.
    """

    kind: str
    federation: str
    overrides: tuple[str, ...]
    text: str = field(repr=False)
    blob: bytes | None = field(default=None, repr=False)


END = Request("end", "", (), "")
"""The message after which a trainer ends."""


@dataclass(frozen=True, slots=True)
class Reply:
    """The trainer's reply; ``refused``: the reason if it has no other."""

    text: str = ""
    blob: bytes | None = field(default=None, repr=False)
    refused: str | None = None


@dataclass(frozen=True, slots=True)
class Address:
    """Where a site's trainer listens: the socket, its lock and the file of its process id."""

    socket: Path
    lock: Path
    pid: Path


def address_of(site_file: Path) -> Address:
    """The address for this site file. Raises `PrelortError` if other users could listen there."""
    folder = _private_folder()
    name = hashlib.sha256(str(site_file.resolve()).encode()).hexdigest()[:16]
    return Address(*(folder / f"{name}.{suffix}" for suffix in ("sock", "lock", "pid")))


def send(channel: Channel, message: Request | Reply) -> None:
    """Send one message."""
    values = asdict(message)
    blob = values.pop("blob")
    channel.send_bytes(json.dumps({**values, "with_blob": blob is not None}).encode())
    if blob is not None:
        channel.send_bytes(blob)


def receive_request(channel: Channel) -> Request:
    """The next request. Raises `EOFError` or `OSError` when the other side is gone."""
    values, blob = _receive(channel)
    overrides = tuple(values.pop("overrides"))
    return Request(**values, overrides=overrides, blob=blob)


def receive_reply(channel: Channel) -> Reply:
    """The reply. Raises `EOFError` or `OSError` when the other side is gone."""
    values, blob = _receive(channel)
    return Reply(**values, blob=blob)


def _receive(channel: Channel) -> tuple[dict[str, Any], bytes | None]:
    values: dict[str, Any] = json.loads(channel.recv_bytes(HEADER_BYTES))
    blob = channel.recv_bytes(BLOB_BYTES) if values.pop("with_blob") else None
    return values, blob


def _private_folder() -> Path:
    """A folder of this user alone. Socket paths must be short, so it is not the site's own."""
    base = os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()
    folder = Path(base) / f"prelort-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise PrelortError(
            f"{str(folder)!r} is not a folder of this user alone: remove it, so that nobody else "
            "can send messages to the site's trainer"
        )
    return folder
