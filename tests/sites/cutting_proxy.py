"""A proxy between a SuperNode and a SuperLink that cuts connections at chosen requests."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections import Counter
from collections.abc import Mapping
from typing import Literal, Self

Cut = Literal["request", "answer"]
"""In the middle of the request, which does not get there; or before the answer, which is lost."""
START = b"POST /v1/fleet/"


class CuttingProxy:
    """Listens on ``port`` and forwards to another.

    ``cuts``: the name of a request and its number (from 1) -> where its connection is cut.
    """

    def __init__(self, to_port: int, cuts: Mapping[tuple[str, int], Cut]) -> None:
        self._to, self._cuts = to_port, dict(cuts)
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listening.getsockname()[1])
        self.requests: Counter[str] = Counter()
        self._lock = threading.Lock()

    @property
    def cut(self) -> bool:
        """Whether all cuts were made."""
        return not self._cuts

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._listening.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listening.accept()
            except OSError:
                return
            threading.Thread(target=self._forward, args=(client,), daemon=True).start()

    def _forward(self, client: socket.socket) -> None:
        """Requests one after the other, each with its answer, until someone closes."""
        with (
            contextlib.suppress(OSError, EOFError),
            client,
            socket.create_connection(("127.0.0.1", self._to)) as server,
        ):
            while True:
                head, body = _message(client)
                name = head.split(b"\r\n", 1)[0].removeprefix(START).split()[0].decode()
                with self._lock:
                    self.requests[name] += 1
                    cut = self._cuts.pop((name, self.requests[name]), None)
                if cut == "request":
                    server.sendall(head + body[: len(body) // 2])
                    return
                server.sendall(head + body)
                answer = _message(server)
                if cut == "answer":
                    return
                client.sendall(b"".join(answer))


def _message(connection: socket.socket) -> tuple[bytes, bytes]:
    """Head and body of the next request or answer. Raises `EOFError` at the end."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += _read(connection)
    head, _, body = data.partition(b"\r\n\r\n")
    lines = head.lower().split(b"\r\n")
    length = next((int(line.split(b":")[1]) for line in lines if b"content-length" in line), 0)
    while len(body) < length:
        body += _read(connection)
    return head + b"\r\n\r\n", body


def _read(connection: socket.socket) -> bytes:
    data = connection.recv(1 << 16)
    if not data:
        raise EOFError
    return data
