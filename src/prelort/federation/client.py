"""A client's side: what a site has, and the Flower `ClientApp` that trains and measures on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from peft import PeftModel
from torch import Tensor

from prelort.adapters import LoraAdapter
from prelort.adapters.initial import draw_a
from prelort.errors import PrelortError, UpdateRefused
from prelort.federation import messages, wire
from prelort.federation.client_app import Kind, client_app
from prelort.federation.encoding import carries_change, change_of
from prelort.federation.flower import ClientApp, Context, RecordDict
from prelort.federation.messages import AdapterSpec
from prelort.federation.personal import PersonalStore
from prelort.metrics.evaluate import evaluate, ranks_at_once
from prelort.models.lora import extract, install
from prelort.tasks.interface import Example, Task
from prelort.training.batched import Finished, Member, train_batched
from prelort.training.local import Assignment, train
from prelort.training.stack import saved_modules_are_linear
from prelort.training.tail import pruned_rank, tail_norm
from prelort.training.truncation import Truncation

R = TypeVar("R", int, None)


@dataclass(frozen=True, slots=True)
class ClientRuntime:
    """The base model with its exchangeable adapter, shared by all clients of a process."""

    model: PeftModel
    truncation: Truncation
    task: Task
    pad_id: int
    spec: AdapterSpec
    tokenizer: Any = None
    modules_to_save: Mapping[str, Tensor] = field(default_factory=dict)
    """What is trained in full (a classifier head), as it is before any training."""


@dataclass(frozen=True, slots=True)
class LocalClient:
    """One client: its name, the rank it affords, its examples, where it trains.

    ``max_rank``: the largest rank that it can be raised to (0: its rank). ``next_rank`` is asked after
    each round (from 0) for the rank that the site affords from then on, None for no change.
    ``stopped`` is asked during training whether to give up: nobody waits for the result.
    """

    name: str
    rank: int
    examples: Sequence[Example]
    runtime: ClientRuntime
    max_rank: int = 0
    validation: Sequence[Example] = ()
    test: Sequence[Example] = ()
    personal: PersonalStore | None = None
    next_rank: Callable[[int], int | None] = lambda round_index: None
    stopped: Callable[[], bool] = lambda: False


def make_client_app(site_of: Callable[[Context], LocalClient]) -> ClientApp:
    """A `ClientApp` that answers for sites of this process.

    ``site_of`` finds the site of a Flower context, e.g. by its ``partition-id``.
    """
    return client_app(lambda kind, content, context: respond(site_of(context), kind, content))


def respond(site: LocalClient, kind: Kind, content: RecordDict) -> RecordDict:
    """The content of the site's reply to a message of this kind.

    Raises `PrelortError` with a reason that the server may read: it speaks of what the server
    sent and of the training, not of what the site holds.
    """
    if kind in ("query", "end"):
        return wire.pack(_introduction(site))
    return _train(site, content) if kind == "train" else _evaluate(site, content)


def _introduction(site: LocalClient) -> messages.ClientProperties:
    facts = site.runtime.spec.header(site.rank).model_dump()
    max_rank = max(site.max_rank, site.rank)
    return messages.ClientProperties(
        **facts, client=site.name, examples=len(site.examples), max_rank=max_rank
    )


def _train(site: LocalClient, content: RecordDict) -> RecordDict:
    """Check the request, train the adapter that came with it, and pack the reply."""
    work = site.runtime
    request = wire.header(content, messages.TrainRequest)
    request.check_features()
    received, frozen = delivered(site, content, request)
    install(
        work.model,
        received,
        frozen=frozen,
        trains=request.trains,
        scale_multiplier=request.scale_multiplier,
    )
    assignment = assignment_of(site, request)
    if request.training.batch_truncations and saved_modules_are_linear(work.model):
        member = Member(
            received, site.examples, request.training, assignment, request.scale_multiplier
        )
        (found,) = train_batched(
            work.model,
            work.truncation,
            work.task,
            [member],
            work.pad_id,
            trains=request.trains,
            at_once=True,
        )
        if isinstance(found, PrelortError):
            raise found
        install(work.model, found.adapter, frozen=frozen, scale_multiplier=request.scale_multiplier)
        return train_reply(site, request, received, found)
    result = train(
        work.model,
        work.truncation,
        work.task,
        site.examples,
        request.training,
        assignment,
        work.pad_id,
    )
    trained = extract(work.model, work.spec.scale)
    return train_reply(site, request, received, Finished(trained, result))


def assignment_of(site: LocalClient, request: messages.TrainRequest) -> Assignment:
    """The site's work as the server wants it."""
    return Assignment(
        client=site.name,
        round_index=request.round,
        rounds=request.rounds,
        seed=request.seed,
        objective=request.to_objective(),
        timeout=request.timeout,
        stopped=site.stopped,
    )


