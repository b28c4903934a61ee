"""Measuring the global adapter at every rank, and the untuned base."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager

import torch

from prelort.adapters import LoraAdapter
from prelort.config import Config
from prelort.experiment.workers import RuntimePool
from prelort.federation.client import ClientRuntime
from prelort.federation.in_process import worker_threads
from prelort.metrics.evaluate import AtRanks, EvaluationSettings, evaluate, ranks_at_once
from prelort.models.lora import install
from prelort.tasks.interface import Example
from prelort.training.adapter_stack import AdapterStack, stackable

Measured = dict[int, dict[str, float]]
"""Rank (0: the base without the adapter's factors) -> metric -> value."""


def measure(
    config: Config,
    runtimes: Sequence[ClientRuntime],
    examples: Sequence[Example],
    adapters: Mapping[int, LoraAdapter],
    progress: Callable[[int, int], None] | None = None,
    at_once: int | None = None,
) -> Measured:
    """The configured metrics of each of ``adapters`` (by the rank they stand for) on examples.

    Rank 0 is the base: its adapter's modules to save count, its factors do not. ``at_once``: number
    of adapters that share a forward pass; default: what the device is best at. With one each
    runtime measures adapters in a thread of its own.
    """
    if not adapters:
        return {}
    work = runtimes[0]
    if at_once is None:
        at_once = ranks_at_once(work.model.device)
    if at_once > 1:
        install(work.model, next(iter(adapters.values())))  # what was folded in is taken out
        if stackable(work.model):
            stack = AdapterStack(work.model, work.truncation, list(adapters.values()))
            beside = _beside(stack, adapters)
            with stack.installed():
                return _measured(config, work, examples, list(adapters), beside, progress, at_once)
    tell = _summed(progress, len(adapters))
    free = RuntimePool(runtimes)

    def one(rank: int) -> Measured:
        with free.one() as own:
            install(own.model, adapters[rank])
            with own.truncation.fused(own.model):
                alone = _alone(own, rank)
                return _measured(config, own, examples, [rank], alone, tell(rank), 1)

    if len(runtimes) == 1:
        found = [one(rank) for rank in adapters]
    else:
        with worker_threads(len(runtimes), "measure") as pool:
            found = list(pool.map(one, adapters))
    return {rank: values for measured in found for rank, values in measured.items()}


def _alone(work: ClientRuntime, rank: int) -> AtRanks:
    def at_ranks(part: Sequence[int], rows: int, length: int) -> AbstractContextManager[None]:
        return work.truncation.at(0 if rank == 0 else None)

    return at_ranks


def _summed(
    progress: Callable[[int, int], None] | None, parts: int
) -> Callable[[int], Callable[[int, int], None]]:
    """For each part of the work a function that takes its progress and tells the whole's."""
    done: dict[int, int] = {}
    lock = threading.Lock()

    def of(part: int) -> Callable[[int, int], None]:
        def told(finished: int, total: int) -> None:
            with lock:
                done[part] = finished
                if progress is not None:
                    progress(sum(done.values()), parts * total)

        return told

    return of


def _beside(stack: AdapterStack, adapters: Mapping[int, LoraAdapter]) -> AtRanks:
    """Each part of a batch through its adapter of the stack."""
    ranks = list(adapters)

    def at_ranks(part: Sequence[int], rows: int, length: int) -> AbstractContextManager[None]:
        truncations = torch.tensor([0 if rank == 0 else adapters[rank].rank for rank in part])
        owners = [ranks.index(rank) for rank in part]
        return stack.rows(owners, truncations.repeat_interleave(rows), length)

    return at_ranks


def _measured(
    config: Config,
    work: ClientRuntime,
    examples: Sequence[Example],
    ranks: Sequence[int],
    at_ranks: AtRanks,
    progress: Callable[[int, int], None] | None,
    at_once: int,
) -> Measured:
    wanted = config.evaluation
    settings = EvaluationSettings(
        metrics=wanted.metrics or work.task.metrics,
        batch_size=wanted.batch_size,
        max_new_tokens=wanted.max_new_tokens,
        max_generated=wanted.max_generated,
    )
    return evaluate(work, examples, ranks, at_ranks, settings, progress=progress, at_once=at_once)
