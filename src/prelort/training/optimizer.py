"""The optimiser of one client, and its learning rate over the whole run."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from prelort.errors import ConfigError
from prelort.training.directions import UnitDirections
from prelort.training.settings import LocalTraining


def rate_multiplier(settings: LocalTraining, step: int, total: int) -> float:
    """The factor of the learning rate at ``step`` (from 0) of a run of ``total`` steps.

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


class LocalOptimizer:
    """A fresh optimiser of the factors that learn and of the modules trained in full.

    B learns at ``b_rate_ratio`` times the rate of A (LoRA+, Hayou et al., arXiv 2402.12354, whose
    ratio is lambda = eta_B / eta_A). With a ``magnitude_rate_ratio`` the factors are trained as
    `UnitDirections`.

    Raises `ConfigError` for one that needs bitsandbytes where it is not installed.
    """

    def __init__(
        self,
        a: Iterable[nn.Parameter],
        b: Iterable[nn.Parameter],
        modules_to_save: Iterable[nn.Parameter],
        settings: LocalTraining,
    ) -> None:
        kinds = [list(a), list(b), list(modules_to_save)]
        rate = settings.learning_rate
        rates = [rate, rate * settings.b_rate_ratio, settings.head_learning_rate]
        self._directions: UnitDirections | None = None
        if settings.magnitude_rate_ratio is not None:
            self._directions = own = UnitDirections(*kinds[:2])
            kinds = [own.rows, own.columns, kinds[2], own.magnitudes]
            rates.append(rate * settings.magnitude_rate_ratio)
        groups = [
            {"params": parameters, "base_rate": rate}
            for parameters, rate in zip(kinds, rates, strict=True)
            if parameters
        ]
        decay = settings.weight_decay
        self._optimizer: torch.optim.Optimizer
        if settings.optimizer == "adamw":
            self._optimizer = torch.optim.AdamW(groups, weight_decay=decay)
        elif settings.optimizer == "sgd":
            self._optimizer = torch.optim.SGD(
                groups, momentum=settings.momentum, weight_decay=decay
            )
        else:
            self._optimizer = _in_8_bits(settings.optimizer, groups, decay)
        self._parameters = [parameter for parameters in kinds for parameter in parameters]
        self._max_grad_norm = settings.max_grad_norm

    def step(self, multiplier: float) -> None:
        """Clip the gradient, move the parameters at their rates times ``multiplier``."""
        if self._directions is not None:
            self._directions.take_gradients()
        if self._max_grad_norm > 0:
            nn.utils.clip_grad_norm_(self._parameters, self._max_grad_norm)
        for group in self._optimizer.param_groups:
            group["lr"] = group["base_rate"] * multiplier
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        if self._directions is not None:
            self._directions.write_factors()


def _in_8_bits(name: str, groups: list[dict[str, Any]], decay: float) -> torch.optim.Optimizer:
    """AdamW of bitsandbytes, which keeps small tensors in float32."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"training.optimizer = {name!r} needs bitsandbytes: pip install 'prelort[quantised]'"
        )
    # Not paged: bitsandbytes never frees paged states, and each client has a fresh optimiser.
    kind: Any = importlib.import_module("bitsandbytes.optim").AdamW8bit
    optimizer: torch.optim.Optimizer = kind(groups, weight_decay=decay)
    return optimizer
