"""The in-process engine: a Flower `Grid` that calls the `ClientApp` directly.

No server, no Ray, no copies of the base model's weights: clients are trained in this process, one
after the other, in several threads, or several in one batch. The server app and the client app are
the ones that Flower's own engines run.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from prelort.federation.flower import (
    ClientApp,
    Context,
    Error,
    Grid,
    Message,
    MessageType,
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


def worker_threads(count: int, name: str) -> ThreadPoolExecutor:
    """A pool in whose threads torch uses as many threads as in this one.

    A new thread would use torch's default number instead of the configured one.
    """
    return ThreadPoolExecutor(count, name, torch.set_num_threads, (torch.get_num_threads(),))


AnswerBatched = Callable[[Sequence[tuple[Message, Context]]], list[Message]]
"""Answers messages to train of several clients at once, in their order."""


class InProcessGrid(Grid):  # type: ignore[misc]
    """Every node is a function call: the oldest message is answered when a reply is pulled.

    With several ``threads`` messages are answered as soon as they are pushed, and replies still
    come in the messages' order. With ``answer_batched`` up to ``clients_per_batch`` messages to
    train are answered at once.
    """

    def __init__(
        self,
        client_app: ClientApp,
        node_configs: Sequence[dict[str, Any]],
        *,
        threads: int = 1,
        answer_batched: AnswerBatched | None = None,
        clients_per_batch: int = 1,
    ) -> None:
        identify_process(RUN_ID)
        self._client_app = client_app
        self._contexts = {
            FIRST_NODE + index: Context(RUN_ID, FIRST_NODE + index, config, RecordDict(), {})
            for index, config in enumerate(node_configs)
        }
        self._waiting: dict[str, Message] = {}
        self._answers: dict[str, Future[Message]] = {}
        self._sent = 0
        self._answer_batched = answer_batched
        self._clients_per_batch = clients_per_batch
        self._pool = worker_threads(threads, "client") if threads > 1 else None

    def close(self) -> None:
        """Cancel queued messages and wait for those under way."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def get_node_ids(self) -> Iterable[int]:
        """All nodes, always."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Queue messages; returns their ids."""
        ids = []
        for message in messages:
            self._sent += 1
            message_id = f"message-{self._sent}"
            set_message_id(message, message_id)
            self._waiting[message_id] = message
            if self._pool is not None:
                self._answers[message_id] = self._pool.submit(self._answer, message)
            ids.append(message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The reply to the oldest of these messages, or to a group of them."""
        ids = set(message_ids)
        ids_in_order = [message_id for message_id in self._waiting if message_id in ids]
        if not ids_in_order:
            return []
        oldest = ids_in_order[0]
        if self._pool is not None:
            reply = self._answers.pop(oldest).result()
            del self._waiting[oldest]
            return [reply]
        group = {i: self._waiting[i] for i in ids_in_order[: self._clients_per_batch]}
        if self._answer_batched is not None and all(map(_is_train_request, group.values())):
            for message_id in group:
                del self._waiting[message_id]
            return self._answer_batch(self._answer_batched, list(group.values()))
        return [self._answer(self._waiting.pop(oldest))]

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

    def _answer_batch(self, answer: AnswerBatched, messages: Sequence[Message]) -> list[Message]:
        """The replies to a batch; one by one if it raises."""
        try:
            return answer([(m, self._contexts[m.metadata.dst_node_id]) for m in messages])
        except Exception:
            log.exception("clients could not train in one batch: training one by one")
        # Not in the handler, whose traceback holds the batch's memory.
        return [self._answer(message) for message in messages]

    @property
    def run(self) -> Any:
        """Not used: the run's facts are in the context."""
        raise NotImplementedError("the in-process engine has no Flower run record")

    def set_run(self, run: Any) -> None:
        """Not used."""

    def create_message(self, *arguments: Any, **named: Any) -> Message:
        """Deprecated in Flower; create a `Message` instead."""
        raise NotImplementedError("create a Message directly")


def _is_train_request(message: Message) -> bool:
    return bool(message.metadata.message_type == MessageType.TRAIN)
