"""Several threads of one process that train clients side by side, each with a model of its own.

On a CPU this pays, since one client leaves cores idle within and between its operations; with tiny
batches it does not, since most of their time is Python's, which runs in one thread at a time. The
models share the base's weights, so another thread costs the memory of one client's training. Each
client gets the same bits as it would alone, also with dropout (`training.dropout`).
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from queue import SimpleQueue

from torch import nn

from prelort.config import Config
from prelort.federation.client import ClientRuntime

LEAST_WORK = 2**15
"""Minimum size of a batch's hidden states for which several threads pay."""


def default_threads(config: Config, model: nn.Module) -> int:
    """The number of clients to train at once by default: one for each set of cores.

    One on a GPU, where ``threads`` is not set, so that torch itself uses all cores, and for tiny
    batches.
    """
    if config.threads is None or next(model.parameters()).device.type != "cpu":
        return 1
    width = getattr(getattr(model, "config", None), "hidden_size", None)
    if width and config.training.batch_size * config.data.max_length * width < LEAST_WORK:
        return 1
    return max(1, (os.cpu_count() or 1) // config.threads)


def replica(runtime: ClientRuntime) -> ClientRuntime:
    """The runtime with a model of its own that shares the base's weights."""
    shared = {id(p): p for p in runtime.model.parameters() if not p.requires_grad}
    # Both at once: the truncation's hooks in the copied model must be the copied truncation's.
    model, truncation = copy.deepcopy((runtime.model, runtime.truncation), shared)
    return replace(runtime, model=model, truncation=truncation)


class RuntimePool:
    """Runtimes, each used by one thread at a time."""

    def __init__(self, runtimes: Sequence[ClientRuntime]) -> None:
        self._free: SimpleQueue[ClientRuntime] = SimpleQueue()
        for runtime in runtimes:
            self._free.put(runtime)

    @contextmanager
    def one(self) -> Iterator[ClientRuntime]:
        """A runtime that no other thread uses; waits for one."""
        runtime = self._free.get()
        try:
            yield runtime
        finally:
            self._free.put(runtime)
