"""Training several clients in one batched forward and backward pass for all of them.

Each client has its own examples, batches, truncations, rate, clipping and optimiser state, as if it
trained alone with `local.train`, which is the reference: the adapters are the same but for rounding
(and with dropout, for other masks). Clients take their steps together; one that has fewer steps, or
whose loss is no longer finite, stands still while the others go on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import Tensor

from prelort.adapters import LoraAdapter, Trained
from prelort.errors import PrelortError
from prelort.seeds import derive
from prelort.tasks.interface import Example
from prelort.training.adapter_stack import AdapterStack
from prelort.training.batches import ForwardPass
from prelort.training.optimizer import LocalOptimizer
from prelort.training.runtime import ModelRuntime
from prelort.training.settings import LocalTraining
from prelort.training.steps import (
    Assignment,
    LocalSteps,
    TrainResult,
    precision,
    row_ranks,
    training_mode,
)
from prelort.training.tail import tail_penalty


@dataclass(frozen=True, slots=True)
class BatchedClient:
    """One client of a batch: the adapter that it received, its examples, its work.

    The settings of the clients of a batch may differ in their learning rates alone.
    """

    adapter: LoraAdapter
    examples: Sequence[Example]
    settings: LocalTraining
    assignment: Assignment
    scale_multiplier: float = 1.0


@dataclass(frozen=True, slots=True)
class TrainedClient:
    """One client's trained adapter, with its result."""

    adapter: LoraAdapter
    result: TrainResult


def train_batched(
    runtime: ModelRuntime, clients: Sequence[BatchedClient], *, trains: Trained = "AB"
) -> list[TrainedClient | PrelortError]:
    """Train the adapters of all clients; for each, in their order, the result or its error.

    The model must be `stackable`. Seconds are those of the batch, shared evenly.
    """
    steps: dict[int, LocalSteps] = {}
    errors: dict[int, PrelortError] = {}
    for index, client in enumerate(clients):
        try:
            steps[index] = LocalSteps(
                client.examples, client.settings, client.assignment, len(clients)
            )
        except PrelortError as error:
            errors[index] = error
    if not steps:
        return [errors[index] for index in range(len(clients))]
    stack = AdapterStack(
        runtime.model,
        runtime.truncation,
        [client.adapter for client in clients],
        trains=trains,
        scale_multipliers=[client.scale_multiplier for client in clients],
    )
    settings, work = clients[0].settings, clients[0].assignment
    optimizers = {i: LocalOptimizer(*stack.trainable(i), clients[i].settings) for i in steps}
    names = [client.assignment.client for client in clients]
    seed = derive(work.seed, "dropout", *names, work.round_index)
    with stack.installed(), training_mode(runtime.model, settings, seed):
        for step in range(max(own.count for own in steps.values())):
            active = {i: s for i, s in steps.items() if i not in errors and step < s.count}
            if not active:
                break
            losses = torch.zeros(len(clients), device=stack.device)
            for parts in _shared_passes(runtime, active):
                losses += _backward(runtime, stack, parts, settings)
            for index in active:
                _add_tail(stack, index, clients[index].assignment)
            for index, loss in zip(active, losses[list(active)].tolist(), strict=True):
                try:
                    active[index].record(loss)
                    if active[index].over:
                        active[index].give_up()
                except PrelortError as error:
                    errors[index] = error
            stack.hand_out_gradients()
            for index in active.keys() - errors.keys():
                optimizers[index].step(active[index].rate_multiplier())
    return [
        errors.get(index) or TrainedClient(stack.adapter(index), steps[index].result())
        for index in range(len(clients))
    ]


def _shared_passes(
    runtime: ModelRuntime, active: dict[int, LocalSteps]
) -> Iterator[dict[int, ForwardPass]]:
    """The passes of one step: the clients' first ones together, then their second ones, ..."""
    passes = {index: steps.next(runtime) for index, steps in active.items()}
    for micro_batches in zip_longest(*passes.values(), fillvalue=[]):
        for parts in zip_longest(*micro_batches):
            yield {i: part for i, part in zip(passes, parts, strict=True) if part is not None}


def _backward(
    runtime: ModelRuntime,
    stack: AdapterStack,
    parts: dict[int, ForwardPass],
    settings: LocalTraining,
) -> Tensor:
    """Add the gradients of a shared pass to the stack's; the clients' losses in it [clients].

    All clients have equally many rows: those with fewer get rows that do not count.
    """
    device = stack.device
    rows = max(len(part.examples) for part in parts.values())
    examples: list[Example] = []
    ranks = torch.zeros(len(parts), rows, dtype=torch.int64)
    weights = torch.zeros(len(parts), rows)
    for row, (index, part) in enumerate(parts.items()):
        count = len(part.examples)
        examples += [*part.examples, *[part.examples[0]] * (rows - count)]
        ranks[row, :count] = row_ranks(part.ranks, count, stack.ranks[index])
        weights[row, :count] = part.weight
    collated = runtime.task.collate(examples, runtime.pad_id)
    batch = {name: tensor.to(device) for name, tensor in collated.items()}
    length = batch["input_ids"].shape[1]
    with (
        stack.rows([*parts], ranks.flatten().to(device), length),
        precision(settings, device),
    ):
        losses = runtime.task.losses(runtime.model, batch) * weights.flatten().to(device)
        losses.sum().backward()  # type: ignore[no-untyped-call]
    by_client = losses.detach().view(len(parts), rows).sum(dim=1)
    total = torch.zeros(len(stack.ranks), device=device)
    return total.index_add_(0, torch.tensor([*parts], device=device), by_client)


def _add_tail(stack: AdapterStack, index: int, assignment: Assignment) -> None:
    """Add the gradient of HetLoRA's penalty of one client."""
    objective = assignment.objective
    if objective.tail is not None:
        penalty = tail_penalty(stack.pairs(index), objective.tail, objective.levels[-1])
        (penalty * objective.tail.weight).backward()  # type: ignore[no-untyped-call]
