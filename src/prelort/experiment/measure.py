"""Measuring the global adapter at every rank, and the untuned base."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial

import torch

from prelort.adapters import LoraAdapter
from prelort.config import Config
from prelort.events import Metrics
from prelort.experiment.workers import RuntimePool
from prelort.federation.client import ClientRuntime
from prelort.federation.in_process import worker_threads
from prelort.metrics.evaluate import AtRanks, EvaluationSettings, evaluate, ranks_at_once
from prelort.models.lora import install
from prelort.tasks.interface import Example
from prelort.training.adapter_stack import AdapterStack, stackable

Progress = Callable[[int, int], None]
"""Called with the number of steps done and of all steps."""


def measure(
    config: Config,
    runtimes: Sequence[ClientRuntime],
    examples: Sequence[Example],
    adapters: Mapping[int, LoraAdapter],
    progress: Progress | None = None,
    at_once: int | None = None,
) -> dict[int, Metrics]:
    """Rank -> the configured metrics of its adapter on the examples.

    Rank 0 is the base: its adapter's modules to save count, its factors do not. ``at_once``: number
    of adapters that share a forward pass; default: what the device is best at. With one each
    runtime measures adapters in a thread of its own.
    """
    if not adapters:
        return {}
    evaluation, runtime = config.evaluation, runtimes[0]
    settings = EvaluationSettings(
        metrics=evaluation.metrics or runtime.task.metrics,
        batch_size=evaluation.batch_size,
        max_new_tokens=evaluation.max_new_tokens,
        max_generated=evaluation.max_generated,
    )
    if at_once is None:
        at_once = ranks_at_once(runtime.model.device)
    if at_once > 1:
        install(runtime.model, next(iter(adapters.values())))  # removes a folded adapter
        if stackable(runtime):
            stack = AdapterStack(runtime.model, runtime.truncation, list(adapters.values()))
            with stack.installed():
                return evaluate(
                    runtime, examples, list(adapters), _stacked(stack, adapters), settings,
                    progress=progress, at_once=at_once,
                )  # fmt: skip
    progress_of = _partial_progress(progress, len(adapters))
    pool = RuntimePool(runtimes)

    def at_rank(rank: int) -> dict[int, Metrics]:
        with pool.one() as own:
            install(own.model, adapters[rank])
            with own.truncation.fused(own.model):
                alone = _alone(own, rank)
                part = progress_of(rank)
                return evaluate(own, examples, [rank], alone, settings, progress=part)

    if len(runtimes) == 1:
        results = [at_rank(rank) for rank in adapters]
    else:
        with worker_threads(len(runtimes), "measure") as threads:
            results = list(threads.map(at_rank, adapters))
    return {rank: metrics for result in results for rank, metrics in result.items()}


def _alone(runtime: ClientRuntime, rank: int) -> AtRanks:
    """The installed adapter, or the base without its factors."""

    def at_ranks(part: Sequence[int], rows: int, length: int) -> AbstractContextManager[None]:
        return runtime.truncation.at(0 if rank == 0 else None)

    return at_ranks


def _stacked(stack: AdapterStack, adapters: Mapping[int, LoraAdapter]) -> AtRanks:
    """Each part of a batch through its adapter of the stack."""
    ranks = list(adapters)

    def at_ranks(part: Sequence[int], rows: int, length: int) -> AbstractContextManager[None]:
        truncations = torch.tensor([0 if rank == 0 else adapters[rank].rank for rank in part])
        owners = [ranks.index(rank) for rank in part]
        return stack.rows(owners, truncations.repeat_interleave(rows), length)

    return at_ranks


def _partial_progress(progress: Progress | None, parts: int) -> Callable[[int], Progress]:
    """A function from the index of one of several equal parts to its share of ``progress``."""
    done: dict[int, int] = {}
    lock = threading.Lock()

    def add(part: int, finished: int, total: int) -> None:
        with lock:
            done[part] = finished
            if progress is not None:
                progress(sum(done.values()), parts * total)

    return lambda part: partial(add, part)
