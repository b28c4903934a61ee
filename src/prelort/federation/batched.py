"""Clients of this process that train as one batch.

Each sends the reply that it would send alone, up to rounding. A client trains alone if something is
folded into its base, or if it trains directions and magnitudes; all do if the model has modules
trained in full that are not linear layers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias

import torch

from prelort.adapters import LoraAdapter
from prelort.errors import PrelortError
from prelort.federation import masking, messages
from prelort.federation.client import (
    LocalClient,
    assignment_of,
    read_request,
    respond,
    train_reply,
)
from prelort.federation.client_app import handler
from prelort.federation.flower import Context, Message, RecordDict
from prelort.models.lora import install
from prelort.training.adapter_stack import stackable
from prelort.training.batched import BatchedClient, TrainedClient, train_batched
from prelort.training.settings import LocalTraining

log = logging.getLogger(__name__)

Reply: TypeAlias = RecordDict | PrelortError


@dataclass(frozen=True, slots=True)
class _Job:
    """A message to train: its index among the messages, its client, its header and adapter."""

    place: int
    client: LocalClient
    request: messages.TrainRequest
    received: LoraAdapter

    @property
    def settings(self) -> LocalTraining:
        return self.request.training

    @property
    def kind(self) -> object:
        """What the clients of a batch have in common: all settings but their learning rates."""
        alike = replace(self.settings, learning_rate=1.0, head_learning_rate=1.0)
        return alike, self.request.trains


def answer_batched(
    client_of: Callable[[Context], LocalClient],
) -> Callable[[Sequence[tuple[Message, Context]]], list[Message]]:
    """Answers messages to train of several clients that share a runtime, in their order."""

    def answer(messages: Sequence[tuple[Message, Context]]) -> list[Message]:
        clients = [client_of(context) for _, context in messages]
        replies = respond_batched(clients, [message.content for message, _ in messages])
        return [
            handler(partial(_masked, reply))(message, context)
            for (message, context), reply in zip(messages, replies, strict=True)
        ]

    return answer


def _masked(reply: Reply, content: RecordDict, context: Context) -> RecordDict:
    if isinstance(reply, PrelortError):
        raise reply
    return masking.masked(content, reply, context.state)


def respond_batched(clients: Sequence[LocalClient], contents: Sequence[RecordDict]) -> list[Reply]:
    """The content of each client's reply to a message to train, or the error in place of one."""
    replies: dict[int, Reply] = {}
    batches: dict[object, list[_Job]] = {}
    for place, (client, content) in enumerate(zip(clients, contents, strict=True)):
        try:
            request, received, frozen = read_request(client, content)
        except PrelortError as error:
            replies[place] = error
            continue
        # With noise on its gradients or magnitudes of its own a client has a batch of its own.
        alone = request.private is not None or request.training.magnitude_rate_ratio is not None
        if frozen is None and not alone:
            job = _Job(place, client, request, received)
            batches.setdefault(job.kind, []).append(job)
    for jobs in batches.values():
        runtime = jobs[0].client.runtime
        install(runtime.model, jobs[0].received)  # removes what an earlier client had folded in
        if len(jobs) > 1 and stackable(runtime):
            replies |= _train(jobs)
    for place, (client, content) in enumerate(zip(clients, contents, strict=True)):
        if place not in replies:
            try:
                replies[place] = respond(client, "train", content)
            except PrelortError as error:
                replies[place] = error
    return [replies[place] for place in range(len(clients))]


def _train(jobs: Sequence[_Job]) -> dict[int, Reply]:
    """Train in one batch, or in halves if memory does not suffice."""
    runtime = jobs[0].client.runtime
    clients = [
        BatchedClient(
            job.received,
            job.client.examples,
            job.settings,
            assignment_of(job.client, job.request),
            job.request.scale_multiplier,
        )
        for job in jobs
    ]
    results: list[TrainedClient | PrelortError] | None = None
    try:
        results = train_batched(runtime, clients, trains=jobs[0].request.trains)
    except torch.OutOfMemoryError:
        if len(jobs) == 1:
            raise
    if results is None:  # not in the handler, whose traceback holds the batch's memory
        torch.cuda.empty_cache()
        log.warning("no memory for a batch of %d clients: training in halves", len(jobs))
        half = len(jobs) // 2
        return _train(jobs[:half]) | _train(jobs[half:])
    return {job.place: _reply(job, result) for job, result in zip(jobs, results, strict=True)}


def _reply(job: _Job, result: TrainedClient | PrelortError) -> Reply:
    if isinstance(result, PrelortError):
        return result
    if job.request.with_validation:  # evaluates the installed adapter
        model, multiplier = job.client.runtime.model, job.request.scale_multiplier
        install(model, result.adapter, scale_multiplier=multiplier)
    return train_reply(job.client, job.request, job.received, result)
