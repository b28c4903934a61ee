"""What a task is: how rows become examples, how a batch becomes a loss, what is measured.

A task of one's own is a class named by ``task = "package.module:Class"``, or given to
`prelort.Federation`. Derive it from one in `prelort.tasks` and write only what differs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from datasets import Dataset
from transformers import EvalPrediction

from prelort.config import DataConfig
from prelort.errors import ConfigError
from prelort.extensions import calling

Batch = dict[str, torch.Tensor]
"""``input_ids``, ``attention_mask`` [batch, length] and ``labels`` ([batch, length] or [batch])."""

IGNORED = -100
"""The label of a token that is not learnt (prompt and padding)."""


@dataclass(frozen=True, slots=True)
class Example:
    """One encoded example.

    ``labels`` has one entry per token (causal tasks, `IGNORED` where nothing is learnt), is the
    class's number, or what else the task's ``collate`` takes. ``reference`` is the text that a
    generation is compared with, and ``prompt_length`` the number of tokens to generate from; both
    only where the task generates.
    """

    input_ids: list[int]
    labels: Any
    prompt_length: int = 0
    reference: str = ""


class Task(Protocol):
    """A kind of training; one file each in `prelort.tasks`. Built without arguments."""

    name: str
    kind: Literal["causal", "classification"]
    """The model's head: of a causal language model, or with the outputs that `labels` names."""
    metrics: tuple[str, ...]
    """Measured besides the loss: perplexity, rouge_l (causal), accuracy, macro_f1 (a class for each
    example), and what `compute_metrics` returns."""

    def columns(self, config: DataConfig, available: Sequence[str]) -> tuple[str, ...]:
        """The columns read, found among ``available``; raises `ConfigError` naming what is not."""
        ...

    def labels(self, rows: Dataset, config: DataConfig) -> tuple[str, ...]:
        """The names of a classifier's outputs, in order, from all training rows; () if causal.

        The classes; one name for a regression. At real sites ``data.labels`` must be set instead.
        """
        ...

    def check(self, rows: Dataset, config: DataConfig, where: str) -> None:
        """Raise `ConfigError` naming the first row, from 1, of ``where`` that cannot be read.

        ``config.labels``: the classes that are allowed, where they are known.
        """
        ...

    def encode(
        self, rows: Dataset, tokenizer: Any, config: DataConfig, labels: Sequence[str]
    ) -> Iterable[Example]:
        """Tokenise some of one client's rows; ``labels`` are the names of the outputs."""
        ...

    def collate(self, examples: Sequence[Example], pad_id: int) -> Batch:
        """Pad examples on the right to a batch."""
        ...

    def weight(self, batch: Batch) -> int:
        """What the loss is averaged over: learnt tokens, or examples."""
        ...

    def losses(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """Each example's loss, summed over what `weight` counts of it (float32 [batch])."""
        ...

    def scores(self, model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """The same losses, and what was predicted.

        That is a classifier's outputs (float32 [batch, outputs]), or the token that is most likely
        after each place (int64 [batch, length]).
        """
        ...

    def compute_metrics(self, prediction: EvalPrediction) -> Mapping[str, float]:
        """The task's own ``metrics``, as in transformers' Trainer; called if it names some.

        ``predictions`` are those of `scores`. A name that ends in ``loss`` or ``error`` is better
        when lower.
        """
        ...


def built(kind: type, name: str) -> Task:
    """An object of a user's class. Raises `ConfigError` for wrong attributes."""
    with calling(f"task {name!r}", "its constructor"):
        task: Task = kind()
    if task.kind not in ("causal", "classification"):
        raise ConfigError(
            f"task {name!r}: kind = {task.kind!r} is not allowed: 'causal' or 'classification'"
        )
    metrics: object = task.metrics
    if not (isinstance(metrics, tuple) and metrics and all(isinstance(m, str) for m in metrics)):
        raise ConfigError(f"task {name!r}: metrics must be a tuple of names, not {metrics!r}")
    return task
