"""What several clients do in a round, in one batched forward and backward pass for all of them.

Each client has its own examples, batches, truncations, rate, clipping and optimiser state, as if it
trained alone with `local.train`, which is the reference: the adapters are the same but for rounding
(where a model has dropout, for the draws). Clients go step by step together; who has fewer steps,
or whose loss is no number any more, stands still while the others go on.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from prelort.adapters import LoraAdapter, Trained
from prelort.config import TrainingConfig
from prelort.errors import PrelortError
from prelort.methods.objective import Pass
from prelort.seeds import derive, torch_generator
from prelort.tasks.interface import Batch, Example, Task
from prelort.training.batches import batches, steps_per_round
from prelort.training.local import (
    Assignment,
    TrainResult,
    check_time,
    diverged,
    precision,
    scheduled,
    seeded,
)
from prelort.training.stack import Stack
from prelort.training.tail import tail_penalty
from prelort.training.truncation import Truncation


@dataclass(frozen=True, slots=True)
class Member:
    """One client of a group: what it received, its examples, its work.

    The configurations of a group may differ in their learning rates alone.
    """

    adapter: LoraAdapter
    examples: Sequence[Example]
    config: TrainingConfig
    assignment: Assignment
    scale_multiplier: float = 1.0


@dataclass(frozen=True, slots=True)
class Finished:
    """What one client has trained."""

    adapter: LoraAdapter
    result: TrainResult


@dataclass(frozen=True, slots=True)
class Unit:
    """One client's rows of a forward pass: its number, their examples, truncations and weight."""

    client: int
    examples: Sequence[Example]
    ranks: Tensor
    weight: float


def train_batched(
    model: nn.Module,
    truncation: Truncation,
    task: Task,
    members: Sequence[Member],
    pad_id: int,
    *,
    trains: Trained = "AB",
    at_once: bool = False,
) -> list[Finished | PrelortError]:
    """Train all members' adapters; for each, in their order, what it has trained or why not.

    The model must be `stackable`, unless there is one member. ``at_once``: all truncations of a
    batch in one forward pass instead of one after the other. Seconds are the group's, shared
    evenly.
    """
    started = time.monotonic()
    clients = [_Client(number, member) for number, member in enumerate(members)]
    config = members[0].config
    stack = Stack(
        model,
        truncation,
        [member.adapter for member in members],
        trains=trains,
        scale_multipliers=[member.scale_multiplier for member in members],
    )
    steps = _Steps(stack, config, clients)
    device = stack.factors.device
    names = [member.assignment.client for member in members]
    model.train()
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    seed = derive(members[0].assignment.seed, "dropout", *names, members[0].assignment.round_index)
    with stack.installed(), seeded(seed, model, device):
        for step in range(max(client.steps for client in clients)):
            active = [c for c in clients if c.error is None and step < c.steps]
            if not active:
                break
            losses = torch.zeros(len(clients), device=device)
            for units in _passes(active, task, pad_id, at_once):
                losses += _forward_backward(model, stack, task, units, pad_id, config)
            for client in active:
                _add_tail(stack, client)
            for client, loss in zip(clients, losses.tolist(), strict=True):
                if client in active:
                    client.take(loss, step, time.monotonic() - started)
            steps.take(step, active)
    seconds = (time.monotonic() - started) / len(clients)
    return [
        client.error
        if client.error is not None
        else Finished(
            stack.adapter(client.number),
            TrainResult(sum(client.losses) / len(client.losses), client.steps, seconds),
        )
        for client in clients
    ]


class _Client:
    """Where one client of the group stands."""

    def __init__(self, number: int, member: Member) -> None:
        self.number = number
        self.member = member
        work, count = member.assignment, len(member.examples)
        self.error: PrelortError | None = None
        self.losses: list[float] = []
        self.steps = steps_per_round(count, member.config) if count else 0
        if not count:
            self.error = PrelortError(f"client {work.client!r} has no training examples")
        self.order = batches(
            count, member.config, round_index=work.round_index, seed=work.seed, client=work.client
        )
        self.draws = torch_generator(work.seed, "truncations", work.client, work.round_index)

    def take(self, loss: float, step: int, seconds: float) -> None:
        """Note the loss of a step (from 0), or why the client ends here."""
        self.losses.append(loss)
        if not math.isfinite(loss):
            self.error = diverged(loss, step, self.steps, self.member.config)
            return
        try:
            check_time(self.member.assignment, seconds, step, self.steps)
        except PrelortError as error:
            self.error = error


def _passes(
    active: Sequence[_Client], task: Task, pad_id: int, at_once: bool
) -> Iterator[list[Unit]]:
    """The forward passes of one step: units of all clients that go into each.

    The clients' first truncations of their first batches are one pass, their second ones the
    next, and so on.
    """
    queues: list[list[list[Unit]]] = []
    config = active[0].member.config
    for client in active:
        objective = client.member.assignment.objective
        chosen = [next(client.order) for _ in range(config.gradient_accumulation)]
        micro = [[client.member.examples[i] for i in batch] for batch in chosen]
        weight = max(1, sum(task.weight(task.collate(examples, pad_id)) for examples in micro))
        units = [
            [
                Unit(
                    client.number,
                    examples,
                    _ranks(part, len(examples), objective.levels[-1]),
                    part.weight / weight,
                )
                for part in objective.passes(len(examples), client.draws)
            ]
            for examples in micro
        ]
        queues.append(units)
    for micro_batch in range(config.gradient_accumulation):
        of_clients = [units[micro_batch] for units in queues]
        if at_once:
            yield [unit for units in of_clients for unit in units]
            continue
        for number in range(max(len(units) for units in of_clients)):
            yield [units[number] for units in of_clients if number < len(units)]


