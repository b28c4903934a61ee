"""Sending messages over a Flower grid and receiving the replies as they arrive."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Protocol

from prelort.federation.content import blob_in
from prelort.federation.flower import Error, Grid, Message, envelope, is_busy

log = logging.getLogger(__name__)

POLL_SECONDS = 0.2
NO_ANSWER = 101
"""The error code in place of a reply that did not arrive in time."""
NOT_SENT = 102
"""The error code in place of the reply to a message that could not be sent."""
PULL_BYTES = 64 * 2**20
"""Bytes pulled at a time, if replies are as large as the requests; at least one reply."""
MARGIN_SECONDS = 30.0
"""How long after the deadline a message expires that no node has fetched."""


class Clock(Protocol):
    """What waits: the module `time`, or a test's clock."""

    def monotonic(self) -> float:
        """Seconds that never go back."""
        ...

    def sleep(self, seconds: float, /) -> None:
        """Wait."""
        ...


@dataclass(frozen=True, slots=True)
class Sent:
    """A message under way: its envelope, and the bytes of the adapter that was in it."""

    envelope: Message
    size: int


@dataclass(frozen=True, slots=True)
class Transport:
    """A Flower grid and how it is used.

    ``max_in_flight``: messages under way at a time (None: all at once). ``deadline``: seconds for a
    round trip with all clients; infinite where each client's own time-out is enough. ``patience``:
    seconds to wait for enough clients; None where the clients of a run never change. ``nodes``: the
    number expected, where they take a while to start.
    """

    grid: Grid
    max_in_flight: int | None = None
    deadline: float = math.inf
    patience: float | None = None
    nodes: int = 0
    clock: Clock = time

    @property
    def clients_change(self) -> bool:
        """Whether clients may join and leave during a run."""
        return self.patience is not None

    def send_and_receive(self, messages: Iterable[Message]) -> Iterator[Message]:
        """Yield one reply for each message, as they arrive; its source is the message's receiver.

        A client that does not reply by the deadline gets an error message in place of its reply.
        Messages are taken from the iterable only when they can be sent, so that the server never
        holds more of them than needed. Large replies are pulled one by one, the others stay at the
        SuperLink until then.
        """
        queue = iter(messages)
        sent: dict[str, Sent] = {}
        deadline = self.clock.monotonic() + self.deadline
        while self.clock.monotonic() <= deadline:
            yield from self._send(queue, sent)
            if not sent:
                return
            received = False
            for ids in portions_of({message_id: one.size for message_id, one in sent.items()}):
                replies = deque(self.pull(ids))
                received |= bool(replies)
                while replies:
                    reply = replies.popleft()
                    request = sent.pop(reply.metadata.reply_to_message_id, None)
                    if request is not None:
                        yield as_addressed(request.envelope, reply)
                    del reply  # or it would stay in memory until the next one arrives
            if not received:
                self.clock.sleep(POLL_SECONDS)
        late = f"did not answer within {self.deadline:g} s"
        for message in chain((one.envelope for one in sent.values()), queue):
            yield Message(Error(NO_ANSWER, late), reply_to=message)

    def push(self, message: Message) -> str | None:
        """Send one message; returns its id, or None where the grid refuses it or is busy.

        A message that is not fetched in time expires, so that a node that returns late does not
        begin with outdated work.
        """
        if math.isfinite(self.deadline):
            message.metadata.ttl = self.deadline + MARGIN_SECONDS
        try:
            ids = list(self.grid.push_messages([message]))
        except Exception as error:
            if not is_busy(error):
                raise
            log.warning("the SuperLink is busy, a message could not be sent: %s", error)
            return None
        return ids[0] if ids else None

    def pull(self, ids: list[str]) -> list[Message]:
        """The replies to these messages that are ready; none where the SuperLink is busy."""
        try:
            return list(self.grid.pull_messages(ids))
        except Exception as error:
            if not is_busy(error):
                raise
            log.warning("the SuperLink is busy, its replies are pulled again: %s", error)
            return []

    def _send(self, queue: Iterator[Message], sent: dict[str, Sent]) -> Iterator[Message]:
        """Push as many messages as may be in flight; yields errors for those that are not sent.

        Only their envelopes are kept, so that the adapters can be freed.
        """
        while self.max_in_flight is None or len(sent) < self.max_in_flight:
            message = next(queue, None)
            if message is None:
                return
            message_id = self.push(message)
            if message_id is None:
                yield Message(Error(NOT_SENT, "cannot be reached"), reply_to=message)
            else:
                sent[message_id] = Sent(envelope(message), len(blob_in(message.content) or b""))
            del message  # before the next one is made


def portions_of(sizes: Mapping[str, int], max_bytes: int = PULL_BYTES) -> list[list[str]]:
    """Message ids in their order, cut so that each part has at most ``max_bytes`` (or one id)."""
    parts: list[list[str]] = []
    room = 0
    for message_id, size in sizes.items():
        if not parts or size > room:
            parts.append([])
            room = max_bytes
        parts[-1].append(message_id)
        room -= size
    return parts


def as_addressed(request: Message, reply: Message) -> Message:
    """The reply with the node and the group of its request.

    A SuperLink replies in its own name for a node that is gone, and a node may state any group.
    """
    if reply.has_error() and reply.metadata.src_node_id != request.metadata.dst_node_id:
        return Message(reply.error, reply_to=request)
    reply.metadata.group_id = request.metadata.group_id
    return reply
