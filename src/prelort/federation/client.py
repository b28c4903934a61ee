"""The client side: data and runtime of a client, and its replies to the server's messages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from prelort.adapters import LoraAdapter
from prelort.adapters.initial import draw_a
from prelort.errors import PrelortError, UpdateRefused
from prelort.federation import messages, wire
from prelort.federation.client_app import Kind
from prelort.federation.encoding import carries_change, change_of
from prelort.federation.flower import RecordDict
from prelort.federation.messages import AdapterSpec
from prelort.federation.personal import PersonalStore
from prelort.metrics.evaluate import EvaluationSettings, evaluate, ranks_at_once
from prelort.models.lora import extract, install
from prelort.privacy.example import ExampleLedger, NoisyGradients
from prelort.tasks.interface import Example
from prelort.training.batched import TrainedClient
from prelort.training.batches import steps_per_round
from prelort.training.local import train
from prelort.training.private import ExampleGradients, budget_of
from prelort.training.runtime import ModelRuntime
from prelort.training.steps import Assignment
from prelort.training.tail import pruned_rank, tail_norm

R = TypeVar("R", int, None)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientRuntime(ModelRuntime):
    """A model with an exchangeable adapter, shared by the clients of a process or thread.

    ``modules_to_save``: the modules trained in full (a classifier head) before any training.
    """

    spec: AdapterSpec
    modules_to_save: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LocalClient:
    """One client: its name, the rank it affords, its examples, and its runtime.

    ``max_rank``: the largest rank it can be raised to (0: its rank). ``validation``: the examples
    by whose loss the server allocates ranks, the same for all clients where possible.
    ``ledger``: what it has spent of its examples' privacy. ``next_rank``: called after each round
    (from 0), returns the rank from the next round on, None for no change. ``stopped``: called
    during training, returns whether to give up.
    """

    name: str
    rank: int
    examples: Sequence[Example]
    runtime: ClientRuntime
    max_rank: int = 0
    validation: Sequence[Example] = ()
    test: Sequence[Example] = ()
    personal: PersonalStore | None = None
    ledger: ExampleLedger | None = None
    next_rank: Callable[[int], int | None] = lambda round_index: None
    stopped: Callable[[], bool] = lambda: False


def respond(client: LocalClient, kind: Kind, content: RecordDict) -> RecordDict:
    """The content of the client's reply to a message of this kind.

    Raises `PrelortError` with a reason that the server may read: it is about the request and the
    training, not about the client's data.
    """
    if kind in ("query", "end"):
        return wire.pack(_properties(client))
    return _train(client, content) if kind == "train" else _evaluate(client, content)


def _properties(client: LocalClient) -> messages.ClientProperties:
    return messages.ClientProperties(
        **client.runtime.spec.header(client.rank).model_dump(),
        client=client.name,
        examples=len(client.examples),
        max_rank=max(client.max_rank, client.rank),
    )


def _train(client: LocalClient, content: RecordDict) -> RecordDict:
    """Check the request, train its adapter, and pack the reply."""
    runtime = client.runtime
    request, received, frozen = read_request(client, content)
    install(
        runtime.model,
        received,
        frozen=frozen,
        trains=request.trains,
        scale_multiplier=request.scale_multiplier,
    )
    noise = _paid_noise(client, request)
    work = assignment_of(client, request)
    result = train(runtime, client.examples, request.training, work, noise=noise)
    trained = TrainedClient(extract(runtime.model, runtime.spec.scale), result)
    return train_reply(client, request, received, trained)


def _paid_noise(client: LocalClient, request: messages.TrainRequest) -> NoisyGradients | None:
    """The noise that the request asks for, its round paid for; None: no noise."""
    private, ledger, count = request.private, client.ledger, len(client.examples)
    if private is None:
        if ledger is not None and ledger.limit is not None:
            raise PrelortError(
                "trains with noise only ([privacy] in its site.toml): set privacy.epsilon, and "
                "privacy.unit = 'example'"
            )
        return None
    if request.with_validation:
        raise PrelortError("states no validation loss beside noisy gradients: it is exact")
    if ledger is None:
        raise PrelortError("has no place to keep what it has spent of its examples' privacy")
    budget = budget_of(private, count, request.training, request.rounds)
    some = [client.examples[row] for row in range(min(2, count))]
    ExampleGradients(client.runtime, request.training).check(some)
    return ledger.pay(private, budget, steps_per_round(count, request.training))


def assignment_of(client: LocalClient, request: messages.TrainRequest) -> Assignment:
    """The client's work in the round of the request."""
    return Assignment(
        client=client.name,
        round_index=request.round,
        rounds=request.rounds,
        seed=request.seed,
        objective=request.to_objective(),
        timeout=request.timeout,
        stopped=client.stopped,
    )


