"""The memory that a client's real round takes, to compare with its estimate."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import torch
from torch.profiler import ProfilerActivity, profile

from prelort import methods, tasks
from prelort.adapters import ScaleRule
from prelort.config import Config
from prelort.data import ranks
from prelort.methods.interface import Client, ServerState
from prelort.models.base import load_model
from prelort.models.lora import attach, initial_adapter, install
from prelort.planning.rehearsal import storage_bytes, tensors_of
from prelort.tasks.interface import Example
from prelort.training.local import train
from prelort.training.runtime import ModelRuntime
from prelort.training.settings import LocalTraining
from prelort.training.steps import Assignment
from prelort.training.truncation import Truncation


def allocated_peak(work: Callable[[], object]) -> int:
    """The peak of the bytes that ``work`` allocates on the CPU.

    Every allocation and release of torch's allocator counts, also inside kernels.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = profiler.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    in_order: list[int] = [change for _, change in sorted(changes, key=lambda pair: pair[0])]
    return max(accumulate(in_order, initial=0))


def measured_peak(
    config: Config,
    rank: int,
    labels: int = 2,
    peak: Callable[[Callable[[], object]], int] = allocated_peak,
) -> int:
    """The peak memory of a real round of a client of this rank, in bytes.

    The base model is loaded and trained on full batches of synthetic tokens, every other row a
    token shorter. The model is counted by its storages (on a GPU by what it adds), training by
    ``peak``.
    """
    task = tasks.get(config.task)
    names = [str(label) for label in range(labels)] if task.kind == "classification" else []
    on_gpu = config.model.device == "cuda"
    before = torch.cuda.memory_allocated() if on_gpu else 0
    model = load_model(config.model, task.kind, names, pad_id=0)
    levels = sorted({*ranks.levels(config.ranks.mix), rank})
    wrapped = attach(model, config.lora, levels[-1], task.kind)
    scale = ScaleRule(config.lora.scale_rule, config.lora.scale)
    method = methods.build(config.method, config.seed)
    client = Client("measured", rank, 1)
    state = ServerState(initial_adapter(wrapped, scale, config.seed), levels=tuple(levels))
    sent = method.broadcast(state, client)
    install(
        wrapped,
        sent.trainable,
        frozen=sent.frozen,
        trains=sent.trains,
        scale_multiplier=sent.scale_multiplier,
    )
    runtime = ModelRuntime(wrapped, Truncation(wrapped, scale), task, pad_id=0)
    training = config.training.model_copy(update={"local_steps": 3})
    count = 3 * training.batch_size * training.gradient_accumulation
    vocabulary = int(model.config.get_text_config().vocab_size)
    examples = [_example(row, config, vocabulary, task.kind) for row in range(count)]
    assignment = Assignment(client.name, 0, 1, config.seed, method.objective(state, client))
    if on_gpu:  # with the scales of quantised weights
        torch.cuda.empty_cache()
        present = torch.cuda.memory_allocated() - before
    else:
        present = storage_bytes(tensors_of(wrapped))
    return present + peak(lambda: train(runtime, examples, LocalTraining.of(training), assignment))


def _example(row: int, config: Config, vocabulary: int, kind: str) -> Example:
    length = config.data.max_length - row % 2
    ids = [1 + (7 * position + row) % (vocabulary - 1) for position in range(length)]
    return Example(ids, 0 if kind == "classification" else ids)
