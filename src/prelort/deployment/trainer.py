"""The site's trainer: a process that keeps the base model and the data ready between messages.

Started on demand by `warm`, one for each site file. It takes one message at a time, ends when it
was idle for long or is told that the run is over, and ends itself when it takes more memory than
the site allows; the next message then starts another.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from prelort.deployment import settings
from prelort.deployment.ipc import Place, Reply, place_of, receive_order, send
from prelort.library_logging import quiet_libraries
from prelort.planning import sizes

log = logging.getLogger("prelort.trainer")

LOOK_SECONDS = 0.5
TOO_MUCH_MEMORY = 3
"""The exit status of a trainer that has taken more than it may."""


def main(site_file: Path) -> None:
    """Serve this site until there is nothing more to do."""
    quiet_libraries()
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO)
    own = settings.read(site_file)
    place = place_of(site_file)
    if own.trainer.memory is not None:
        _watch_memory(sizes.parse(own.trainer.memory))
    lock = FileLock(place.lock)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.info("another trainer serves this site already")
        return
    with lock, _listening(place) as listener:
        log.info("process %d serves %s", os.getpid(), site_file)
        _serve(listener, site_file, own.trainer.idle_minutes * 60.0)


def _serve(listener: socket.socket, site_file: Path, idle: float) -> None:
    """Answer one message after the other."""
    from prelort.deployment.worker import Worker  # after listening: this takes seconds

    worker = Worker(site_file)
    listener.settimeout(idle)
    while True:
        try:
            accepted, _ = listener.accept()
        except TimeoutError:
            log.info("idle for %g s: ended", idle)
            return
        accepted.setblocking(True)
        with contextlib.suppress(EOFError, OSError), Connection(accepted.detach()) as line:
            order = receive_order(line)
            if order.kind == "end":
                log.info("the run is over: ended")
                send(line, Reply())
                return
            log.info("%s: begun", order.kind)
            started = time.monotonic()
            with _called_off(line) as stopped:
                reply = worker.answer(order, stopped)
            seconds = time.monotonic() - started
            log.info("%s: %s after %.1f s", order.kind, reply.refused or "done", seconds)
            send(line, reply)


@contextlib.contextmanager
def _listening(place: Place) -> Iterator[socket.socket]:
    place.socket.unlink(missing_ok=True)
    pid = place.socket.with_suffix(".pid")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(place.socket))
        listener.listen(16)
        pid.write_text(str(os.getpid()))
        try:
            yield listener
        finally:
            place.socket.unlink(missing_ok=True)
            pid.unlink(missing_ok=True)


@contextlib.contextmanager
def _called_off(line: Connection) -> Iterator[Callable[[], bool]]:
    """A function that says whether the one who asked is gone: nobody waits for the work then."""
    gone, done = threading.Event(), threading.Event()

    def look() -> None:
        while not done.wait(LOOK_SECONDS):
            with contextlib.suppress(OSError):
                if not line.poll():
                    continue
            gone.set()  # the other side says nothing more, so this can only be its end
            return

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield gone.is_set
    finally:
        done.set()
        watcher.join()


def _watch_memory(max_rank: int) -> None:
    process = psutil.Process()

    def look() -> None:
        while True:
            used = process.memory_info().rss
            if used > max_rank:
                log.error("takes %d bytes of memory, allowed are %d: ended", used, max_rank)
                os._exit(TOO_MUCH_MEMORY)
            time.sleep(LOOK_SECONDS)

    threading.Thread(target=look, daemon=True).start()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
