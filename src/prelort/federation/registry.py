"""Who is there: every node introduces itself, and those that do not fit are refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from prelort.adapters import AdapterSchema, ScaleRule
from prelort.errors import UpdateRefused
from prelort.federation import wire
from prelort.federation.exchange import Engine, exchange
from prelort.federation.flower import Message, MessageType
from prelort.methods.interface import Client


@dataclass(frozen=True, slots=True)
class Participant:
    """A client, the node that it is reached at, and the largest rank it can be raised to."""

    node_id: int
    client: Client
    most: int


@dataclass(frozen=True, slots=True)
class Agreement:
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


def introductions(
    engine: Engine, agreement: Agreement, refused: Callable[[str, str], None]
) -> list[Participant]:
    """Ask every node who it is; the fitting ones by name, so that every engine has one order.

    ``refused`` is called with a node's or client's name and the reason for each that is left out.
    """
    messages = (
        Message(wire.pack(agreement.header(1)), dst_node_id=node, message_type=MessageType.QUERY)
        for node in engine.grid.get_node_ids()
    )
    found: dict[str, Participant] = {}
    for reply in exchange(engine, messages):
        node_id = reply.metadata.src_node_id
        name = f"node {node_id}"
        try:
            intro = wire.header(wire.content_of(reply), wire.Introduction)
            name = intro.client
            agreement.check(intro)
            most = agreement.schema.rank
            if intro.rank > most:
                raise UpdateRefused(f"offers rank {intro.rank}, but the global adapter has {most}")
            if name in found:
                raise UpdateRefused("a client of this name is there already")
            client = Client(name, intro.rank, intro.examples)
            found[name] = Participant(node_id, client, min(intro.most, most))
        except UpdateRefused as error:
            refused(name, str(error))
    return [found[name] for name in sorted(found)]
