"""The in-process engine: a Flower `Grid` that calls the `ClientApp` directly.

No server, no Ray, no copies of the base model: clients are trained one after the other in this
process. The server app and the client app are the ones that Flower's own engines run.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

from prelort.federation.flower import (
    ClientApp,
    Context,
    Error,
    Grid,
    Message,
    RecordDict,
    identify_process,
    set_message_id,
)

log = logging.getLogger(__name__)

RUN_ID = 1
CLIENT_APP_RAISED = 2
"""Flower's error code for an exception in a ClientApp."""
FIRST_NODE = 1000
"""Node ids start here; Flower's own small ids stand for its server side."""


class InProcessGrid(Grid):  # type: ignore[misc]
    """Nodes that are calls: a message is answered when its reply is pulled, in order."""

    def __init__(self, client_app: ClientApp, node_configs: Sequence[dict[str, Any]]) -> None:
        identify_process(RUN_ID)
        self._client_app = client_app
        self._contexts = {
            FIRST_NODE + index: Context(RUN_ID, FIRST_NODE + index, config, RecordDict(), {})
            for index, config in enumerate(node_configs)
        }
        self._waiting: deque[Message] = deque()
        self._sent = 0

    def get_node_ids(self) -> Iterable[int]:
        """All nodes, always."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Queue messages; returns their ids."""
        ids = []
        for message in messages:
            self._sent += 1
            set_message_id(message, f"message-{self._sent}")
            self._waiting.append(message)
            ids.append(message.metadata.message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Run the ClientApp for the oldest of these messages and return its reply."""
        wanted = set(message_ids)
        for message in self._waiting:
            if message.metadata.message_id in wanted:
                self._waiting.remove(message)
                return [self._answer(message)]
        return []

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Answer one message after the other."""
        for message_id in self.push_messages(messages):
            yield from self.pull_messages([message_id])

    def _answer(self, message: Message) -> Message:
        """A client that raises answers with Flower's error, as it would on another machine."""
        context = self._contexts[message.metadata.dst_node_id]
        try:
            return self._client_app(message, context)
        except Exception as error:
            log.exception("client app raised")
            reason = f"{type(error).__name__}: {error}"
            return Message(Error(CLIENT_APP_RAISED, reason), reply_to=message)

    @property
    def run(self) -> Any:
        """Not used: the run's facts are in the context."""
        raise NotImplementedError("the in-process engine has no Flower run record")

    def set_run(self, run: Any) -> None:
        """Not used."""

    def create_message(self, *arguments: Any, **named: Any) -> Message:
        """Deprecated in Flower; create a `Message` instead."""
        raise NotImplementedError("create a Message directly")
