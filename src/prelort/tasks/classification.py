"""Sequence classification: one class a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from datasets import Dataset

from prelort.config import DataConfig
from prelort.errors import ConfigError
from prelort.tasks._batches import attention_mask, pad_right
from prelort.tasks.columns import class_names, find, require_texts, texts
from prelort.tasks.interface import Batch, Example

TEXT_COLUMNS = (
    "text",
    "sentence",
    "query",
    "question",
    "utterance",
    "content",
    "review",
    "document",
    "title",
)
LABEL_COLUMNS = ("label", "labels", "category", "intent", "class", "topic", "target", "sentiment")


class Classification:
    """Cross entropy of the class, on the logits of a sequence-classification model."""

    name = "classification"
    kind: Literal["causal", "classification"] = "classification"
    metrics: tuple[str, ...] = ("accuracy", "macro_f1")
    allowed_metrics: tuple[str, ...] = ("accuracy", "macro_f1")

    def columns(self, config: DataConfig, available: Sequence[str]) -> tuple[str, ...]:
        """The text column and the label column; raises `ConfigError` if one is missing."""
        text = find("data.text_column", config.text_column, TEXT_COLUMNS, available)
        label = find("data.label_column", config.label_column, LABEL_COLUMNS, available)
        return text, label

    def check(self, rows: Dataset, config: DataConfig, where: str) -> None:
        """Raise `ConfigError` naming the first row of ``where`` whose cells are no text."""
        require_texts(rows, self.columns(config, rows.column_names), where)

    def encode(
        self, rows: Dataset, tokenizer: Any, config: DataConfig, labels: Sequence[str]
    ) -> list[Example]:
        """One example a row, with the tokenizer's special tokens, cut to ``max_length``.

        A text without any token becomes one special token. Raises `ConfigError` for a label that is
        not in ``labels``.
        """
        if len(rows) == 0:
            return []
        text_column, label_column = self.columns(config, rows.column_names)
        numbers = {name: number for number, name in enumerate(labels)}
        encoded = tokenizer(
            texts(rows, text_column),
            truncation=True,
            max_length=config.max_length,
            padding=False,
            return_attention_mask=False,
            return_token_type_ids=False,
        )
        classes = class_names(rows, label_column, "data")
        for name in classes:
            if name not in numbers:
                raise ConfigError(f"the label {name!r} is not among those of the training rows")
        special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
        empty = [token for token in special if token is not None][:1]
        return [
            Example(ids or empty, numbers[name])
            for ids, name in zip(encoded["input_ids"], classes, strict=True)
        ]

    def collate(self, examples: Sequence[Example], pad_id: int) -> Batch:
        """``input_ids`` and ``attention_mask`` [batch, longest], ``labels`` [batch], int64."""
        return {
            "input_ids": pad_right([e.input_ids for e in examples], pad_id),
            "attention_mask": attention_mask([len(e.input_ids) for e in examples]),
            "labels": torch.tensor([e.labels for e in examples]),
        }

    def weight(self, batch: Batch) -> int:
        """The number of examples."""
        return len(batch["labels"])

    def losses(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """Each example's cross entropy of the classes in nats (float32 [batch])."""
        return self.scores(model, batch)[0]

    def scores(self, model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """The same, and the logits (float32 [batch, classes])."""
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        logits = logits.float()
        return F.cross_entropy(logits, batch["labels"], reduction="none"), logits
