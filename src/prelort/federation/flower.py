"""The parts of Flower that this project uses, and the only place that touches private ones.

flwr is pinned exactly: it releases every week or two and often moves things. What is private here
was read in 1.41.
"""

from __future__ import annotations

import logging
import os

# No telemetry and no look for updates: sites decide what leaves their machines.
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
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import Result, Strategy
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
    "MetricRecord",
    "RecordDict",
    "Result",
    "ServerApp",
    "Strategy",
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

    `Message` reads the run and node from a class attribute of the process (private in 1.41).
    """
    TaskIdentity.run_id = run_id
    TaskIdentity.node_id = SERVER_NODE
    TaskIdentity.task_id = run_id


def envelope(message: Message) -> Message:
    """The message without its content: enough to know whose reply comes, and to answer for it."""
    empty = Message(
        RecordDict(),
        dst_node_id=message.metadata.dst_node_id,
        message_type=message.metadata.message_type,
    )
    empty.metadata.__dict__.update(message.metadata.__dict__)
    return empty


def set_message_id(message: Message, message_id: str) -> None:
    """Give a message its id, as a SuperLink does (private in 1.41)."""
    message.metadata.__dict__["_message_id"] = message_id


def is_busy(error: Exception) -> bool:
    """Whether the SuperLink could not answer this time, as when its database is being written.

    Its database has one writer at a time, and who has waited for 5 s for it is told of an internal
    error (not configurable in 1.41). With adapters of some hundred MB from several sites this
    happens in good order.
    """
    return isinstance(error, httpx.HTTPStatusError) and error.response.status_code >= 500


def simulate(
    server_app: ServerApp, client_app: ClientApp, nodes: int, *, cpus: int, gpus: float
) -> None:
    """Run both apps on Flower's simulation, with Ray; an exception of the server is raised here.

    By the function for Python, which Flower calls deprecated: its command would start a daemon
    that stays behind, and would know nothing of the progress here.
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
