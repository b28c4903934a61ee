"""The parts of Flower that this project uses; only this module imports it.

flwr releases every week or two and sometimes moves things. The private parts used here are the same
in 1.41 and 1.42; `make test-flwr` runs the tests that depend on them with the other version.
"""

from __future__ import annotations

import logging
import os

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
from flwr.supercore.task_identity import TaskIdentity

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

    Its database has one writer at a time, and a request that waits 5 s for it gets an internal
    error (not configurable). Adapters of some hundred MB from several sites make this normal.
    """
    return isinstance(error, httpx.HTTPStatusError) and error.response.status_code >= 500


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
