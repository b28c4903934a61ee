"""Training one client in a round: optimiser steps on its own examples.

A plain loop instead of `transformers.Trainer`: the nested objective needs several weighted passes a
step, and building a Trainer for every client and round costs more than a tiny model's steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import chain

import torch
from torch import Tensor

from prelort.models.lora import trainable
from prelort.privacy.example import NoisyGradients
from prelort.seeds import derive
from prelort.tasks.interface import Example
from prelort.training.batches import ForwardPass
from prelort.training.optimizer import LocalOptimizer
from prelort.training.private import PrivateSteps, secret_seed
from prelort.training.runtime import ModelRuntime
from prelort.training.settings import LocalTraining
from prelort.training.steps import (
    Assignment,
    LocalSteps,
    TrainResult,
    precision,
    training_mode,
)
from prelort.training.tail import pairs, tail_penalty


def train(
    runtime: ModelRuntime,
    examples: Sequence[Example],
    settings: LocalTraining,
    assignment: Assignment,
    *,
    fused: bool = True,
    noise: NoisyGradients | None = None,
) -> TrainResult:
    """Train the installed adapter in place, deterministically for equal arguments.

    The optimiser starts fresh and its state is discarded. Without ``fused`` the LoRA layers compute
    as PEFT does: slower, and equal up to rounding. With ``noise`` the examples of each step are
    drawn, their gradients clipped and noisy (`prelort.training.private`), neither of which comes
    from the seed, and the losses are not computed. A model that cannot truncate each example by
    itself trains under the objective ``step`` in place of ``example``, as the check before training
    has said, and never with all truncations of a batch in one pass. Raises `PrelortError` for a
    client without examples, and if the loss is no longer finite, the time is up or the client was
    cancelled.
    """
    model = runtime.model
    by_example = assignment.objective.kind == "example"
    if noise is None and (by_example or settings.batch_truncations) and not runtime.by_example():
        settings = replace(settings, batch_truncations=False)
        if by_example:
            assignment = replace(assignment, objective=replace(assignment.objective, kind="step"))
    if settings.packing:
        runtime.check_packing()
    private: PrivateSteps | None = None
    if noise is not None:
        private = PrivateSteps(runtime, examples, settings, assignment, noise)
    steps = private or LocalSteps(examples, settings, assignment)
    learning = trainable(model)
    optimizer = LocalOptimizer(*learning, settings)
    processes = runtime.processes
    collate = partial(runtime.collate, packing=settings.packing)
    objective = assignment.objective
    seed = derive(assignment.seed, "dropout", assignment.client, assignment.round_index)
    if processes.index > 0:  # other rows, other masks
        seed = derive(seed, processes.index)
    layers = runtime.truncation.fused(model) if fused else nullcontext()
    if private is not None:
        layers, seed = private.gradients.installed(), secret_seed()
    with layers, training_mode(model, settings, seed):
        for _ in range(steps.count):
            loss = torch.zeros((), device=runtime.device)
            if private is not None:
                private.backward()
            else:
                for part in chain.from_iterable(steps.next(runtime)):
                    loss += _backward(runtime, processes.rows(part, collate), settings)
            loss, over = processes.all_reduce([*chain(*learning)], loss, steps.over)
            if objective.tail is not None:
                penalty = tail_penalty(pairs(model), objective.tail, objective.levels[-1])
                (penalty * objective.tail.weight).backward()  # type: ignore[no-untyped-call]
            steps.record(float(loss))
            optimizer.step(steps.rate_multiplier())
            if over:
                steps.give_up()
    return steps.result()


def _backward(runtime: ModelRuntime, part: ForwardPass, settings: LocalTraining) -> Tensor:
    """Add the gradients of one pass to the parameters'; its weighted loss."""
    device = runtime.device
    batch = {name: tensor.to(device) for name, tensor in part.batch.items()}
    rows, length = batch["input_ids"].shape
    ranks = part.ranks
    if isinstance(ranks, Tensor) and settings.packing:
        ranks = ranks.to(device)[batch["example"]]
    with runtime.truncation.at(ranks, (rows, length)), precision(settings, device):
        losses = runtime.task.losses(runtime.model, batch)
        if isinstance(part.weight, Tensor):
            loss = (losses * part.weight.to(device)).sum()
        else:
            loss = losses.sum() * part.weight
        loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach()
