"""Sending messages over any Flower grid and taking the replies as they arrive."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain

from prelort.federation.content import blob_in
from prelort.federation.flower import Error, Grid, Message, envelope, is_busy

log = logging.getLogger(__name__)

POLL_SECONDS = 0.2
NO_ANSWER = 101
"""The error code of the reply that stands for a client that did not answer in time."""
NOT_SENT = 102
"""The error code of the reply that stands for a client that could not be sent anything."""
PULL_BYTES = 64 * 2**20
"""How much is pulled at a time, if replies are as large as what was sent; one reply at least."""
MARGIN_SECONDS = 30.0
"""How long after its deadline a message that nobody has taken yet is thrown away."""


@dataclass(frozen=True, slots=True)
class Engine:
    """A Flower grid and how it is to be used.

    ``in_flight``: messages out at a time (None: all at once). ``deadline``: seconds for one round
    trip with all clients; infinite where each client's own time-out is enough. ``patience``:
    seconds to wait for enough clients to be there; None where nobody comes or goes. ``nodes``: how
    many there will be in the end, where they take a while to start.
    """

    grid: Grid
    in_flight: int | None
    deadline: float
    patience: float | None = None
    nodes: int = 0


@dataclass(frozen=True, slots=True)
class Asked:
    """A message that is out: its envelope, and the bytes of the adapter that was in it."""

    message: Message
    size: int


def exchange(engine: Engine, messages: Iterable[Message]) -> Iterator[Message]:
    """Yield exactly one reply for each message, as they arrive; its source is the node asked.

    A client that does not answer by the deadline is answered for by an error message. Messages
    are taken from the iterable only when they can go out, so that the server never holds more of
    them than needed; replies that are ready wait at the SuperLink until those before them have
    been taken, unless they are small.
    """
    queue = iter(messages)
    asked: dict[str, Asked] = {}
    deadline = time.monotonic() + engine.deadline
    while time.monotonic() <= deadline:
        yield from _send(engine, queue, asked)
        if not asked:
            return
        any_came = False
        for ids in portions({message_id: one.size for message_id, one in asked.items()}):
            replies = deque(pull(engine, ids))
            any_came |= bool(replies)
            while replies:
                reply = replies.popleft()
                known = asked.pop(reply.metadata.reply_to_message_id, None)
                if known is not None:
                    yield from_node_asked(known.message, reply)
                del reply  # or it would stay until the next one is here
        if not any_came:
            time.sleep(POLL_SECONDS)
    late = f"did not answer within {engine.deadline:g} s"
    for message in chain((one.message for one in asked.values()), queue):
        yield Message(Error(NO_ANSWER, late), reply_to=message)


def portions(sizes: Mapping[str, int], max_rank: int = PULL_BYTES) -> list[list[str]]:
    """Message ids in their order, cut so that the bytes of each part are at most ``max_rank``.

    A part has one id at least, whatever its size.
    """
    parts: list[list[str]] = []
    room = 0
    for message_id, size in sizes.items():
        if not parts or size > room:
            parts.append([])
            room = max_rank
        parts[-1].append(message_id)
        room -= size
    return parts


def pull(engine: Engine, ids: list[str]) -> list[Message]:
    """The replies to these messages that are there; none where the SuperLink is busy just now."""
    try:
        return list(engine.grid.pull_messages(ids))
    except Exception as error:
        if not is_busy(error):
            raise
        log.warning("the SuperLink is busy, its replies are asked for again: %s", error)
        return []


def push(engine: Engine, message: Message) -> str | None:
    """Send one message; returns its id, or None where the grid does not take it or is busy.

    One that nobody fetches in time is void: a node that comes back later does not begin with
    work that nobody waits for any more.
    """
    if math.isfinite(engine.deadline):
        message.metadata.ttl = engine.deadline + MARGIN_SECONDS
    try:
        ids = list(engine.grid.push_messages([message]))
    except Exception as error:
        if not is_busy(error):
            raise
        log.warning("the SuperLink is busy, a message could not be sent: %s", error)
        return None
    return ids[0] if ids else None


def from_node_asked(message: Message, reply: Message) -> Message:
    """A SuperLink answers in its own name for a node that is gone; put the node's name back."""
    if reply.has_error() and reply.metadata.src_node_id != message.metadata.dst_node_id:
        return Message(reply.error, reply_to=message)
    reply.metadata.group_id = message.metadata.group_id  # as asked, whatever the node says
    return reply


def _send(engine: Engine, queue: Iterator[Message], asked: dict[str, Asked]) -> Iterator[Message]:
    """Push messages until as many are out as the engine allows; yields errors for the unsendable.

    Only their envelopes are kept: the adapters need not stay in memory until all have answered.
    """
    while engine.in_flight is None or len(asked) < engine.in_flight:
        message = next(queue, None)
        if message is None:
            return
        message_id = push(engine, message)
        if message_id is None:
            yield Message(Error(NOT_SENT, "cannot be reached"), reply_to=message)
        else:
            asked[message_id] = Asked(envelope(message), len(blob_in(message.content) or b""))
        del message  # before the next one is made