def train_reply(
    site: LocalClient, request: messages.TrainRequest, received: LoraAdapter, found: Finished
) -> RecordDict:
    """The content of the reply of a site that has trained; what it trained must be installed."""
    work, trained, tail = site.runtime, found.adapter, request.tail
    if request.personal:
        _keep(site, request, trained)
    rank = request.rank
    if tail is not None:
        before = tail_norm(_pairs(received), tail, rank)
        rank = pruned_rank(_pairs(trained), tail, rank, before)
    offered = site.next_rank(request.round)
    reply = messages.TrainReply(
        **work.spec.header(rank).model_dump(),
        client=site.name,
        examples=len(site.examples),
        dtype=request.dtype,
        change=carries_change(request.dtype),
        round=request.round,
        steps=found.result.steps,
        loss=found.result.loss,
        seconds=found.result.seconds,
        next_rank=offered if offered is not None else rank if rank < request.rank else None,
        validation_loss=_validation_loss(site) if request.with_validation else None,
    )
    staying = wire.not_sent_up(request.trains, request.personal)
    answer = trained.prefix(rank)
    if reply.change:
        answer = change_of(answer, received)
    return wire.pack(reply, answer, without=staying)


def _pairs(adapter: LoraAdapter) -> list[tuple[Tensor, Tensor]]:
    return [(factors.A, factors.B) for factors in adapter.layers.values()]


def _evaluate(site: LocalClient, content: RecordDict) -> RecordDict:
    """Measure the adapter that came with the request on the site's own test rows."""
    request = wire.header(content, messages.EvaluateRequest)
    if not site.test:
        raise PrelortError("has no test rows of its own")
    received, frozen = delivered(site, content, request)
    install(site.runtime.model, received, frozen=frozen, scale_multiplier=request.scale_multiplier)
    metrics = request.metrics or site.runtime.task.metrics
    values = _measured(site, site.test, metrics, request)
    prefixes = tuple(dict.fromkeys(request.prefixes))
    at_prefixes = _measured_at(site, site.test, prefixes, metrics, request)
    reply = messages.EvaluateReply(
        **site.runtime.spec.header(request.rank).model_dump(),
        client=site.name,
        round=request.round,
        examples=len(site.test),
        weight=_weight(site),
        metrics=values,
        prefixes=at_prefixes,
    )
    return wire.pack(reply)


def _weight(site: LocalClient) -> int:
    """The tokens, or examples, that a loss over the test rows is a mean over."""
    task, pad_id = site.runtime.task, site.runtime.pad_id
    return sum(int(task.weight(task.collate([example], pad_id))) for example in site.test)


def delivered(
    site: LocalClient, content: RecordDict, request: messages.Delivery
) -> tuple[LoraAdapter, LoraAdapter | None]:
    """The adapter that was delivered and what is to be frozen beside it, both checked."""
    work = site.runtime
    work.spec.check(request)
    max_rank = max(site.max_rank, site.rank)
    # Measuring needs no gradients: any rank of the federation will do.
    if isinstance(request, messages.TrainRequest) and request.rank > max_rank:
        raise UpdateRefused(f"affords rank {max_rank} at most, asked was {request.rank}")
    received, frozen = wire.adapter(content, request, _known(site, request))
    wire.check_adapter(received, work.spec.schema, request.rank, float("inf"))
    if frozen is not None:
        wire.check_frozen(frozen, work.spec.schema)
    return received, frozen


