"""Clients of this process that answer an order to train together, as one batch.

What each of them sends is what it would have sent alone, but for rounding. Clients that cannot take
part train alone: those that have something folded into their base, and all where the model has
modules trained in full that are not linear layers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch

from prelort.adapters import LoraAdapter
from prelort.errors import PrelortError
from prelort.federation import messages, wire
from prelort.federation.client import LocalClient, assignment_of, delivered, respond, train_reply
from prelort.federation.client_app import REFUSED
from prelort.federation.flower import Context, Error, Message, RecordDict
from prelort.models.lora import install
from prelort.training.batched import Finished, Member, train_batched
from prelort.training.stack import stackable

log = logging.getLogger(__name__)

Order = tuple[int, LocalClient, messages.TrainRequest, LoraAdapter]
"""Its place among the messages, whose it is, what is asked, and the adapter that came with it."""

Answer: TypeAlias = RecordDict | PrelortError


def answer_batched(
    site_of: Callable[[Context], LocalClient],
) -> Callable[[Sequence[tuple[Message, Context]]], list[Message]]:
    """Answers messages to train of several sites of one workspace, in their order."""

    def answer(messages: Sequence[tuple[Message, Context]]) -> list[Message]:
        sites = [site_of(context) for _, context in messages]
        answers = respond_batched(sites, [message.content for message, _ in messages])
        return [
            Message(Error(REFUSED, str(found)), reply_to=message)
            if isinstance(found, PrelortError)
            else Message(found, reply_to=message)
            for (message, _), found in zip(messages, answers, strict=True)
        ]

    return answer


def respond_batched(sites: Sequence[LocalClient], contents: Sequence[RecordDict]) -> list[Answer]:
    """The content of each site's reply to an order to train, or why it has none."""
    answers: dict[int, Answer] = {}
    groups: dict[str, list[Order]] = {}
    for place, (site, content) in enumerate(zip(sites, contents, strict=True)):
        try:
            request = wire.header(content, messages.TrainRequest)
            received, frozen = delivered(site, content, request)
        except PrelortError as error:
            answers[place] = error
            continue
        if frozen is None:
            groups.setdefault(_kind(request), []).append((place, site, request, received))
    for orders in groups.values():
        _, site, request, received = orders[0]
        # Also takes out what an earlier client had folded in.
        install(
            site.runtime.model,
            received,
            trains=request.trains,
            scale_multiplier=request.scale_multiplier,
        )
        if len(orders) > 1 and stackable(site.runtime.model):
            answers |= _answered(orders)
    for place, (site, content) in enumerate(zip(sites, contents, strict=True)):
        if place not in answers:
            try:
                answers[place] = respond(site, "train", content)
            except PrelortError as error:
                answers[place] = error
    return [answers[place] for place in range(len(sites))]


def _kind(request: messages.TrainRequest) -> str:
    """What clients must have in common: all but their learning rates."""
    rates = {"learning_rate": 1.0, "head_learning_rate": None}
    return request.training.model_copy(update=rates).model_dump_json() + request.trains


def _answered(orders: Sequence[Order]) -> dict[int, Answer]:
    """Train together; where memory does not suffice, in halves."""
    try:
        found = _trained(orders)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        if len(orders) == 1:
            raise
        log.warning("no memory for %d clients together, they are trained in halves", len(orders))
        half = len(orders) // 2
        return _answered(orders[:half]) | _answered(orders[half:])
    answers: dict[int, Answer] = {}
    for (place, site, request, received), result in zip(orders, found, strict=True):
        if isinstance(result, PrelortError):
            answers[place] = result
            continue
        if request.with_validation:  # measured with what was trained
            install(site.runtime.model, result.adapter, scale_multiplier=request.scale_multiplier)
        answers[place] = train_reply(site, request, received, result)
    return answers


def _trained(orders: Sequence[Order]) -> list[Finished | PrelortError]:
    work, request = orders[0][1].runtime, orders[0][2]
    members = [
        Member(
            received,
            site.examples,
            asked.training,
            assignment_of(site, asked),
            asked.scale_multiplier,
        )
        for _, site, asked, received in orders
    ]
    return train_batched(
        work.model,
        work.truncation,
        work.task,
        members,
        work.pad_id,
        trains=request.trains,
        at_once=request.training.batch_truncations,
    )
