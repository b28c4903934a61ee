"""A round with secure aggregation: the server gets the sum of the replies, and no single one.

Before the requests to train, clients exchange keys and shares; after them, those whose masked
replies have arrived reveal what opens their sum (`prelort.secure`). A client that drops out in any
phase is left out, down to ``privacy.threshold``.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from prelort.adapters import LoraAdapter
from prelort.errors import ConfigError, PrelortError, QuorumError, UpdateRefused
from prelort.events import DimensionsLeftOut
from prelort.federation import wire
from prelort.federation.content import content_of
from prelort.federation.flower import Message
from prelort.federation.hidden_ranks import Holders, SendQuery, answers, check_prefixes
from prelort.federation.masking import vector_in
from prelort.federation.messages import TrainReply
from prelort.federation.replies import checked_head
from prelort.federation.round import Round
from prelort.methods.averaging import Averaging, needing_only_sums
from prelort.methods.calls import calling
from prelort.methods.interface import Aggregator, Broadcast, Client, Method, ServerState
from prelort.methods.objective import Objective
from prelort.methods.parts import trained_part, without_zeros
from prelort.secure import blocks, graph, ring
from prelort.secure.graph import is_complete
from prelort.secure.messages import (
    KeysReply,
    MaskedInput,
    Noise,
    Part,
    SharesReply,
    UnmaskReply,
)
from prelort.secure.noise import fraction_bits, largest_sum
from prelort.secure.server import MaskedSum

log = logging.getLogger(__name__)


class NoiseAtClients(Protocol):
    """Differential privacy whose noise the clients add (`prelort.privacy`)."""

    def noise(self) -> Noise:
        """Clip norm and noise of a round."""
        ...

    def count_release(self) -> None:
        """Note that a sum will be opened. Raises `PrelortError` if the budget is spent."""
        ...


@dataclass(frozen=True, slots=True)
class Contribution:
    """What is known of a client's reply before it comes.

    ``dimensions``: the rank dimensions that it trains, rising. ``unsent``: the kinds of tensors
    that do not travel.
    """

    dimensions: tuple[int, ...]
    weight: float
    unsent: tuple[str, ...]


def summing(aggregator: Aggregator, name: str) -> Averaging:
    """The aggregator of the method of this ``name``, if it needs no more than sums.

    Raises `ConfigError` for any other.
    """
    averaging = needing_only_sums(aggregator)
    if averaging is None:
        raise ConfigError(
            f"privacy.secure_aggregation is not possible with method {name!r}, whose server needs "
            "single replies and not only their weighted sums: use a method that averages factors, "
            "such as prelort"
        )
    return averaging


def contribution_of(
    aggregator: Averaging, method: Method, state: ServerState, client: Client
) -> Contribution:
    """What a client contributes to the round's sums.

    Raises `ConfigError` for a method whose clients train something else than parts of the state.
    """
    dimensions = trained_part(
        method,
        state,
        client,
        state.adapter,
        "privacy.secure_aggregation",
        aggregator.dimensions_of,
    )
    broadcast = method.broadcast(state, client)
    unsent = wire.not_sent_up(broadcast.trains, broadcast.personal)
    return Contribution(dimensions, aggregator.weight_of(client), unsent)


def check_clients(
    min_holders: int,
    method: Method,
    state: ServerState,
    clients: Sequence[Client],
    hide_ranks: bool = False,
) -> None:
    """Raise `ConfigError` if these clients cannot take part in secure aggregation together.

    With fewer than ``min_holders`` of the highest rank its dimensions would never be aggregated;
    with ``hide_ranks`` all seem to have it.
    """
    probe = without_zeros(state)
    with calling(method, "aggregator()"):
        aggregator = summing(method.aggregator(probe), method.name)
    trained = [
        len(contribution_of(aggregator, method, probe, client).dimensions) for client in clients
    ]
    highest = max(trained)
    if hide_ranks:
        check_prefixes(method, probe, highest)
    if aggregator.dimensions_of is None and trained.count(highest) < min_holders:
        raise ConfigError(
            f"privacy.min_holders = {min_holders}: {trained.count(highest)} of {len(clients)} "
            f"clients train rank {highest}, so its sum would show them; set ranks.mix so that at "
            f"least {min_holders} clients have the highest rank"
        )


class SecureRound(Round):
    """A `Round` whose replies are masked.

    ``send_query``: how clients are queried. ``private``: has the noise that clients add.
    ``holders``: of each rank dimension, where ranks are hidden and every client is treated as one
    of the highest.
    """

    def __init__(
        self,
        *arguments: Any,
        send_query: SendQuery,
        private: NoiseAtClients | None = None,
        holders: Holders | None = None,
        **named: Any,
    ) -> None:
        super().__init__(*arguments, **named)
        self._holders = holders
        self._send_query = send_query
        self._private = private
        noise = None if private is None else private.noise()
        if noise is not None and not is_complete(len(self.clients)):
            raise ConfigError(
                "privacy.epsilon with privacy.secure_aggregation is possible with up to "
                f"{graph.ALL + 1} clients in a round, and not with {len(self.clients)}: lower "
                "federation.clients_per_round"
            )
        self._summing = summing(self._aggregator, self._method.name)
        self._contributions = {
            client.name: contribution_of(self._summing, self._method, self._state, client)
            for client in self.clients
        }
        if noise is not None:
            self._contributions = {
                name: replace(one, weight=1.0) for name, one in self._contributions.items()
            }
        self._numbers = {client.name: i for i, client in enumerate(self.clients, start=1)}
        privacy = self._config.privacy
        counts = Counter(j for one in self._contributions.values() for j in one.dimensions)
        if holders is not None:
            counts = Counter(holders.at_least(len(self.clients)))
        self._kept = {j for j, count in counts.items() if count >= privacy.min_holders}
        left_out = tuple(j + 1 for j in sorted(counts.keys() - self._kept))
        if left_out:
            self._log(DimensionsLeftOut(self.number, left_out, privacy.min_holders))
        self._shapes = self._sent_shapes()
        self._lengths = blocks.lengths(self._shapes, self._spec.schema.rank)
        if noise is None:
            weight = sum(one.weight for one in self._contributions.values())
            self._bits = ring.fraction_bits(weight, self._config.federation.max_abs_value)
        else:
            self._bits = fraction_bits(noise, len(self.clients))
        self._sum = MaskedSum(
            {self._numbers[name]: self._blocks(name) for name in self._numbers},
            self._lengths,
            privacy.threshold,
            privacy.min_holders,
            noise,
        )

    def prepare(self) -> None:
        """Exchange keys and shares. Raises `QuorumError` if too few clients take part."""
        sums = self._sum
        present = self._query("keys", self._numbers, sums.keys_request, KeysReply, sums.add_keys)
        sums.draw_graph()
        joined = self._query("shares", present, sums.shares_request, SharesReply, sums.add_shares)
        sums.check_joined()
        self._check_counted(joined)

    def masked(self, client: Client) -> MaskedInput:
        """How the client is to mask its reply."""
        one = self._contributions[client.name]
        return MaskedInput(
            session=self._sum.session,
            sealed=self._sum.sealed_for(self._numbers[client.name]),
            holds=blocks.blocks_of(one.dimensions),
            lengths=self._lengths,
            weight=one.weight,
            fraction_bits=self._bits,
            bound=self._config.federation.max_abs_value,
        )

    def complete(self) -> None:
        """Also open the sum of the replies and aggregate it: too few clients cannot."""
        super().complete()
        sums = self._sum
        sums.check_survivors()
        self._check_counted(self._replies)
        if self._private is not None:
            self._private.count_release()
        self._query("unmask", self._replies, sums.unmask_request, UnmaskReply, sums.add_revealed)
        values = [ring.dequantise(words, self._bits) for words in sums.open()]
        self._check_values(values)
        tensors = blocks.join(values, self._shapes)
        changes = {
            name: torch.from_numpy(tensors[name]) if name in tensors else torch.zeros(t.shape)
            for name, t in self._state.adapter.tensors().items()
        }
        self._summing.add_sums(
            LoraAdapter.from_tensors(changes, self._state.adapter.scale),
            self._weights(),
            sum(self._contributions[name].weight for name in self._replies),
        )

    def _checked(
        self, client: Client, reply: Message, broadcast: Broadcast, objective: Objective
    ) -> tuple[TrainReply, None]:
        content = wire.reply_content(reply)
        limits, round_index = self._config.federation, self._state.round
        head = checked_head(
            content,
            client,
            round_index,
            self._spec,
            limits,
            broadcast,
            states_loss=self._private is None
            and not self._config.privacy.of_examples
            and self._holders is None,
        )
        try:
            self._sum.add(self._numbers[client.name], vector_in(content))
        except PrelortError as error:
            raise UpdateRefused(str(error)) from None
        return head, None

    def _query(
        self,
        action: str,
        names: Sequence[str] | Mapping[str, object],
        request: Callable[[int], Part],
        kind: type[Any],
        take: Callable[[int, Any], None],
    ) -> list[str]:
        """Send these clients a request each and take their replies; the names of who replied."""
        contents = {name: content_of(request(self._numbers[name]).text()) for name in names}
        for content in contents.values():
            self.count_sent(wire.size(content))
        answered: list[str] = []
        for client, size, error in answers(
            self._send_query,
            action,
            contents,
            kind,
            lambda name, reply: take(self._numbers[name], reply),
        ):
            if error is None:
                self._bytes_up += size
                answered.append(client.name)
            elif client.name in self._replies:  # its reply counts, if enough others reveal
                log.warning("%s does not help to open the sum: %s", client.name, error)
            else:
                self.fail(client, str(error))
        return answered

    def _check_counted(self, present: Collection[str]) -> None:
        """Raise `QuorumError` if these may be too few holders of a rank dimension."""
        if self._holders is not None:
            least = self._config.privacy.min_holders
            self._holders.check(len(present), self._kept, least)

    def _blocks(self, name: str) -> tuple[int, ...]:
        """The blocks that a client sends.

        Those that it holds; where clients have few neighbours each, all, since a block's masks must
        connect its holders.
        """
        own = self._contributions[name].dimensions
        sent = own if is_complete(len(self.clients)) else sorted(self._kept)
        return blocks.blocks_of(j for j in sent if j in self._kept)

    def _sent_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the tensors that clients send, at the full rank."""
        unsent = {one.unsent for one in self._contributions.values()}
        if len(unsent) > 1:
            raise ConfigError(
                f"privacy.secure_aggregation is not possible with method {self._method.name!r}, "
                "whose clients train different factors in one round"
            )
        kinds = unsent.pop()
        tensors = self._state.adapter.tensors()
        return {n: tuple(t.shape) for n, t in tensors.items() if wire.kind_of(n) not in kinds}

    def _weights(self) -> dict[str, Tensor]:
        """Layer -> the weight of each rank dimension's holders, of those that replied."""
        weights = torch.zeros(self._spec.schema.rank, dtype=torch.float64)
        if self._holders is not None:  # all weigh the same
            for j, count in enumerate(self._holders.expected(len(self._replies))):
                weights[j] = count if j in self._kept else 0.0
        else:
            for name in self._replies:
                one = self._contributions[name]
                weights[[j for j in one.dimensions if j in self._kept]] += one.weight
        layers = self._state.adapter.layers.items()
        return {name: weights[: factors.rank] for name, factors in layers}

    def _check_values(self, values: Sequence[ring.Values]) -> None:
        """Raise `QuorumError` for a sum that no replies within the bounds can have."""
        if self._private is None:
            total = sum(self._contributions[name].weight for name in self._replies)
            limit = total * self._config.federation.max_abs_value
        else:
            limit = largest_sum(self._private.noise(), len(self.clients))
        largest = max(float(np.abs(block).max(initial=0.0)) for block in values)
        if largest > limit + 1.0:
            raise QuorumError(
                f"the opened sum of round {self.number} holds {largest:.3g}, above what the "
                f"replies may add up to ({limit:.3g}): a client has sent a wrong masked vector"
            )
