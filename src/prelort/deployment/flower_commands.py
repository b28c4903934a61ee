"""Flower's SuperLink and SuperNode, so that messages of hundreds of megabytes get through.

    python -m prelort.deployment.flower_commands superlink [options of flower-superlink]
    python -m prelort.deployment.flower_commands supernode [options of flower-supernode]

Flower cuts a message into objects of at most 5 MiB. If a connection breaks, it sends or fetches the
object under way again, for as long as it takes, and not those before it. What is changed here (in
private parts, the same in flwr 1.41 and 1.42):

- SuperLink: its database has one writer at a time, and to delete a message of some hundred
  megabytes takes longer than the 5 s for which the others wait. Then a request fails, and with it a
  reply, a SuperNode or the process that starts apps. They wait longer here, and what is deleted is
  not overwritten with zeros first, as some builds of SQLite do, which takes most of that time.
- SuperNode: a failed request is tried again where Flower gives up, or ends the SuperNode. An object
  whose answer was lost counts as sent if the SuperLink has it. Long transfers report progress.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from logging import INFO, WARNING
from typing import Any, ParamSpec, TypeVar

from flwr.app import Message
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore import log
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError, ObjectUnavailableError

from prelort.federation.flower import is_busy
from prelort.federation.progress import Clock, Progress, Told

BUSY_SECONDS = 25
"""How long a request waits for the database; its sender waits 30 s for the answer."""
WAITS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
"""Seconds before a request is tried again that failed at the SuperLink."""

P = ParamSpec("P")
R = TypeVar("R")
Connection = tuple[Any, ...]
"""A SuperNode's: its id, and the functions `receive`, `send`, `get_run`, `get_fab`, `pull_object`,
`push_object` and `confirm_message_received`."""
Connect = Callable[..., AbstractContextManager[Connection]]


def superlink() -> None:
    """Run `flower-superlink`."""
    from flwr.supercore import sql_mixin
    from flwr.superlink.cli import flower_superlink

    pragmas = dict(sql_mixin.SQLITE_PRAGMAS)
    pragmas |= {"busy_timeout": str(1000 * BUSY_SECONDS), "secure_delete": "OFF"}
    sql_mixin.SQLITE_PRAGMAS = tuple(pragmas.items())
    flower_superlink()


def supernode() -> None:
    """Run `flower-supernode`."""
    from flwr.supernode import start_client_internal
    from flwr.supernode.cli import flower_supernode

    start_client_internal._init_connection = patient(start_client_internal._init_connection)
    flower_supernode()


def patient(connect: Connect, clock: Clock = time) -> Connect:
    """The same connection to a SuperLink, with requests that are tried again, and with progress."""

    @contextmanager
    def connected(*arguments: Any, **named: Any) -> Iterator[Connection]:
        with connect(*arguments, **named) as (node_id, *functions):
            yield node_id, *_patient(functions, clock)

    return connected


def _patient(functions: list[Callable[..., Any]], clock: Clock) -> Connection:
    push_once = functions[5]
    receive, send, get_run, get_fab, pull_object, _, confirm = (
        _tried_again(function, clock) for function in functions
    )
    down = up = Progress(_report("Received"), clock)

    def received() -> Any:
        nonlocal down
        found = receive()
        if found is not None:
            down = Progress(_report("Received"), clock)
            down.expect(sum(1 for _ in iterate_object_tree(found[1])))
        return found

    def sent(message: Message, tree: ObjectTree, *more: Any) -> tuple[set[str], str]:
        nonlocal up
        objects, session = send(message, tree, *more)
        if not objects:
            # There is always one, so an earlier answer was lost and the server has asked for the
            # reply meanwhile. Without a session the SuperLink looks up that of each object.
            objects, session = {one.object_id for one in iterate_object_tree(tree)}, ""
        up = Progress(_report("Sent"), clock)
        up.expect(len(objects))
        return objects, session

    def pull(run_id: int, object_id: str) -> bytes:
        content: bytes = pull_object(run_id, object_id)
        down.count(len(content))
        return content

    def push(run_id: int, session: str, object_id: str, content: bytes) -> None:
        def once() -> None:
            try:
                push_once(run_id, session, object_id, content)
            except ObjectPushError:
                # Refused: the database was busy, or it was stored and the answer lost on its way.
                try:
                    pull_object(run_id, object_id)
                except ObjectUnavailableError:
                    raise ObjectPushError(object_id, run_id, session) from None

        _tried_again(once, clock)()
        up.count(len(content))

    return received, sent, get_run, get_fab, pull, push, confirm


def _tried_again(function: Callable[P, R], clock: Clock) -> Callable[P, R]:
    def trying(*arguments: P.args, **named: P.kwargs) -> R:
        for wait in WAITS:
            try:
                return function(*arguments, **named)
            except Exception as error:
                if not is_busy(error):
                    raise
                log(WARNING, "The SuperLink is busy, trying again in %g s: %s", wait, error)
            clock.sleep(wait)
        return function(*arguments, **named)

    return trying


def _report(done: str) -> Told:
    def told(size: int, share: float, seconds: float) -> None:
        rate = size / 1e6 / max(seconds, 1e-3)
        log(INFO, "%s %.0f MB (%.0f %%), %.1f MB/s", done, size / 1e6, 100 * share, rate)

    return told


if __name__ == "__main__":
    commands = {"superlink": superlink, "supernode": supernode}
    command = commands.get(sys.argv[1] if len(sys.argv) > 1 else "")
    if command is None:
        sys.exit(f"which of Flower's commands? {' or '.join(commands)}")
    del sys.argv[1]
    command()
