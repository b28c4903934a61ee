"""A server and clients of one session, whose messages travel as text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from prelort.secure import client, ring
from prelort.secure.client import Session
from prelort.secure.messages import (
    KeysReply,
    KeysRequest,
    MaskedInput,
    Noise,
    SharesReply,
    SharesRequest,
    UnmaskReply,
    UnmaskRequest,
    read,
)
from prelort.secure.ring import Words
from prelort.secure.server import MaskedSum
from prelort.secure.signatures import Identity

LENGTHS = (3, 5, 5, 5, 5, 4, 4, 4, 4)
"""Of the modules' block and of eight rank dimensions'."""


@dataclass
class Parties:
    """Clients 1, 2, ... of these ranks, each with random values and a random weight."""

    ranks: Sequence[int]
    threshold: float = 0.6
    min_holders: int = 2
    lengths: Sequence[int] = LENGTHS
    noise: Noise | None = None
    identities: dict[int, Identity] = field(default_factory=dict)
    sessions: dict[int, Session] = field(default_factory=dict)
    vectors: dict[int, Words] = field(default_factory=dict)

    def __post_init__(self) -> None:
        generator = np.random.default_rng(0)
        self.blocks = {i: tuple(range(rank + 1)) for i, rank in enumerate(self.ranks, start=1)}
        self.server = MaskedSum(
            self.blocks, self.lengths, self.threshold, self.min_holders, self.noise
        )
        self.weights = {i: float(generator.integers(1, 90)) for i in self.blocks}
        # With a large bound, so that the step is above float64's rounding of what is compared.
        self.bits = ring.fraction_bits(sum(self.weights.values()), 1e6)
        self.values = {
            i: [generator.normal(size=self.lengths[block]) for block in blocks]
            for i, blocks in self.blocks.items()
        }

    def keys(self, without: Sequence[int] = ()) -> Parties:
        for i in self.blocks.keys() - {*without}:
            request = read(self.server.keys_request(i).text(), KeysRequest)
            self.sessions[i], reply = client.advertise(request, self.identities.get(i))
            self.server.add_keys(i, read(reply.text(), KeysReply))
        self.server.draw_graph()
        return self

    def shares(self, without: Sequence[int] = ()) -> Parties:
        for i in self.sessions.keys() - {*without}:
            request = read(self.server.shares_request(i).text(), SharesRequest)
            session, reply = client.share(self.sessions[i], request, self.identities.get(i))
            # As between the processes of a real site.
            self.sessions[i] = read(session.text(), Session)
            self.server.add_shares(i, read(reply.text(), SharesReply))
        self.server.check_joined()
        return self

    def input_of(self, i: int, **changes: Any) -> MaskedInput:
        values = {
            "session": self.server.session,
            "sealed": self.server.sealed_for(i),
            "holds": self.blocks[i],
            "lengths": tuple(self.lengths),
            "weight": self.weights[i],
            "fraction_bits": self.bits,
            "bound": 100.0,
        }
        return MaskedInput(**values | changes)

    def masked(self, without: Sequence[int] = ()) -> Parties:
        for i, session in self.sessions.items():
            if session.step == "shares" and i not in without:
                self.sessions[i], vector = client.mask(session, self.input_of(i), self.values[i])
                self.server.add(i, vector)
                self.vectors[i] = vector
        self.server.check_survivors()
        return self

    def revealed(self, without: Sequence[int] = ()) -> Parties:
        for i in self.vectors.keys() - {*without}:
            request = read(self.server.unmask_request(i).text(), UnmaskRequest)
            reply = client.reveal(self.sessions[i], request)
            self.server.add_revealed(i, read(reply.text(), UnmaskReply))
        return self

    def largest_error(self) -> float:
        """Of the opened sum, against the plain one of those whose vectors are in it."""
        opened = [ring.dequantise(words, self.bits) for words in self.server.open()]
        return max(
            float(np.abs(values - self.plain_sum(block)).max())
            for block, values in enumerate(opened)
        )

    def plain_sum(self, block: int) -> Any:
        zeros = np.zeros(self.lengths[block])
        own = [i for i in self.vectors if block in self.blocks[i]]
        return sum((self.weights[i] * self.values[i][block] for i in own), start=zeros)
