"""A client's batches: which examples, as a function of the seed alone, and their passes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prelort.config import TrainingConfig
from prelort.seeds import torch_generator
from prelort.tasks.interface import Batch, Example
from prelort.training.settings import LocalTraining


@dataclass(frozen=True, slots=True)
class ForwardPass:
    """One forward and backward pass of one client.

    ``ranks``: the truncation, as in `methods.objective.Pass`. ``weight``: of the sum of the losses,
    or float32 [rows] of each row's loss.
    """

    examples: Sequence[Example]
    batch: Batch
    ranks: int | Tensor | None
    weight: float | Tensor


def micro_batches_per_epoch(examples: int, settings: LocalTraining | TrainingConfig) -> int:
    """Number of batches that cover a client's examples once."""
    return math.ceil(examples / settings.batch_size)


def batches_per_round(examples: int, settings: LocalTraining | TrainingConfig) -> int:
    """Batches that a client trains on in one round (at least 1)."""
    if settings.local_steps > 0:
        return settings.local_steps * settings.gradient_accumulation
    return max(1, round(micro_batches_per_epoch(examples, settings) * settings.local_epochs))


def steps_per_round(examples: int, settings: LocalTraining) -> int:
    """Optimiser steps that a client takes in one round, the last perhaps of fewer batches."""
    return math.ceil(batches_per_round(examples, settings) / settings.gradient_accumulation)


def batches(
    examples: int, settings: LocalTraining, *, round_index: int, seed: int, client: str
) -> Iterator[list[int]]:
    """Indices of the batches of one round, `batches_per_round` lists.

    The order of the examples changes each epoch. An epoch that is not finished continues in the
    next round: the position follows from ``round_index`` (from 0), so no state is kept between
    rounds. The last batch of an epoch may be smaller.
    """
    per_round = batches_per_round(examples, settings)
    per_epoch = micro_batches_per_epoch(examples, settings)
    order: list[int] = []
    current = -1
    for position in range(round_index * per_round, (round_index + 1) * per_round):
        epoch, batch = divmod(position, per_epoch)
        if epoch != current:
            order, current = _order(examples, settings.shuffle, seed, client, epoch), epoch
        yield order[batch * settings.batch_size : (batch + 1) * settings.batch_size]


def _order(examples: int, shuffle: bool, seed: int, client: str, epoch: int) -> list[int]:
    if not shuffle:
        return list(range(examples))
    generator = torch_generator(seed, "batches", client, epoch)
    permutation: list[int] = torch.randperm(examples, generator=generator).tolist()
    return permutation
