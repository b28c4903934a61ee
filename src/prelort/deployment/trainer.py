"""The site's trainer: a process that keeps the base model and the data loaded between messages.

`trainer_client` starts one per site file on demand. It answers one message at a time. It ends after
an idle time, at the end of the run, or when it takes more memory than the site allows; the next
message then starts another.
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
from prelort.deployment.ipc import END, Address, Reply, address_of, receive_request, send
from prelort.deployment.settings import SiteSettings
from prelort.errors import PrelortError
from prelort.experiment.parent_watchdog import end_with_parent
from prelort.library_logging import quiet_libraries
from prelort.planning import sizes

log = logging.getLogger("prelort.trainer")

POLL_SECONDS = 0.5
TOO_MUCH_MEMORY = 3
"""The exit status of a trainer that exceeds its memory limit."""


def main(site_file: Path) -> None:
    """Serve this site until the run ends or the trainer has been idle for too long."""
    quiet_libraries()
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO)
    site = settings.read(site_file)
    address = address_of(site_file)
    several = site.trainer.accelerate is not None
    if several:
        end_with_parent()  # accelerate's launcher, which ends all processes when one dies
    if site.trainer.memory is not None:
        _watch_memory(sizes.parse(site.trainer.memory))
    if several and os.environ["RANK"] != "0":
        _follow(site_file)
        return
    lock = FileLock(address.lock)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        sys.exit("another trainer serves this site already")
    with lock, _listening(address) as listener:
        log.info("process %d serves %s", os.getpid(), site_file)
        _serve(listener, site_file, site)


def _serve(listener: socket.socket, site_file: Path, site: SiteSettings) -> None:
    """Answer messages one after the other, together with the trainer's other processes."""
    from prelort.deployment.worker import Worker  # after listening: this takes seconds
    from prelort.training.processes import ALONE, join

    processes = ALONE if site.trainer.accelerate is None else join()
    worker = Worker(site_file, processes)
    idle = site.trainer.idle_minutes * 60.0
    listener.settimeout(idle)
    while True:
        try:
            accepted, _ = listener.accept()
        except TimeoutError:
            log.info("idle for %g s: ended", idle)
            send(processes, END)
            return
        accepted.setblocking(True)
        with contextlib.suppress(EOFError, OSError), Connection(accepted.detach()) as connection:
            request = receive_request(connection)
            send(processes, request)
            if request.kind == END.kind:
                log.info("the run is over: ended")
                send(connection, Reply())
                return
            log.info("%s: started", request.kind)
            started = time.monotonic()
            with _cancelled(connection) as cancelled:
                reply = worker.answer(request, cancelled)
            seconds = time.monotonic() - started
            log.info("%s: %s after %.1f s", request.kind, reply.refused or "done", seconds)
            send(connection, reply)


def _follow(site_file: Path) -> None:
    """Do the work of each message as process 0 does, which alone replies."""
    from prelort.deployment.worker import Worker
    from prelort.training.processes import join

    processes = join()
    worker = Worker(site_file, processes)
    while (request := receive_request(processes)).kind != END.kind:
        worker.answer(request)


@contextlib.contextmanager
def _listening(address: Address) -> Iterator[socket.socket]:
    address.socket.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(address.socket))
        listener.listen(16)
        address.pid.write_text(str(os.getpid()))
        try:
            yield listener
        finally:
            address.socket.unlink(missing_ok=True)
            address.pid.unlink(missing_ok=True)


@contextlib.contextmanager
def _cancelled(connection: Connection) -> Iterator[Callable[[], bool]]:
    """A function that returns whether the requesting process is gone, so that work can stop."""
    gone, done = threading.Event(), threading.Event()

    def watch() -> None:
        while not done.wait(POLL_SECONDS):
            with contextlib.suppress(OSError):
                if not connection.poll():
                    continue
            gone.set()  # the other side sends nothing more, so this can only be its end
            return

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield gone.is_set
    finally:
        done.set()
        watcher.join()


def _watch_memory(limit: int) -> None:
    process = psutil.Process()

    def watch() -> None:
        while True:
            used = process.memory_info().rss
            if used > limit:
                log.error("takes %d bytes of memory, allowed are %d: ended", used, limit)
                os._exit(TOO_MUCH_MEMORY)
            time.sleep(POLL_SECONDS)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    except PrelortError as error:
        sys.exit(str(error))
