"""What one client does in a round: optimiser steps on its own examples.

A plain loop and not `transformers.Trainer`: the nested objective needs several weighted passes a
step, and a Trainer built anew for every client and round costs more than a tiny model's steps.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from transformers import (
    PretrainedConfig,
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from prelort.config import TrainingConfig
from prelort.errors import PrelortError
from prelort.methods.objective import Objective
from prelort.models.lora import trainable
from prelort.seeds import derive, torch_generator
from prelort.tasks.interface import Batch, Example, Task
from prelort.training.batches import batches, steps_per_round
from prelort.training.tail import pairs, tail_penalty
from prelort.training.truncation import Truncation


@dataclass(frozen=True, slots=True)
class Assignment:
    """One client's work in one round. ``round_index`` counts from 0."""

    client: str
    round_index: int
    rounds: int
    seed: int
    objective: Objective
    timeout: float = math.inf
    """Seconds after which the client gives up."""
    stopped: Callable[[], bool] = lambda: False
    """Whether nobody waits for the result any more; asked after every step."""


@dataclass(frozen=True, slots=True)
class TrainResult:
    """``loss``: mean over the steps of the objective (per token, or per example), no penalty."""

    loss: float
    steps: int
    seconds: float


def train(
    model: nn.Module,
    truncation: Truncation,
    task: Task,
    examples: Sequence[Example],
    config: TrainingConfig,
    assignment: Assignment,
    pad_id: int,
    *,
    fused: bool = True,
) -> TrainResult:
    """Train the installed adapter in place, deterministically for equal arguments.

    Without ``fused`` the LoRA layers compute as PEFT does: slower, and the same but for rounding.

    The optimiser starts fresh and its state is thrown away. Raises `PrelortError` if the loss is
    no longer finite, the time is up or it was stopped.
    """
    started = time.monotonic()
    if not examples:
        raise PrelortError(f"client {assignment.client!r} has no training examples")
    seed, client, index = assignment.seed, assignment.client, assignment.round_index
    steps = steps_per_round(len(examples), config)
    optimizer, scheduler = _optimizer(model, config, steps, assignment)
    draws = torch_generator(seed, "truncations", client, index)
    order = batches(len(examples), config, round_index=index, seed=seed, client=client)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    device = parameters[0].device
    losses: list[float] = []
    model.train()
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    fast = truncation.fused(model) if fused else nullcontext()
    with fast, seeded(derive(seed, "dropout", client, index), model, device):
        for step in range(steps):
            chosen = [next(order) for _ in range(config.gradient_accumulation)]
            micro = [task.collate([examples[i] for i in batch], pad_id) for batch in chosen]
            weight = max(1, sum(task.weight(batch) for batch in micro))
            loss = torch.zeros((), device=device)
            for batch in micro:
                moved = {name: tensor.to(device) for name, tensor in batch.items()}
                for part in assignment.objective.passes(len(batch["input_ids"]), draws):
                    with truncation.at(part.ranks, _shape(moved)), precision(config, device):
                        share = task.losses(model, moved).sum() * (part.weight / weight)
                        share.backward()  # type: ignore[no-untyped-call]
                    loss += share.detach()
                    del share  # with its graph, before the next forward pass makes another
            if assignment.objective.tail is not None:
                tail, rank = assignment.objective.tail, assignment.objective.levels[-1]
                penalty = tail_penalty(pairs(model), tail, rank) * tail.weight
                penalty.backward()  # type: ignore[no-untyped-call]
            losses.append(float(loss))
            if not math.isfinite(losses[-1]):
                raise diverged(losses[-1], step, steps, config)
            if config.max_grad_norm > 0:
                nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad(set_to_none=True)
            check_time(assignment, time.monotonic() - started, step, steps)
    return TrainResult(sum(losses) / len(losses), steps, time.monotonic() - started)


def diverged(loss: float, step: int, steps: int, config: TrainingConfig) -> PrelortError:
    """What is said of a loss that is no longer a number, at this step (from 0)."""
    return PrelortError(
        f"the loss became {loss} at local step {step + 1} of {steps} "
        f"(training.learning_rate = {config.learning_rate:g}): lower the rate"
    )


def check_time(assignment: Assignment, seconds: float, step: int, steps: int) -> None:
    """Raise `PrelortError` if a client has taken too long, or nobody waits for it any more."""
    if seconds > assignment.timeout:
        raise PrelortError(
            f"timed out after {assignment.timeout:g} s at local step {step + 1} of {steps}"
        )
    if assignment.stopped():
        raise PrelortError(f"was called off at local step {step + 1} of {steps}")


def _optimizer(
    model: nn.Module, config: TrainingConfig, steps: int, assignment: Assignment
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """A fresh optimiser, at the place in the run's schedule where this round begins."""
    factors, modules_to_save = trainable(model)
    groups = [{"params": factors, "lr": config.learning_rate}]
    if modules_to_save:
        groups.append(
            {"params": modules_to_save, "lr": config.head_learning_rate or config.learning_rate}
        )
    optimizer: torch.optim.Optimizer
    if config.optimizer == "adamw":
        optimizer = torch.optim.AdamW(groups, weight_decay=config.weight_decay)
    else:
        optimizer = torch.optim.SGD(
            groups,
            lr=config.learning_rate,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        )
    return optimizer, scheduled(optimizer, config, steps, assignment)


def scheduled(
    optimizer: torch.optim.Optimizer, config: TrainingConfig, steps: int, assignment: Assignment
) -> torch.optim.lr_scheduler.LRScheduler:
    """The run's schedule of the rates, at the place where this round of ``steps`` begins."""
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    total = steps * assignment.rounds
    warmup = round(config.warmup * total)
    done = assignment.round_index * steps - 1
    schedule: torch.optim.lr_scheduler.LRScheduler
    if config.schedule == "cosine":
        schedule = get_cosine_schedule_with_warmup(optimizer, warmup, total, 0.5, done)
    elif config.schedule == "linear":
        schedule = get_linear_schedule_with_warmup(optimizer, warmup, total, done)
    else:
        schedule = get_constant_schedule_with_warmup(optimizer, warmup, done)
    return schedule


def precision(config: TrainingConfig, device: torch.device) -> AbstractContextManager[object]:
    """The configured autocast of the forward pass."""
    if config.precision == "bfloat16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


def _shape(batch: Batch) -> tuple[int, int]:
    rows, length = batch["input_ids"].shape
    return rows, length


def draws(model: nn.Module) -> bool:
    """Whether training the model drops anything at random, as far as can be seen from outside."""
    if any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules()):
        return True
    config = getattr(model, "config", None)
    settings = vars(config) if isinstance(config, PretrainedConfig) else {}
    return any(
        isinstance(value, float) and value > 0
        for key, value in settings.items()
        if "drop" in key  # attention_dropout, resid_pdrop, ... are read by functions
    )


@contextmanager
def seeded(seed: int, model: nn.Module, device: torch.device) -> Iterator[None]:
    """Dropout drawn from ``seed``, the global generators left as they were.

    Where other threads may be training and nothing is drawn they are not touched at all.
    """
    if threading.current_thread() is not threading.main_thread() and not draws(model):
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
