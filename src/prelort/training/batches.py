"""Which examples a client trains on at each of its steps, as a function of the seed alone."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from prelort.config import TrainingConfig
from prelort.seeds import torch_generator


def micro_batches_per_epoch(examples: int, config: TrainingConfig) -> int:
    """How many batches cover a client's examples once."""
    return math.ceil(examples / config.batch_size)


def steps_per_round(examples: int, config: TrainingConfig) -> int:
    """Optimiser steps that a client takes in one round (at least 1)."""
    if config.local_steps > 0:
        return config.local_steps
    batches = micro_batches_per_epoch(examples, config) * config.local_epochs
    return max(1, round(batches / config.gradient_accumulation))


def batches(
    examples: int, config: TrainingConfig, *, round_index: int, seed: int, client: str
) -> Iterator[list[int]]:
    """Indices of the batches of one round, ``steps * gradient_accumulation`` lists.

    A client goes through its data in a new order each epoch. Where an epoch ends inside a round
    the next round goes on from there: the position follows from ``round_index`` (from 0), so that
    nothing has to be remembered between rounds. The last batch of an epoch may be smaller.
    """
    per_round = steps_per_round(examples, config) * config.gradient_accumulation
    per_epoch = micro_batches_per_epoch(examples, config)
    order: list[int] = []
    current = -1
    for position in range(round_index * per_round, (round_index + 1) * per_round):
        epoch, batch = divmod(position, per_epoch)
        if epoch != current:
            order, current = _order(examples, config.shuffle, seed, client, epoch), epoch
        yield order[batch * config.batch_size : (batch + 1) * config.batch_size]


def _order(examples: int, shuffle: bool, seed: int, client: str, epoch: int) -> list[int]:
    if not shuffle:
        return list(range(examples))
    generator = torch_generator(seed, "batches", client, epoch)
    permutation: list[int] = torch.randperm(examples, generator=generator).tolist()
    return permutation
