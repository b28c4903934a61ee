"""Several threads of one process that train clients side by side, each with a model of its own.

On a CPU this is what pays: a client alone leaves cores idle within and between its operations. Not
so for tiny batches, most of whose time is Python's, of which one thread at a time can make use. A
thread's model shares the base's weights with all others, so that a further one costs the memory of
one client's training. Each client's numbers are those that it would have alone, bit for bit.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from queue import SimpleQueue

import torch
from torch import nn

from prelort.config import Config
from prelort.federation.client import ClientRuntime
from prelort.training.local import draws

LEAST_WORK = 2**15
"""Numbers in a batch's hidden states from which on a thread of one's own pays."""


def default_threads(config: Config, model: nn.Module) -> int:
    """How many clients to train at once where nobody says: one for each set of cores.

    One where training draws at random (dropout: torch has one generator for all threads), on a
    GPU, where ``threads`` is not set, so that torch itself uses all cores, and for tiny batches.
    """
    if config.threads is None or draws(model) or _device(model).type != "cpu":
        return 1
    width = getattr(getattr(model, "config", None), "hidden_size", None)
    if width and config.training.batch_size * config.data.max_length * width < LEAST_WORK:
        return 1
    return max(1, (os.cpu_count() or 1) // config.threads)


def replica(work: ClientRuntime) -> ClientRuntime:
    """The same with a model of its own that shares the base's weights."""
    shared = {id(p): p for p in work.model.parameters() if not p.requires_grad}
    # Both at once: the truncation's hooks in the copied model must be the copied truncation's.
    model, truncation = copy.deepcopy((work.model, work.truncation), shared)
    return replace(work, model=model, truncation=truncation)


class RuntimePool:
    """Workspaces of which each is used by one thread at a time."""

    def __init__(self, all_of_them: Sequence[ClientRuntime]) -> None:
        self._free: SimpleQueue[ClientRuntime] = SimpleQueue()
        for work in all_of_them:
            self._free.put(work)

    @contextmanager
    def one(self) -> Iterator[ClientRuntime]:
        """A workspace for oneself; waits until there is one."""
        work = self._free.get()
        try:
            yield work
        finally:
            self._free.put(work)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
