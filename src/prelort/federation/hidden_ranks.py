"""Ranks that the server does not learn: it learns how many clients hold each rank dimension.

Every client receives the whole adapter, cuts it to its rank, and sends all rank dimensions, masked,
with zeros where it holds none. What the sums are divided by is counted once, before the first
round, by secure aggregation too. Not in each round: if one client was absent from a count, the
difference to the count before would be its rank.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from pydantic import BaseModel

from prelort.config import PrivacyConfig
from prelort.errors import ConfigError, PrelortError, QuorumError, UpdateRefused
from prelort.federation import wire
from prelort.federation.content import content_of, text_in
from prelort.federation.flower import Message, RecordDict
from prelort.methods.calls import calling
from prelort.methods.interface import Client, Method, ServerState
from prelort.secure.messages import (
    CountReply,
    KeysReply,
    MaskedInput,
    Part,
    SharesReply,
    UnmaskReply,
    read,
)
from prelort.secure.server import MaskedSum

log = logging.getLogger(__name__)

SendQuery = Callable[[str, Mapping[str, RecordDict]], Iterator[tuple[Client, Message]]]
"""Sends a query with this action to clients, by name, and yields their replies."""
P = TypeVar("P", bound=BaseModel)


def answers(
    send_query: SendQuery,
    action: str,
    contents: Mapping[str, RecordDict],
    kind: type[P],
    take: Callable[[str, P], None],
) -> Iterator[tuple[Client, int, PrelortError | None]]:
    """Send clients a query of secure aggregation each, and ``take`` their replies, by name.

    Yields each client with the bytes of its reply, or with the error that made it unusable.
    """
    for client, reply in send_query(action, contents):
        try:
            content = wire.reply_content(reply)
            take(client.name, read(text_in(content) or "", kind))
        except PrelortError as error:
            yield client, 0, error
        else:
            yield client, wire.size(content), None


@dataclass(frozen=True, slots=True)
class Holders:
    """Who was counted, and how many of them hold each rank dimension (from 0)."""

    names: frozenset[str]
    counts: tuple[int, ...]

    def at_least(self, present: int) -> dict[int, int]:
        """Rank dimension -> how many of so many of the counted clients hold it at least."""
        absent = len(self.names) - present
        return {j: count - absent for j, count in enumerate(self.counts)}

    def expected(self, present: int) -> list[float]:
        """How many of so many of the counted clients hold each rank dimension, on average."""
        return [count * present / len(self.names) for count in self.counts]

    def check(self, present: int, kept: Collection[int], min_holders: int) -> None:
        """Raise `QuorumError` if a sum over these clients could be one over too few holders."""
        for j, count in sorted(self.at_least(present).items()):
            if j in kept and count < min_holders:
                raise QuorumError(
                    f"rank dimension {j + 1} had {self.counts[j]} holders when ranks were counted, "
                    f"and {len(self.names) - present} clients are gone since, nobody knows which: "
                    f"privacy.min_holders = {min_holders} are needed"
                )


def count_holders(
    clients: Sequence[Client],
    rank: int,
    privacy: PrivacyConfig,
    send_query: SendQuery,
    refuse: Callable[[str, str], None],
) -> Holders:
    """Let clients count how many hold each of ``rank`` dimensions.

    ``refuse`` is called with the name of each that could not be counted, and the reason. Raises
    `QuorumError` if too few take part, or for numbers that no ranks have.
    """
    numbers = {client.name: i for i, client in enumerate(clients, start=1)}
    everything = dict.fromkeys(numbers.values(), (0,))
    sums = MaskedSum(everything, (rank,), privacy.threshold, privacy.min_holders)

    def ask(
        action: str,
        names: Collection[str],
        request: Callable[[int], Part],
        kind: type[Any],
        take: Callable[[int, Any], None],
    ) -> list[str]:
        contents = {name: content_of(request(numbers[name]).text()) for name in names}
        found: list[str] = []
        for client, _, error in answers(
            send_query, action, contents, kind, lambda name, reply: take(numbers[name], reply)
        ):
            if error is None:
                found.append(client.name)
            elif action == "unmask":  # it is counted, if enough others reveal
                log.warning("%s does not help to open the count: %s", client.name, error)
            else:
                refuse(client.name, str(error))
        return found

    def how(number: int) -> MaskedInput:
        return MaskedInput(
            session=sums.session,
            sealed=sums.sealed_for(number),
            holds=(0,),
            lengths=(rank,),
            weight=1.0,
            fraction_bits=0,
            bound=1.0,
        )

    def add(number: int, reply: CountReply) -> None:
        if reply.session != sums.session:
            raise UpdateRefused("answers for another session of secure aggregation")
        if len(reply.words) != 8 * rank:
            raise UpdateRefused(f"counts {len(reply.words) / 8:g} rank dimensions, not {rank}")
        sums.add(number, np.frombuffer(reply.words, dtype="<u8").astype(np.uint64))

    present = ask("keys", numbers, sums.keys_request, KeysReply, sums.add_keys)
    sums.draw_graph()
    present = ask("shares", present, sums.shares_request, SharesReply, sums.add_shares)
    sums.check_joined()
    counted = ask("count", present, how, CountReply, add)
    sums.check_survivors()
    ask("unmask", counted, sums.unmask_request, UnmaskReply, sums.add_revealed)
    counts = tuple(int(count) for count in sums.open()[0].view(np.int64))
    # Each holds the first, and no dimension without the one before it.
    if counts[0] != len(counted) or list(counts) != sorted(counts, reverse=True) or counts[-1] < 0:
        raise QuorumError(
            f"{len(counted)} clients count {list(counts)} holders of the rank dimensions, which no "
            "ranks have: a client has sent a wrong masked vector"
        )
    log.info("of %d clients each rank dimension has this many holders: %s", len(counted), counts)
    return Holders(frozenset(counted), counts)


def check_prefixes(method: Method, state: ServerState, rank: int) -> None:
    """Raise `ConfigError` unless clients of all ranks train prefixes of what ``rank`` receives.

    Also if a client of one of the levels had nothing to train: that it refuses would show its rank.

    Args:
        method: of the run.
        state: of whose adapter no factor is zero (`prelort.methods.parts.without_zeros`).
        rank: the highest.
    """
    for own in state.levels:
        with calling(method, "objective()"):
            method.objective(state, Client("", own, 1))
    with calling(method, "broadcast()"):
        whole = method.broadcast(state, Client("", rank, 1))
        for own in {1, *state.levels}:
            sent = method.broadcast(state, Client("", own, 1))
            cut = whole.trainable.prefix(min(own, whole.trainable.rank)).tensors()
            found = sent.trainable.tensors()
            same = found.keys() == cut.keys() and all(torch.equal(found[n], cut[n]) for n in cut)
            personal = sent.personal or sent.frozen is not None or whole.frozen is not None
            if not same or personal or replace(sent, trainable=whole.trainable) != whole:
                raise ConfigError(
                    f"privacy.hide_ranks is not possible with method {method.name!r}: its clients "
                    "do not all train prefixes of one adapter, which they could cut themselves"
                )
