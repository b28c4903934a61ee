"""What a task is: how rows become examples, how a batch becomes a loss, what is measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from datasets import Dataset

from prelort.config import DataConfig

Batch = dict[str, torch.Tensor]
"""``input_ids``, ``attention_mask`` [batch, length] and ``labels`` ([batch, length] or [batch])."""

IGNORED = -100
"""The label of a token that is not learnt (prompt and padding)."""


@dataclass(frozen=True, slots=True)
class Example:
    """One encoded example.

    ``labels`` has one entry per token (causal tasks, `IGNORED` where nothing is learnt) or is the
    class's number. ``reference`` is the text that a generation is compared with, and
    ``prompt_length`` the number of tokens to generate from; both only where the task generates.
    """

    input_ids: list[int]
    labels: list[int] | int
    prompt_length: int = 0
    reference: str = ""


class Task(Protocol):
    """A kind of training; one file each in `prelort.tasks`."""

    name: str
    kind: Literal["causal", "classification"]
    metrics: tuple[str, ...]
    """Measured by default."""
    allowed_metrics: tuple[str, ...]

    def columns(self, config: DataConfig, available: Sequence[str]) -> tuple[str, ...]:
        """The columns read, found among ``available``; raises `ConfigError` naming what is not."""
        ...

    def check(self, rows: Dataset, config: DataConfig, where: str) -> None:
        """Raise `ConfigError` naming the first row, from 1, of ``where`` that cannot be read."""
        ...

    def encode(
        self, rows: Dataset, tokenizer: Any, config: DataConfig, labels: Sequence[str]
    ) -> list[Example]:
        """Tokenise one client's rows; ``labels`` are the class names in order (classification)."""
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
        """The losses with what was predicted.

        That is the classes' logits (float32 [batch, classes]), or the token that is most likely
        after each place (int64 [batch, length]).
        """
        ...
