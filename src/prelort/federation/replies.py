"""Checks of a client's reply: nothing in it is used before they pass."""

from __future__ import annotations

import math

from prelort.config import Config, FederationConfig
from prelort.errors import UpdateRefused
from prelort.federation import wire
from prelort.federation.encoding import with_change
from prelort.federation.flower import Message, RecordDict
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
    states_loss: bool = True,
) -> tuple[Update, TrainReply]:
    """The update in a reply and its header; factors that were not trained are as ``sent``.

    A change in a reply is added to what was ``sent``, in the server's own precision.

    Raises `UpdateRefused` with the reason: what `checked_head` refuses; another type than
    requested; a tensor that is missing, surplus, of a wrong shape or type, not finite or above
    ``limits.max_abs_value``.
    """
    content = wire.reply_content(reply)
    head = checked_head(content, client, round_index, spec, limits, sent, may_prune, states_loss)
    wire.check_dtype(head, limits.wire_dtype)
    base = sent.trainable.prefix(head.rank)
    untrained = wire.of_kinds(base, wire.not_sent_up(sent.trains, sent.personal))
    adapter, frozen = wire.adapter(content, head, untrained)
    if frozen is not None:
        raise UpdateRefused("sends a frozen adapter, which was not requested")
    wire.check_adapter(adapter, spec.schema, head.rank, limits.max_abs_value)
    if head.change:  # checked before and after: the sum may hide a huge change
        adapter = with_change(base, adapter, untrained)
        wire.check_adapter(adapter, spec.schema, head.rank, limits.max_abs_value)
    return Update(client, adapter, head.examples), head


def checked_head(
    content: RecordDict,
    client: Client,
    round_index: int,
    spec: AdapterSpec,
    limits: FederationConfig,
    sent: Broadcast,
    may_prune: bool = False,
    states_loss: bool = True,
) -> TrainReply:
    """The header of a reply.

    Raises `UpdateRefused` with the reason: an error or no reply; another base, layers, scale, rank
    (unless the client ``may_prune``), client or round than requested; a loss that is not finite, or
    that is missing while the client ``states_loss``; an impossible number of examples or next rank.
    """
    head = wire.header(content, TrainReply)
    rank = sent.trainable.rank
    spec.check(head, None if may_prune and head.rank < rank else rank)
    if head.client != client.name:
        raise UpdateRefused(f"answers for {head.client!r}")
    if head.round != round_index:
        raise UpdateRefused(f"answers for round {head.round + 1}, expected {round_index + 1}")
    check_examples(head.examples, limits.max_client_examples)
    if (head.loss is None) == states_loss or not math.isfinite(head.loss or 0.0):
        raise UpdateRefused(f"reports a loss of {head.loss}")
    if head.next_rank is not None and head.next_rank > spec.schema.rank:
        raise UpdateRefused(
            f"offers rank {head.next_rank}, but the global adapter has {spec.schema.rank}"
        )
    return head


def checked_metrics(
    reply: Message, client: Client, finished: int, spec: AdapterSpec, config: Config
) -> EvaluateReply:
    """A client's measurements after ``finished`` rounds.

    Raises `UpdateRefused` with the reason: an error or no reply; another base, layers, scale,
    client or round than requested; an impossible number of examples or tokens.
    """
    head = wire.header(wire.reply_content(reply), EvaluateReply)
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
