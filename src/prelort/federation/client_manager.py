"""Who is there: every node introduces itself, and those that do not fit are refused."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from prelort.adapters import AdapterSchema, ScaleRule
from prelort.errors import UpdateRefused
from prelort.federation import wire
from prelort.federation.flower import Message, MessageType, envelope
from prelort.federation.transport import POLL_SECONDS, Engine, from_node_asked, pull, push
from prelort.methods.interface import Client

GRACE_SECONDS = 15.0
"""How long a round that could begin waits for clients that are just introducing themselves."""
START_SECONDS = 120.0
"""How long nodes of this machine may take to start."""
RETRY_SECONDS = 30.0
"""After which a client that was left out is asked again: it may have been put right."""
PULL_AT_ONCE = 100
"""Introductions that are asked for at a time: an engine may hand over one for each look at all."""


@dataclass(frozen=True, slots=True)
class ConnectedClient:
    """A client, the node that it is reached at, and the largest rank it can be raised to."""

    node_id: int
    client: Client
    max_rank: int


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """What all sides must agree on: base model (fingerprint), adapter's shapes, scale rule."""

    base: str
    schema: AdapterSchema
    scale: ScaleRule

    def header(self, rank: int) -> wire.Header:
        """The facts as they stand in every message about an adapter of ``rank``."""
        return wire.Header(
            base=self.base,
            layers=self.schema.digest(),
            scale_rule=self.scale.kind,
            scale=self.scale.value,
            rank=rank,
        )

    def check(self, head: wire.Header, rank: int | None = None) -> None:
        """Raise `UpdateRefused` naming the first thing on which the sender disagrees."""
        if head.base != self.base:
            raise UpdateRefused(
                f"has another base model: fingerprint {head.base}, expected {self.base}"
            )
        digest = self.schema.digest()
        if head.layers != digest:
            raise UpdateRefused(f"adapts other layers: digest {head.layers}, expected {digest}")
        if head.rule != self.scale:
            raise UpdateRefused(
                f"uses another scale rule: {head.rule}, but the federation's is {self.scale}; "
                "set lora.scale_rule and lora.scale alike at every site"
            )
        if rank is not None and head.rank != rank:
            raise UpdateRefused(f"answers with rank {head.rank}, expected {rank}")