def _known(site: LocalClient, request: messages.Delivery) -> dict[str, Tensor]:
    """The tensors that did not travel: drawn from the seed, zero, or the client's own."""
    schema, modules_to_save = site.runtime.spec.schema, site.runtime.modules_to_save
    tensors: dict[str, Tensor] = {}
    for name, rank in schema.layer_ranks(request.rank).items():
        d_in, d_out, largest = schema.layers[name]
        tensors[f"{name}.lora_B.weight"] = torch.zeros(d_out, rank)
        if request.seeded_factors != "nothing":
            drawn = draw_a(request.factor_seed, name, largest, d_in)
            tensors[f"{name}.lora_A.weight"] = drawn[:rank]
    own = _kept(site, request) if request.personal else {}
    known = {
        name: own.get(name, tensor) for name, tensor in (tensors | dict(modules_to_save)).items()
    }
    return {
        name: t for name, t in known.items() if wire.kind_of(name) in wire.not_sent_down(request)
    }


def _kept(site: LocalClient, request: messages.Delivery) -> dict[str, Tensor]:
    """The client's own B and extras from its last round, at the rank of this one."""
    if site.personal is None:
        raise PrelortError("has no place to keep its own factors: this method needs one")
    kept = site.personal.load(site.name, before=request.round)
    ranks = site.runtime.spec.schema.layer_ranks(request.rank)
    for layer, rank in ranks.items():
        name = f"{layer}.lora_B.weight"
        if name in kept:
            grown = torch.zeros(kept[name].shape[0], rank)
            shared = min(rank, kept[name].shape[1])
            grown[:, :shared] = kept[name][:, :shared]
            kept[name] = grown
    return kept


def _keep(site: LocalClient, request: messages.Delivery, trained: LoraAdapter) -> None:
    if site.personal is not None:
        own = wire.of_kinds(trained, wire.not_sent_down(request))
        site.personal.save(site.name, request.round, own)


def _validation_loss(site: LocalClient) -> float | None:
    """The loss of the trained adapter on the site's validation rows, None without any."""
    if not site.validation:
        return None
    return _measured(site, site.validation, (), None)["loss"]


def _measured(
    site: LocalClient,
    examples: Sequence[Example],
    metrics: Sequence[str],
    request: messages.EvaluateRequest | None,
) -> dict[str, float | None]:
    """The metrics of what is installed now."""
    return _measured_at(site, examples, (None,), metrics, request)[None]


def _measured_at(
    site: LocalClient,
    examples: Sequence[Example],
    ranks: Sequence[R],
    metrics: Sequence[str],
    request: messages.EvaluateRequest | None,
) -> dict[R, dict[str, float | None]]:
    """The metrics of prefixes of what is installed now (None: the whole of it)."""
    work = site.runtime
    whole = work.spec.schema.rank  # the truncation that leaves all slots of any adapter

    def at_ranks(part: Sequence[int], rows: int, length: int) -> AbstractContextManager[None]:
        if len(part) == 1:
            return work.truncation.at(ranks[part[0]])
        each = torch.tensor([whole if (r := ranks[i]) is None else r for i in part])
        return work.truncation.at(each.repeat_interleave(rows), (rows * len(part), length))

    with work.truncation.fused(work.model):
        found = evaluate(
            work.model,
            work.task,
            examples,
            range(len(ranks)),
            at_ranks,
            metrics=metrics,
            tokenizer=work.tokenizer,
            batch_size=request.batch_size if request is not None else 32,
            max_new_tokens=request.max_new_tokens if request is not None else 1,
            max_generated=request.max_generated if request is not None else 1,
            device=work.model.device,
            at_once=ranks_at_once(work.model.device),
        )
    return {rank: {**found[index]} for index, rank in enumerate(ranks)}
