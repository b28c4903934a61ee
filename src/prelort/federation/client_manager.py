"""Which clients are connected: nodes are queried for properties, unsuitable ones refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from prelort.errors import ConfigError, UpdateRefused
from prelort.federation import wire
from prelort.federation.flower import Message, MessageType, envelope
from prelort.federation.messages import AdapterSpec, ClientProperties, PropertiesRequest
from prelort.federation.replies import check_examples
from prelort.federation.site_keys import SiteKeys
from prelort.federation.transport import POLL_SECONDS, Transport, as_addressed
from prelort.methods.interface import Client

GRACE_SECONDS = 15.0
"""How long a round with enough clients waits for others that are just connecting."""
START_SECONDS = 120.0
"""How long nodes of this machine may take to start."""
RETRY_SECONDS = 30.0
"""After which a refused client is queried again: its site may have been corrected."""
PULL_AT_ONCE = 100
"""Replies pulled at a time: an engine may return only one for each call."""

Admit = Callable[[Sequence[Client]], None]
"""Raises `ConfigError` where these clients cannot take part together."""


@dataclass(frozen=True, slots=True)
class ConnectedClient:
    """A client, the node that it is reached at, and the largest rank it can be raised to."""

    node_id: int
    client: Client
    max_rank: int


class ClientManager:
    """The nodes that are connected and fit, round by round.

    A node is queried for its properties when it appears, and again after it was away or has failed:
    it may have returned with another rank. ``report_refusal`` is called with a node's or client's
    name and the reason for each that is refused. ``max_examples``: what a client may claim.
    ``site_keys``: which node's key may use which name; None where names are not verified.
    ``hide_ranks``: ask clients not to state theirs; all have the highest then.
    """

    def __init__(
        self,
        transport: Transport,
        spec: AdapterSpec,
        report_refusal: Callable[[str, str], None],
        max_examples: int,
        site_keys: SiteKeys | None = None,
        hide_ranks: bool = False,
    ) -> None:
        self._transport = transport
        self._spec = spec
        self._report_refusal = report_refusal
        self._max_examples = max_examples
        self._site_keys = site_keys
        self._hide_ranks = hide_ranks
        self._public_keys: dict[int, bytes] = {}
        """The key of each node that is online."""
        self._connected: dict[int, ConnectedClient] = {}
        """By node."""
        self._node_of: dict[str, int] = {}
        """The node of each connected client, by name."""
        self._queries: dict[str, Message] = {}
        """Message id -> the envelope of a pending query."""
        self._refusals: dict[int, tuple[float, str]] = {}
        """Node -> when it was refused, and why."""
        self._seen: set[str] = set()
        """The names of all clients that have ever taken part."""
        self._gathered = False

    @property
    def connected(self) -> list[ConnectedClient]:
        """The connected clients, by name, so that every engine has one order."""
        return sorted(self._connected.values(), key=lambda one: one.client.name)

    @property
    def missing(self) -> list[str]:
        """The names of clients that were connected before and are not now."""
        return sorted(self._seen - self._node_of.keys())

    def disconnect(self, name: str) -> None:
        """Treat a client as new: it is queried again before it takes part."""
        node = self._node_of.pop(name, None)
        if node is not None:
            del self._connected[node]

    def gather(
        self,
        needed: int,
        report_wait: Callable[[float], None] = lambda seconds: None,
        admit: Admit = lambda clients: None,
    ) -> list[ConnectedClient]:
        """The connected clients, once there are ``needed`` or the transport's patience is over.

        Where clients do not change, each is queried once. ``report_wait`` is called with the
        seconds left when the wait begins, and whenever a client has joined or left since. A new
        client is refused if ``admit`` raises for it together with those that are connected.
        """
        clock, patience = self._transport.clock, self._transport.patience
        if patience is None and self._gathered:
            return self.connected
        started = clock.monotonic()
        reported: list[str] | None = None
        while True:
            progress = self._poll(admit)
            elapsed = clock.monotonic() - started
            enough = len(self._connected) >= needed
            if not self._worth_waiting(enough, elapsed):
                break
            names = [one.client.name for one in self.connected]
            connecting = self._queries and elapsed <= GRACE_SECONDS
            if not enough and not connecting and names != reported:
                report_wait((patience or 0.0) - elapsed)
                reported = names
            if not progress:
                clock.sleep(POLL_SECONDS)
        self._gathered = True
        self._seen |= self._node_of.keys()
        return self.connected

    def _worth_waiting(self, enough: bool, elapsed: float) -> bool:
        """Whether to poll again after ``elapsed`` seconds.

        With enough clients the wait for others that are just connecting is short: one that hangs
        must not hold up the rest.
        """
        if self._transport.patience is None:
            starting = len(self._connected) + len(self._refusals) < self._transport.nodes
            return (bool(self._queries) and elapsed <= self._transport.deadline) or (
                starting and elapsed <= START_SECONDS
            )
        if enough:
            return bool(self._queries) and elapsed <= GRACE_SECONDS
        return elapsed <= self._transport.patience

    def _poll(self, admit: Admit) -> bool:
        """Query new nodes, receive replies, drop nodes that are gone; whether a reply came."""
        nodes = self._transport.grid.get_nodes()
        online = self._public_keys = {node.node_id: node.public_key for node in nodes}
        for node in self._connected.keys() - online.keys():
            self.disconnect(self._connected[node].client.name)
        self._queries = {i: m for i, m in self._queries.items() if m.metadata.dst_node_id in online}
        queried = {message.metadata.dst_node_id for message in self._queries.values()}
        retry = math.inf if self._transport.patience is None else RETRY_SECONDS
        now = self._transport.clock.monotonic()
        for node in online:
            refused_at, _ = self._refusals.get(node, (-math.inf, ""))
            if node not in self._connected and node not in queried and now - refused_at >= retry:
                self._query(node)
        ids, received = list(self._queries), False
        for first in range(0, len(ids), PULL_AT_ONCE):
            received |= self._receive(ids[first : first + PULL_AT_ONCE], admit)
        return received

    def _query(self, node: int) -> None:
        head = self._spec.header(self._spec.schema.rank if self._hide_ranks else 1)
        request = PropertiesRequest(**head.model_dump(), hide_rank=self._hide_ranks)
        content = wire.pack(request)
        message = Message(content, dst_node_id=node, message_type=MessageType.QUERY)
        message_id = self._transport.push(message)
        if message_id is not None:
            self._queries[message_id] = envelope(message)

    def _receive(self, ids: list[str], admit: Admit) -> bool:
        """Receive the replies to these queries until there are no more; whether there were any."""
        received = False
        while ids and (replies := self._transport.pull(ids)):
            received = True
            for reply in replies:
                message = self._queries.pop(reply.metadata.reply_to_message_id, None)
                if message is not None:
                    node = message.metadata.dst_node_id
                    self._accept(node, as_addressed(message, reply), admit)
            ids = [message_id for message_id in ids if message_id in self._queries]
        return received

    def _accept(self, node: int, reply: Message, admit: Admit) -> None:
        name = f"node {node}"
        try:
            properties = wire.header(wire.reply_content(reply), ClientProperties)
            name = properties.client
            connected = self._checked(node, properties)
            admit([*(one.client for one in self.connected), connected.client])
            if self._site_keys is not None:
                self._site_keys.bind(name, self._public_keys[node])
            self._connected[node] = connected
            self._node_of[name] = node
            self._refusals.pop(node, None)
        except (UpdateRefused, ConfigError) as error:
            _, reported = self._refusals.get(node, (0.0, ""))
            self._refusals[node] = (self._transport.clock.monotonic(), str(error))
            if str(error) != reported:  # it is queried again and again, but reported once
                self._report_refusal(name, str(error))

    def _checked(self, node: int, properties: ClientProperties) -> ConnectedClient:
        self._spec.check(properties)
        check_examples(properties.examples, self._max_examples)
        highest = self._spec.schema.rank
        if self._hide_ranks and properties.rank != highest:
            raise UpdateRefused("states its rank, which was to stay hidden: update prelort there")
        if properties.rank > highest:
            raise UpdateRefused(
                f"offers rank {properties.rank}, but the global adapter has {highest}"
            )
        if self._site_keys is not None:
            self._site_keys.check(properties.client, self._public_keys[node])
        if properties.client in self._node_of:
            raise UpdateRefused("a client of this name is connected already")
        client = Client(properties.client, properties.rank, properties.examples)
        return ConnectedClient(node, client, min(properties.max_rank, highest))
