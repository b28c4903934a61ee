"""The learning rate over the whole run: a pure function of the step."""

from __future__ import annotations

import math

from prelort.training.settings import LocalTraining


def rate_multiplier(settings: LocalTraining, step: int, total: int) -> float:
    """By what the learning rate is multiplied at ``step`` (from 0) of a run of ``total`` steps.

    The same as transformers' schedules: a linear warm-up over the share ``warmup`` of the run,
    then constant, linear to 0, or half a cosine to 0.
    """
    warmup = round(settings.warmup * total)
    if step < warmup:
        return step / warmup
    if settings.schedule == "constant":
        return 1.0
    decay = max(1, total - warmup)
    if settings.schedule == "linear":
        return max(0.0, (total - step) / decay)
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / decay)))
