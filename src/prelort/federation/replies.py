"""Checking a client's reply before anything in it is believed."""

from __future__ import annotations

import math

from prelort.config import Config, FederationConfig
from prelort.errors import UpdateRefused
from prelort.federation import wire
from prelort.federation.encoding import with_change
from prelort.federation.flower import Message
from prelort.federation.messages import AdapterSpec, EvaluateReply, TrainReply
from prelort.methods.interface import Broadcast, Client, Update


def checked_update(
    reply: Message,
    client: Client,
    round_index: int,
    spec: AdapterSpec,
    limits: FederationConfig,
    sent: Broadcast,
    may_prune: bool = False,
) -> tuple[Update, TrainReply]:
    """The update in a reply and its header; what it did not train is as it was ``sent``.

    Where the reply carries a change, the update is what was ``sent``, in the server's own
    precision, with that change.

    Raises `UpdateRefused` with the reason: an error or no answer, another base, layers, scale,
    rank (unless it ``may_prune``), client, round or type than asked, an impossible number of
    examples or rank to go on with, or a tensor that is missing, surplus, mis-shaped, mistyped,
    not finite or absurdly large.
    """
    content = wire.answered(reply)
    head = wire.header(content, TrainReply)
    asked = sent.trainable.rank
    spec.check(head, None if may_prune and head.rank < asked else asked)
    if head.client != client.name:
        raise UpdateRefused(f"answers for {head.client!r}")
    if head.round != round_index:
        raise UpdateRefused(f"answers for round {head.round + 1}, expected {round_index + 1}")
    check_examples(head.examples, limits.max_client_examples)
    if not math.isfinite(head.loss):
        raise UpdateRefused(f"reports a loss of {head.loss}")
    if head.next_rank is not None and head.next_rank > spec.schema.rank:
        raise UpdateRefused(
            f"offers rank {head.next_rank}, but the global adapter has {spec.schema.rank}"
        )
    wire.check_dtype(head, limits.wire_dtype)
    base = sent.trainable.prefix(head.rank)
    kept = wire.of_kinds(base, wire.not_sent_up(sent.trains, sent.personal))
    adapter, surplus = wire.adapter(content, head, kept)
    if surplus is not None:
        raise UpdateRefused("sends a frozen adapter, which nobody asked for")
    wire.check_adapter(adapter, spec.schema, head.rank, limits.max_abs_value)
    if head.change:  # itself checked above: it may hide a value behind one of the other sign
        adapter = with_change(base, adapter, kept)
        wire.check_adapter(adapter, spec.schema, head.rank, limits.max_abs_value)
    return Update(client, adapter, head.examples), head


def checked_metrics(
    reply: Message, client: Client, finished: int, spec: AdapterSpec, config: Config
) -> EvaluateReply:
    """What a client measured after so many ``finished`` rounds.

    Raises `UpdateRefused` with the reason: an error or no answer, another base, layers, scale,
    client or round than asked, or an impossible number of examples or tokens.
    """
    head = wire.header(wire.answered(reply), EvaluateReply)
    spec.check(head)
    if head.client != client.name:
        raise UpdateRefused(f"answers for {head.client!r}")
    if head.round != finished:
        raise UpdateRefused(f"answers for round {head.round}, expected {finished}")
    limit = config.federation.max_client_examples
    check_examples(head.examples, limit)
    if head.weight > limit * config.data.max_length:
        raise UpdateRefused(
            f"claims a weight of {head.weight}, allowed are federation.max_client_examples = "
            f"{limit} times data.max_length = {config.data.max_length}"
        )
    return head


def check_examples(claimed: int, limit: int) -> None:
    """Raise `UpdateRefused` for an impossible number of examples."""
    if not 1 <= claimed <= limit:
        raise UpdateRefused(
            f"claims {claimed} examples, allowed are 1 to federation.max_client_examples = {limit}"
        )