class ClientManager:
    """Who is there: the nodes that have introduced themselves and fit, round by round.

    A node introduces itself when it appears, and again after it was away or has failed: it may
    have come back with another rank. ``refused`` is called with a node's or client's name and the
    reason for each that is left out.
    """

    def __init__(self, spec: AdapterSpec, refused: Callable[[str, str], None]) -> None:
        self._spec = spec
        self._refused = refused
        self._known: dict[int, ConnectedClient] = {}
        self._taken: set[str] = set()
        """The names of those in ``_known``."""
        self._asked: dict[str, Message] = {}
        self._left_out: dict[int, tuple[float, str]] = {}
        """Node -> when it was refused, and why."""
        self._names: set[str] = set()
        self._met = False

    @property
    def present(self) -> list[ConnectedClient]:
        """Those that are there, by name, so that every engine has one order."""
        return sorted(
            self._known.values(), key=lambda connected_client: connected_client.client.name
        )

    @property
    def missing(self) -> list[str]:
        """The names of those that were there once and are not now."""
        return sorted(self._names - self._taken)

    def doubt(self, connected_client: ConnectedClient) -> None:
        """Let a client that has failed introduce itself again before it is asked for more."""
        self._forget(connected_client.node_id)

    def gather(
        self, engine: Engine, wanted: int, waiting: Callable[[float], None] = lambda seconds: None
    ) -> list[ConnectedClient]:
        """Those that are there, once there are ``wanted`` or the engine's patience is at its end.

        Where nobody comes or goes everyone is asked once. ``waiting`` is called with the seconds
        that are left, when the waiting begins and whenever someone has come or gone since.
        """
        if engine.patience is None and self._met:
            return self.present
        started = time.monotonic()
        patience = engine.patience or 0.0
        told: list[str] | None = None
        while True:
            progress = self._look(engine)
            spent = time.monotonic() - started
            enough = len(self._known) >= wanted
            if not self._worth_waiting(engine, enough, spent):
                break
            names = [connected_client.client.name for connected_client in self.present]
            introducing = self._asked and spent <= GRACE_SECONDS
            if not enough and not introducing and names != told:
                waiting(patience - spent)
                told = names
            if not progress:
                time.sleep(POLL_SECONDS)
        self._met = True
        self._names |= self._taken
        return self.present

    def _worth_waiting(self, engine: Engine, enough: bool, spent: float) -> bool:
        """Whether to look again after so many seconds.

        Those that are about to introduce themselves are waited for, but not for long where there
        are enough: one that hangs must not keep the others.
        """
        if engine.patience is None:
            starting = len(self._known) + len(self._left_out) < engine.nodes
            return (bool(self._asked) and spent <= engine.deadline) or (
                starting and spent <= START_SECONDS
            )
        if enough:
            return bool(self._asked) and spent <= GRACE_SECONDS
        return spent <= engine.patience

    def _look(self, engine: Engine) -> bool:
        """One look at the nodes: ask new ones, take answers, forget who is gone."""
        nodes = list(engine.grid.get_node_ids())
        online = set(nodes)
        for node in self._known.keys() - online:
            self._forget(node)
        self._asked = {i: m for i, m in self._asked.items() if m.metadata.dst_node_id in online}
        asked = {message.metadata.dst_node_id for message in self._asked.values()}
        now = time.monotonic()
        for node in nodes:
            when, _ = self._left_out.get(node, (-math.inf, ""))
            retry = math.inf if engine.patience is None else RETRY_SECONDS
            if node not in self._known and node not in asked and now - when >= retry:
                self._ask(engine, node)
        waiting, came = list(self._asked), False
        for first in range(0, len(waiting), PULL_AT_ONCE):
            came |= self._take_all(engine, waiting[first : first + PULL_AT_ONCE])
        return came

    def _take_all(self, engine: Engine, ids: list[str]) -> bool:
        """Take what answers these messages have, until no more come; whether there were any."""
        came = False
        while ids and (replies := pull(engine, ids)):
            came = True
            for reply in replies:
                message = self._asked.pop(reply.metadata.reply_to_message_id, None)
                if message is not None:
                    self._take(message.metadata.dst_node_id, from_node_asked(message, reply))
            ids = [message_id for message_id in ids if message_id in self._asked]
        return came

    def _ask(self, engine: Engine, node: int) -> None:
        content = wire.pack(self._spec.header(1))
        message = Message(content, dst_node_id=node, message_type=MessageType.QUERY)
        message_id = push(engine, message)
        if message_id is not None:
            self._asked[message_id] = envelope(message)

    def _take(self, node: int, reply: Message) -> None:
        name = f"node {node}"
        try:
            intro = wire.header(wire.answered(reply), wire.ClientProperties)
            name = intro.client
            self._known[node] = self._checked(node, intro)
            self._taken.add(intro.client)
            self._left_out.pop(node, None)
        except UpdateRefused as error:
            _, before = self._left_out.get(node, (0.0, ""))
            self._left_out[node] = (time.monotonic(), str(error))
            if str(error) != before:  # it is asked again and again, and told once
                self._refused(name, str(error))

    def _checked(self, node: int, intro: wire.ClientProperties) -> ConnectedClient:
        self._spec.check(intro)
        max_rank = self._spec.schema.rank
        if intro.rank > max_rank:
            raise UpdateRefused(f"offers rank {intro.rank}, but the global adapter has {max_rank}")
        if intro.client in self._taken:
            raise UpdateRefused("a client of this name is there already")
        client = Client(intro.client, intro.rank, intro.examples)
        return ConnectedClient(node, client, min(intro.max_rank, max_rank))

    def _forget(self, node: int) -> None:
        gone = self._known.pop(node, None)
        if gone is not None:
            self._taken.discard(gone.client.name)
