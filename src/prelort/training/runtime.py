"""A model to train and to evaluate: the base with an exchangeable adapter, and its task."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import nn
from transformers import EvalPrediction, PreTrainedTokenizerBase

from prelort.tasks.interface import Task
from prelort.training.truncation import Truncation

ComputeMetrics = Callable[[EvalPrediction], Mapping[str, float]]
"""From predictions and labels to the values of metrics by their names."""


@dataclass(frozen=True, slots=True)
class ModelRuntime:
    """The base model with LoRA layers, their truncation, and how the task sees its batches.

    ``tokenizer`` is needed only where text is generated. ``compute_metrics``: own metrics, as in
    transformers' Trainer (`prelort.metrics.evaluate`). One thread may use it at a time.
    """

    model: PeftModel
    truncation: Truncation
    task: Task
    pad_id: int
    tokenizer: PreTrainedTokenizerBase | None = None
    compute_metrics: ComputeMetrics | None = None

    @property
    def device(self) -> torch.device:
        """Where the model's weights are."""
        device: torch.device = next(self.model.parameters()).device
        return device


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards every module is back in the mode that it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
