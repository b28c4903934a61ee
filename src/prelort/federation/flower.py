"""The parts of Flower that this project uses.

Besides this module only `prelort.deployment.flower_commands` imports it, which starts its commands.

flwr releases every week or two and sometimes moves things. The private parts used here are the same
in 1.41 and 1.42; `make test-flwr` runs the tests that depend on them with the other version.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# No telemetry and no update check: sites decide what leaves their machines.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")

import httpx
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Message,
    MessageType,
    RecordDict,
)
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import Mod
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError
from flwr.supercore.task_identity import TaskIdentity

from prelort.federation.progress import Progress

__all__ = [
    "Array",
    "ArrayRecord",
    "ClientApp",
    "ConfigRecord",
    "Context",
    "Error",
    "Grid",
    "Message",
    "MessageType",
    "Mod",
    "RecordDict",
    "ServerApp",
    "counting_parts",
    "envelope",
    "identify_process",
    "is_busy",
    "set_message_id",
    "simulate",
]

SERVER_NODE = 1
"""Flower's own node id of the server side."""


def identify_process(run_id: int) -> None:
    """Let this process create messages, as Flower's own runtimes do before they start an app.

    `Message` reads the run and node from a private class attribute.
    """
    TaskIdentity.run_id = run_id
    TaskIdentity.node_id = SERVER_NODE
    TaskIdentity.task_id = run_id


def envelope(message: Message) -> Message:
    """The message without its content: enough to identify the reply, and to answer for it."""
    empty = Message(
        RecordDict(),
        dst_node_id=message.metadata.dst_node_id,
        message_type=message.metadata.message_type,
    )
    empty.metadata.__dict__.update(message.metadata.__dict__)
    return empty


def set_message_id(message: Message, message_id: str) -> None:
    """Give a message its id, as a SuperLink does (private)."""
    message.metadata.__dict__["_message_id"] = message_id


def is_busy(error: Exception) -> bool:
    """Whether the SuperLink failed temporarily, e.g. because its database is being written.

    Its database has one writer at a time, and a request that waits too long for it gets an internal
    error; an object that could not be stored for that reason is only said to be refused.
    """
    if isinstance(error, httpx.HTTPStatusError):
        return error.response.status_code >= 500
    return isinstance(error, ObjectPushError)


@contextmanager
def counting_parts(grid: Grid, progress: Progress) -> Iterator[None]:
    """Count the parts of the one message that the grid sends or receives in the block (private).

    Flower cuts a message into objects of at most 5 MiB. A grid without a SuperLink has none.
    """
    client = getattr(grid, "_runtime_client", None)
    if client is None:
        yield
        return

    def push_messages(request: Any) -> Any:
        response = type(client).PushMessages(client, request)
        progress.expect(len(response.objects_to_push))
        return response

    def pull_messages(request: Any) -> Any:
        response = type(client).PullMessages(client, request)
        trees = response.message_object_trees
        progress.expect(sum(1 for tree in trees for _ in iterate_object_tree(tree)))
        return response

    def push_object(request: Any) -> Any:
        response = type(client).PushObject(client, request)
        progress.count(len(request.object_content))
        return response

    def pull_object(request: Any) -> Any:
        response = type(client).PullObject(client, request)
        if response.object_available:
            progress.count(len(response.object_content))
        return response

    counting = {
        "PushMessages": push_messages,
        "PullMessages": pull_messages,
        "PushObject": push_object,
        "PullObject": pull_object,
    }
    client.__dict__.update(counting)
    try:
        yield
    finally:
        for name in counting:
            del client.__dict__[name]


def simulate(
    server_app: ServerApp, client_app: ClientApp, nodes: int, *, cpus: int, gpus: float
) -> None:
    """Run both apps on Flower's simulation, with Ray; exceptions of the server are raised here.

    Uses the Python function, although Flower deprecates it: the command would start a daemon that
    keeps running, and could not show the progress here.
    """
    from flwr.simulation import run_simulation

    logging.getLogger("flwr").setLevel(logging.ERROR)
    resources: dict[str, int | float] = {"num_cpus": cpus, "num_gpus": gpus}
    run_simulation(
        server_app,
        client_app,
        num_supernodes=nodes,
        backend_config={
            "client_resources": resources,
            "init_args": {"log_to_driver": False, "logging_level": logging.ERROR},
        },
    )
