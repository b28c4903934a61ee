"""Sending messages over a Flower grid and receiving the replies as they arrive."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

from prelort.federation.content import blob_in
from prelort.federation.flower import Error, Grid, Message, counting_parts, envelope, is_busy
from prelort.federation.progress import Clock, Direction, Progress

log = logging.getLogger(__name__)

POLL_SECONDS = 0.2
NO_ANSWER = 101
"""The error code in place of a reply that did not arrive in time."""
NOT_SENT = 102
"""The error code in place of the reply to a message that could not be sent."""
PULL_BYTES = 64 * 2**20
"""Bytes pulled at a time, if replies are as large as the requests; at least one reply."""
EARLY_BYTES = 256 * 2**20
"""Bytes of replies that may be pulled before those of clients that were asked earlier."""
MARGIN_SECONDS = 30.0
"""How long after the deadline a message expires that no node has fetched."""
PULL_RATE = 16 * 2**20
"""Bytes a second at which replies are pulled that waited at the SuperLink until the deadline."""
BUSY_SECONDS = (1.0, 4.0, 16.0)
"""Waits before a message is pushed again to a SuperLink that was busy."""

Report = Callable[[Message, Direction, int, float], None]
"""Called during a long transfer: the request's envelope, the direction, the bytes and the share of
the message's parts so far."""


@dataclass(frozen=True, slots=True)
class Sent:
    """A message under way: its envelope, and the bytes of the adapter that was in it."""

    envelope: Message
    size: int


@dataclass(slots=True)
class _UnderWay:
    """The messages without a reply, in the order sent, and the replies that came before theirs."""

    sent: dict[str, Sent] = field(default_factory=dict)
    early: dict[str, int] = field(default_factory=dict)
    """In the order sent: bytes of each reply so far, 0 for none yet; none before the first of
    ``sent``."""
    bytes: int = 0
    """Of the adapters in all requests so far."""

    def add(self, message_id: str, request: Sent) -> None:
        self.sent[message_id] = request
        self.early[message_id] = 0
        self.bytes += request.size

    def answered(self, message_id: str, size: int) -> Sent | None:
        """The request; None where it is unknown or was answered before."""
        request = self.sent.pop(message_id, None)
        if request is None:
            return None
        self.early[message_id] = size
        first = next(iter(self.sent), None)
        while self.early and (earliest := next(iter(self.early))) != first:
            del self.early[earliest]
        return request

    @property
    def full(self) -> bool:
        """Whether no more early replies may be pulled."""
        return sum(self.early.values()) >= EARLY_BYTES

    def sizes(self) -> dict[str, int]:
        """Message id -> bytes of its adapter, of the replies that may be pulled."""
        ids = list(self.sent)[:1] if self.full else self.sent
        return {message_id: self.sent[message_id].size for message_id in ids}