def train_reply(
    client: LocalClient,
    request: messages.TrainRequest,
    received: LoraAdapter,
    trained: TrainedClient,
) -> RecordDict:
    """The reply of a client after training, while the trained adapter is installed.

    Saves the client's personal factors, and prunes the adapter if its tail has become smaller.
    """
    adapter, tail, rank = trained.adapter, request.tail, request.rank
    private = request.private
    first = client.runtime.processes.index == 0
    if request.personal and client.personal is not None and first:
        own = wire.of_kinds(adapter, wire.not_sent_down(request))
        client.personal.save(client.name, request.round, own)
    if tail is not None:
        before = tail_norm(_pairs(received), tail, rank)
        rank = pruned_rank(_pairs(adapter), tail, rank, before)
    next_rank = client.next_rank(request.round)
    if next_rank is None and rank < request.rank:
        next_rank = rank
    reply = messages.TrainReply(
        **client.runtime.spec.header(rank).model_dump(),
        client=client.name,
        examples=len(client.examples),
        dtype=request.reply_dtype,
        change=request.masked is not None or carries_change(request.dtype),
        round=request.round,
        steps=trained.result.steps,
        loss=None if private else trained.result.loss,
        seconds=trained.result.seconds,
        next_rank=next_rank,
        validation_loss=_validation_loss(client) if request.with_validation else None,
        epsilon=client.ledger.epsilon(private) if private and client.ledger else None,
    )
    answer = adapter.prefix(rank)
    if reply.change:
        answer = change_of(answer, received)
    return wire.pack(reply, answer, without=wire.not_sent_up(request.trains, request.personal))


def _pairs(adapter: LoraAdapter) -> list[tuple[Tensor, Tensor]]:
    return [(factors.A, factors.B) for factors in adapter.layers.values()]


def _evaluate(client: LocalClient, content: RecordDict) -> RecordDict:
    """Evaluate the adapter of the request on the client's own test examples."""
    runtime = client.runtime
    request = wire.header(content, messages.EvaluateRequest)
    if client.ledger is not None and client.ledger.limit is not None:
        raise PrelortError(
            "measures nothing on its own rows, which is not noisy ([privacy] in its site.toml)"
        )
    if not client.test:
        raise PrelortError("has no test rows of its own")
    received, frozen = read_adapters(client, content, request)
    install(runtime.model, received, frozen=frozen, scale_multiplier=request.scale_multiplier)
    settings = EvaluationSettings(
        metrics=request.metrics or runtime.task.metrics,
        batch_size=request.batch_size,
        max_new_tokens=request.max_new_tokens,
        max_generated=request.max_generated,
    )
    (whole,) = _evaluate_at(runtime, client.test, (None,), settings).values()
    prefixes = tuple(dict.fromkeys(request.prefixes))
    reply = messages.EvaluateReply(
        **runtime.spec.header(request.rank).model_dump(),
        client=client.name,
        round=request.round,
        examples=len(client.test),
        weight=_weight(client),
        metrics=whole,
        prefixes=_evaluate_at(runtime, client.test, prefixes, settings),
    )
    return wire.pack(reply)


def _weight(client: LocalClient) -> int:
    """The number of tokens, or examples, that a loss over the test examples is a mean of."""
    task, pad_id = client.runtime.task, client.runtime.pad_id
    return sum(int(task.weight(task.collate([example], pad_id))) for example in client.test)


def _validation_loss(client: LocalClient) -> float | None:
    """The loss of the installed adapter on the validation examples, None without any."""
    if not client.validation:
        return None
    settings = EvaluationSettings(metrics=())
    (values,) = _evaluate_at(client.runtime, client.validation, (None,), settings).values()
    return values["loss"]


