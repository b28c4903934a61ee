"""How much a run has computed: its forward and backward passes, counted from its events."""

from __future__ import annotations

from collections.abc import Sequence

from prelort import methods
from prelort.adapters import LoraAdapter, ScaleRule
from prelort.config import Config
from prelort.methods.interface import Client, ServerState
from prelort.report.events import Event, settled, started


def passes(config: Config, events: Sequence[Event]) -> int:
    """Forward passes of a batch in training, each with its backward pass, of all replies so far.

    ``steps x gradient_accumulation x passes a batch``: 1 for most objectives, 2 for ``full+one``,
    as many as the client has rank levels for ``mean``. What clients computed whose reply did not
    come, evaluation, and what gradient checkpointing computes again do not count.
    """
    levels = [int(level) for level in started(events).get("levels", ())]
    replies = [event for event in settled(events) if event["event"] == "client_finished"]
    if not levels or not replies:
        return 0
    method = methods.build(config.method, config.seed)
    state = ServerState(LoraAdapter({}, ScaleRule()), levels=tuple(levels))
    a_step = {
        rank: method.objective(state, Client("", rank, 1)).passes_per_batch
        for rank in {int(event["rank"]) for event in replies}
    }
    steps = sum(int(event["steps"]) * a_step[int(event["rank"])] for event in replies)
    return steps * config.training.gradient_accumulation
