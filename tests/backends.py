"""Runs in this process whose clients are hindered, or listed in another order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from prelort.config import Config
from prelort.experiment.assemble import assemble
from prelort.experiment.backend import Backend, Connect, with_all_data
from prelort.federation import wire
from prelort.federation.client import LocalClient, respond
from prelort.federation.client_app import client_app
from prelort.federation.flower import ClientApp, Context, Message, MessageType
from prelort.federation.in_process import InProcessGrid
from prelort.federation.messages import TrainRequest
from prelort.federation.transport import Transport

Train = Callable[[str, int, Callable[[], Message]], Message]
"""From a client's name, the round (from 1) and what trains as usual to the reply."""


def local_app(clients: Sequence[LocalClient]) -> ClientApp:
    """The app of clients of this process, by their ``partition-id``."""
    return client_app(
        lambda kind, content, context: respond(
            clients[int(context.node_config["partition-id"])], kind, content
        )
    )


def in_this_process(
    train: Train = lambda name, number, usual: usual(), order: Sequence[int] | None = None
) -> Connect:
    """A backend whose clients answer requests to train by ``train``.

    ``order``: the places of the clients among the nodes.
    """

    @contextmanager
    def connect(config: Config, folder: Path) -> Iterator[Backend]:
        assembly = assemble(config, folder)
        places = order or range(len(assembly.clients))
        clients = [assembly.clients[place] for place in places]
        app = local_app(clients)

        def answer(message: Message, context: Context) -> Message:
            if message.metadata.message_type != MessageType.TRAIN:
                return app(message, context)
            name = clients[int(context.node_config["partition-id"])].name
            number = wire.header(message.content, TrainRequest).round + 1
            return train(name, number, lambda: app(message, context))

        grid = InProcessGrid(answer, [{"partition-id": i} for i in range(len(clients))])
        yield with_all_data(assembly, Transport(grid, 1))

    return connect