@dataclass(frozen=True, slots=True)
class Transport:
    """A Flower grid and how it is used.

    ``max_in_flight``: messages under way at a time (None: all at once). ``deadline``: seconds for a
    round trip with all clients; infinite where each client's own time-out is enough. ``patience``:
    seconds to wait for enough clients; None where the clients of a run never change. ``nodes``: the
    number expected, where they take a while to start. ``report``: is told how far a long transfer
    is.
    """

    grid: Grid
    max_in_flight: int | None = None
    deadline: float = math.inf
    patience: float | None = None
    nodes: int = 0
    clock: Clock = time
    report: Report | None = None

    @property
    def clients_change(self) -> bool:
        """Whether clients may join and leave during a run."""
        return self.patience is not None

    def send_and_receive(self, messages: Iterable[Message]) -> Iterator[Message]:
        """Yield one reply for each message, as they arrive; its source is the message's receiver.

        A client that does not reply by the deadline gets an error message in place of its reply.
        Messages are taken from the iterable only when they can be sent, so that the server never
        holds more of them than needed. Large replies are pulled one by one, the others stay at the
        SuperLink until then. Whoever adds replies up in the order of the messages has to keep the
        early ones: beyond `EARLY_BYTES` of them, only the next in that order is pulled.
        """
        queue = iter(messages)
        under_way = _UnderWay()
        deadline = self.clock.monotonic() + self.deadline
        while self.clock.monotonic() <= deadline:
            yield from self._send(queue, under_way)
            if not under_way.sent:
                return
            received = False
            for ids in portions_of(under_way.sizes()):
                for reply in self._receive(ids, under_way):
                    received = True
                    yield reply
                    del reply  # or it would stay in memory until the next one arrives
                if under_way.full:
                    break
            if not received:
                self.clock.sleep(POLL_SECONDS)
        late = Error(NO_ANSWER, f"did not answer within {self.deadline:g} s")
        waiting = under_way.full  # for an earlier one, at the SuperLink
        for message_id, one in list(under_way.sent.items()):
            if waiting:
                yield from self._receive([message_id], under_way)
            if message_id in under_way.sent:
                yield Message(late, reply_to=one.envelope)
        for message in queue:
            yield Message(late, reply_to=message)

    def push(self, message: Message, before: int = 0) -> str | None:
        """Send one message; returns its id, or None where the grid refuses it or stays busy.

        What a busy SuperLink has already is not sent again. A message that is not fetched in time
        expires, so that a node that returns late does not begin with outdated work. ``before``:
        bytes of replies that may be pulled after the deadline, before this one's.
        """
        if math.isfinite(self.deadline):
            message.metadata.ttl = self.deadline + MARGIN_SECONDS + before / PULL_RATE
        for wait in (*BUSY_SECONDS, None):
            try:
                with self._reporting(message, "down"):
                    ids = list(self.grid.push_messages([message]))
                return ids[0] if ids else None
            except Exception as error:
                if not is_busy(error):
                    raise
                log.warning("the SuperLink is busy, a message could not be sent: %s", error)
            if wait is not None:
                self.clock.sleep(wait)
        return None

    def pull(self, ids: list[str], request: Message | None = None) -> list[Message]:
        """The replies to these messages that are ready; none where the SuperLink is busy.

        ``request``: the envelope of the only one, if its progress is to be reported.
        """
        try:
            with self._reporting(request, "up"):
                return list(self.grid.pull_messages(ids))
        except Exception as error:
            if not is_busy(error):
                raise
            log.warning("the SuperLink is busy, its replies are pulled again: %s", error)
            return []

    def _reporting(
        self, message: Message | None, direction: Direction
    ) -> AbstractContextManager[None]:
        """Report while the block sends this message, or receives the reply to it."""
        if self.report is None or message is None:
            return nullcontext()
        report, request, takes_long = self.report, envelope(message), False

        def told(size: int, share: float, seconds: float) -> None:
            nonlocal takes_long
            takes_long = takes_long or share < 1
            if takes_long:
                report(request, direction, size, share)

        return counting_parts(self.grid, Progress(told, self.clock))

    def _send(self, queue: Iterator[Message], under_way: _UnderWay) -> Iterator[Message]:
        """Push as many messages as may be in flight; yields errors for those that are not sent.

        Only their envelopes are kept, so that the adapters can be freed.
        """
        while self.max_in_flight is None or len(under_way.sent) < self.max_in_flight:
            message = next(queue, None)
            if message is None:
                return
            message_id = self.push(message, under_way.bytes)
            if message_id is None:
                yield Message(Error(NOT_SENT, "cannot be reached"), reply_to=message)
            else:
                size = len(blob_in(message.content) or b"")
                under_way.add(message_id, Sent(envelope(message), size))
            del message  # before the next one is made

    def _receive(self, ids: list[str], under_way: _UnderWay) -> Iterator[Message]:
        """The replies to these messages that are ready."""
        request = under_way.sent[ids[0]].envelope if len(ids) == 1 else None
        replies = deque(self.pull(ids, request))
        while replies:
            reply = replies.popleft()
            size = 0 if reply.has_error() else len(blob_in(reply.content) or b"")
            sent = under_way.answered(reply.metadata.reply_to_message_id, size)
            if sent is not None:
                yield as_addressed(sent.envelope, reply)
            del reply


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
