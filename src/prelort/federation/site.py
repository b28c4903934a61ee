"""A client's side: what a site has, and the Flower `ClientApp` that trains on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from peft import PeftModel

from prelort.errors import PrelortError
from prelort.federation import wire
from prelort.federation.flower import ClientApp, Context, Error, Message, RecordDict
from prelort.federation.registry import Agreement
from prelort.models.lora import extract, install
from prelort.tasks.interface import Example, Task
from prelort.training.local import Assignment, train
from prelort.training.truncation import Truncation

REFUSED = 100
"""The error code of a client that says why it did not train (Flower's own are below)."""


@dataclass(frozen=True, slots=True)
class Workspace:
    """The base model with its exchangeable adapter, shared by all clients of a process."""

    model: PeftModel
    truncation: Truncation
    task: Task
    pad_id: int
    agreement: Agreement


@dataclass(frozen=True, slots=True)
class Site:
    """One client: its name, the rank it affords, its examples, where it trains."""

    name: str
    rank: int
    examples: Sequence[Example]
    workspace: Workspace


def make_client_app(site_of: Callable[[Context], Site]) -> ClientApp:
    """A `ClientApp` that introduces itself (query) and trains (train).

    ``site_of`` finds the site of a Flower context, e.g. by its ``partition-id``.
    """
    app = ClientApp()

    @app.query()  # type: ignore[untyped-decorator]
    def introduce(message: Message, context: Context) -> Message:
        site = site_of(context)
        return Message(wire.pack(_introduction(site)), reply_to=message)

    @app.train()  # type: ignore[untyped-decorator]
    def train_round(message: Message, context: Context) -> Message:
        try:
            return Message(_train(site_of(context), message), reply_to=message)
        except PrelortError as error:
            return Message(Error(REFUSED, str(error)), reply_to=message)

    return app


def _introduction(site: Site) -> wire.Introduction:
    facts = site.workspace.agreement.header(site.rank).model_dump()
    return wire.Introduction(**facts, client=site.name, examples=len(site.examples))


def _train(site: Site, message: Message) -> RecordDict:
    """Check the request, train the adapter that came with it, and pack the reply."""
    work = site.workspace
    request = wire.header(message.content, wire.TrainRequest)
    work.agreement.check(request, site.rank)
    received = wire.adapter(message.content, request)
    wire.check_adapter(received, work.agreement.schema, site.rank, float("inf"))
    install(work.model, received)
    assignment = Assignment(
        client=site.name,
        round_index=request.round,
        rounds=request.rounds,
        seed=request.seed,
        objective=request.to_objective(),
        timeout=request.timeout,
    )
    result = train(
        work.model,
        work.truncation,
        work.task,
        site.examples,
        request.training,
        assignment,
        work.pad_id,
    )
    reply = wire.TrainReply(
        **_introduction(site).model_dump(),
        dtype=request.dtype,
        round=request.round,
        steps=result.steps,
        loss=result.loss,
        seconds=result.seconds,
    )
    return wire.pack(reply, extract(work.model, work.agreement.scale))