def _evaluate_at(
    runtime: ClientRuntime,
    examples: Sequence[Example],
    ranks: Sequence[R],
    settings: EvaluationSettings,
) -> dict[R, dict[str, float | None]]:
    """The metrics of prefixes of the installed adapter (None: the whole of it)."""
    highest = runtime.spec.schema.rank  # truncating at this rank cuts nothing

    def at_ranks(part: Sequence[int], rows: int, length: int) -> AbstractContextManager[None]:
        if len(part) == 1:
            return runtime.truncation.at(ranks[part[0]])
        each = torch.tensor([highest if (r := ranks[i]) is None else r for i in part])
        return runtime.truncation.at(each.repeat_interleave(rows), (rows * len(part), length))

    with runtime.truncation.fused(runtime.model):
        values = evaluate(
            runtime,
            examples,
            range(len(ranks)),
            at_ranks,
            settings,
            at_once=ranks_at_once(runtime.device),
        )
    return {rank: {**values[index]} for index, rank in enumerate(ranks)}


def read_request(
    client: LocalClient, content: RecordDict
) -> tuple[messages.TrainRequest, LoraAdapter, LoraAdapter | None]:
    """A request to train, its adapter to train and its frozen one, all at the client's rank.

    Raises `UpdateRefused` as `read_adapters` does.
    """
    request = wire.header(content, messages.TrainRequest)
    received, frozen = read_adapters(client, content, request)
    if request.by_rank:
        request, received = request.at(client.rank), received.prefix(client.rank)
    return request, received, frozen


def read_adapters(
    client: LocalClient, content: RecordDict, request: messages.Delivery
) -> tuple[LoraAdapter, LoraAdapter | None]:
    """The adapter to train or evaluate and the frozen one of a request, both checked.

    Raises `UpdateRefused` if they do not fit the client's model or exceed its rank.
    """
    spec = client.runtime.spec
    spec.check(request)
    if isinstance(request, messages.TrainRequest):
        request.check_features()
        max_rank = max(client.max_rank, client.rank)
        # Evaluation needs no gradients: any rank will do. One of ``by_rank`` is the client's own.
        if request.rank > max_rank and not request.by_rank:
            raise UpdateRefused(f"affords rank {max_rank} at most, requested was {request.rank}")
    received, frozen = wire.adapter(content, request, _known_tensors(client, request))
    wire.check_adapter(received, spec.schema, request.rank, float("inf"))
    if frozen is not None:
        wire.check_frozen(frozen, spec.schema)
    return received, frozen


def _known_tensors(client: LocalClient, request: messages.Delivery) -> dict[str, Tensor]:
    """The tensors that did not travel: seeded factors, zeros, or the client's own."""
    schema = client.runtime.spec.schema
    known = dict(client.runtime.modules_to_save)
    for name, rank in schema.layer_ranks(request.rank).items():
        d_in, d_out, largest = schema.layers[name]
        known[f"{name}.lora_B.weight"] = torch.zeros(d_out, rank)
        if request.seeded_factors != "nothing":
            seeded = draw_a(request.factor_seed, name, largest, d_in)
            known[f"{name}.lora_A.weight"] = seeded[:rank]
    if request.personal:
        known |= _personal_tensors(client, request)
    return {
        name: t for name, t in known.items() if wire.kind_of(name) in wire.not_sent_down(request)
    }


def _personal_tensors(client: LocalClient, request: messages.Delivery) -> dict[str, Tensor]:
    """The client's own B and modules to save from its last round, at the rank of this one."""
    # They may be of a time before the limit, without noise.
    if client.ledger is not None and client.ledger.limit is not None:
        raise PrelortError("uses no factors of its own ([privacy] in its site.toml)")
    if client.personal is None:
        raise PrelortError("has no place to keep its own factors: this method needs one")
    tensors = client.personal.load(client.name, before=request.round)
    for layer, rank in client.runtime.spec.schema.layer_ranks(request.rank).items():
        name = f"{layer}.lora_B.weight"
        if name in tensors:
            resized = torch.zeros(tensors[name].shape[0], rank)
            shared = min(rank, tensors[name].shape[1])
            resized[:, :shared] = tensors[name][:, :shared]
            tensors[name] = resized
    return tensors