def _ranks(part: Pass, rows: int, full: int) -> Tensor:
    """The truncation of each row, int64 [rows]."""
    if part.ranks is None:
        return torch.full((rows,), full)
    return part.ranks if isinstance(part.ranks, Tensor) else torch.full((rows,), part.ranks)


def _forward_backward(
    model: nn.Module,
    stack: Stack,
    task: Task,
    units: Sequence[Unit],
    pad_id: int,
    config: TrainingConfig,
) -> Tensor:
    """Add the gradients of a pass to the stack's; the clients' losses in it [clients].

    Groups have equally many rows: a shorter one is filled with rows that do not count.
    """
    device = stack.factors.device
    most = max(len(unit.examples) for unit in units)
    examples: list[Example] = []
    ranks = torch.zeros(len(units), most, dtype=torch.int64)
    weights = torch.zeros(len(units), most)
    for row, unit in enumerate(units):
        count = len(unit.examples)
        examples += [*unit.examples, *[unit.examples[0]] * (most - count)]
        ranks[row, :count] = unit.ranks
        weights[row, :count] = unit.weight
    batch: Batch = {n: t.to(device) for n, t in task.collate(examples, pad_id).items()}
    owners = [unit.client for unit in units]
    length = batch["input_ids"].shape[1]
    with stack.rows(owners, ranks.flatten().to(device), length), precision(config, device):
        shares = task.losses(model, batch) * weights.flatten().to(device)
        shares.sum().backward()  # type: ignore[no-untyped-call]
    by_unit = shares.detach().view(len(units), most).sum(dim=1)
    losses = torch.zeros(len(stack.factors), device=device)
    return losses.index_add_(0, torch.tensor(owners, device=device), by_unit)


def _add_tail(stack: Stack, client: _Client) -> None:
    """HetLoRA's penalty of one client joins its gradients."""
    objective = client.member.assignment.objective
    if objective.tail is not None:
        penalty = tail_penalty(stack.pair(client.number), objective.tail, objective.levels[-1])
        (penalty * objective.tail.weight).backward()  # type: ignore[no-untyped-call]


@dataclass
class _Steps:
    """One optimiser for all: it says each step's direction, of which each client takes its rate.

    torch's optimisers have one rate for a tensor. Here they work on a tensor of zeros at the rate
    1: what they make of it is the step, and ``values += rate * step`` is the client's own.
    """

    stack: Stack
    config: TrainingConfig
    clients: Sequence[_Client]
    rates: tuple[Tensor, Tensor] = field(init=False)
    """Of factors and extras [steps of the round, adapters]."""
    units: tuple[Tensor, Tensor] = field(init=False)
    optimizer: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        values = (self.stack.factors, self.stack.modules_to_save)
        table = torch.zeros(2, max(client.steps for client in self.clients), len(self.clients))
        for client in self.clients:
            for step, pair in enumerate(_rates(client)):
                table[:, step, client.number] = torch.tensor(pair)
        of_factors, of_extras = table.to(values[0].device)
        self.rates = of_factors, of_extras
        self.units = nn.Parameter(torch.zeros_like(values[0])), nn.Parameter(values[1].clone())
        if self.config.optimizer == "adamw":
            self.optimizer = torch.optim.AdamW(self.units, lr=1.0, weight_decay=0.0)
        else:
            self.optimizer = torch.optim.SGD(self.units, lr=1.0, momentum=self.config.momentum)

    @torch.no_grad()
    def take(self, step: int, active: Sequence[_Client]) -> None:
        """Clip each client's gradient and move those that are still active."""
        decay, adamw = self.config.weight_decay, self.config.optimizer == "adamw"
        going = torch.zeros(len(self.clients), device=self.stack.factors.device)
        going[[client.number for client in active if client.error is None]] = 1.0
        values, gradients = (
            (self.stack.factors, self.stack.modules_to_save),
            self.stack.take_gradients(),
        )
        _clip(gradients, self.config.max_grad_norm)
        for value, gradient, unit in zip(values, gradients, self.units, strict=True):
            # Decay belongs to SGD's gradient and to AdamW's step.
            unit.grad = gradient if adamw else gradient.add_(value, alpha=decay)
            unit.zero_()
        self.optimizer.step()
        for value, unit, rates in zip(values, self.units, self.rates, strict=True):
            rate = (rates[step] * going)[:, None]
            if adamw and decay:
                value.mul_(1 - rate * decay)
            # The step of a client that stands still may be no number.
            value.add_(torch.where(rate > 0, rate * unit, 0.0))


def _clip(gradients: Sequence[Tensor], most: float) -> None:
    """Scale each client's gradient down to the norm allowed, as `clip_grad_norm_` does."""
    if most > 0:
        norms = torch.stack([gradient.norm(dim=1) for gradient in gradients]).norm(dim=0)
        factors = (most / (norms + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            gradient.mul_(factors[:, None])


def _rates(client: _Client) -> list[tuple[float, float]]:
    """The learning rates of factors and extras at each of the client's steps of this round."""
    config = client.member.config
    head = config.head_learning_rate or config.learning_rate
    groups = [{"params": [torch.zeros(1)], "lr": rate} for rate in (config.learning_rate, head)]
    optimizer = torch.optim.SGD(groups)
    if not client.steps:
        return []
    scheduler = scheduled(optimizer, config, client.steps, client.member.assignment)
    rates = []
    for _ in range(client.steps):
        rates.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[1]["lr"]))
        optimizer.step()
        scheduler.step()
    return rates
