"""A model to train and to evaluate: the base with an exchangeable adapter, and its task."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import nn
from transformers import EvalPrediction, PreTrainedTokenizerBase

from prelort.errors import ConfigError
from prelort.tasks.interface import Example, Task
from prelort.training.processes import ALONE, Processes
from prelort.training.truncation import Truncation

ComputeMetrics = Callable[[EvalPrediction], Mapping[str, float]]
"""From predictions and labels to the values of metrics by their names."""


@dataclass(frozen=True, slots=True)
class ModelRuntime:
    """The base model with LoRA layers, their truncation, and how the task sees its batches.

    ``tokenizer`` is needed only where text is generated. ``compute_metrics``: own metrics, as in
    transformers' Trainer (`prelort.metrics.evaluate`). ``processes``: those that train a client
    together, each with such a model. One thread may use it at a time.
    """

    model: PeftModel
    truncation: Truncation
    task: Task
    pad_id: int
    tokenizer: PreTrainedTokenizerBase | None = None
    compute_metrics: ComputeMetrics | None = None
    processes: Processes = ALONE

    @property
    def device(self) -> torch.device:
        """Where the model's weights are."""
        device: torch.device = next(self.model.parameters()).device
        return device

    def by_example(self) -> bool:
        """Whether each example of a batch can have its own truncation, and its own adapter.

        Not where the rows of a layer are not those of the batch: DeBERTa's relative positions, and
        XLNet, whose batch comes second. Tried once, with 3 rows of 5 tokens.
        """
        if self.truncation.by_example is None:
            end = self.model.config.eos_token_id
            ids = [end if isinstance(end, int) else 0] * 5  # an encoder-decoder reads its end token
            labels = 0 if self.task.kind == "classification" else ids
            batch = self.task.collate([Example(ids, labels)] * 3, self.pad_id)
            batch = {key: value.to(self.device) for key, value in batch.items()}
            ranks = torch.ones(3, dtype=torch.int64, device=self.device)
            with torch.no_grad(), evaluation_mode(self.model), self.truncation.at(ranks, (3, 5)):
                try:
                    self.task.losses(self.model, batch)
                    self.truncation.by_example = True
                except ConfigError:
                    self.truncation.by_example = False
        return self.truncation.by_example


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
