"""Sequence classification: one class a text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import EvalPrediction

from prelort.config import DataConfig
from prelort.errors import ConfigError
from prelort.tasks._batches import attention_mask, pad_right
from prelort.tasks.columns import class_names, class_order, find, require_texts, texts
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

    def columns(self, config: DataConfig, available: Sequence[str]) -> tuple[str, ...]:
        """The text column and the label column; raises `ConfigError` if one is missing."""
        text = find("data.text_column", config.text_column, TEXT_COLUMNS, available)
        label = find("data.label_column", config.label_column, LABEL_COLUMNS, available)
        if text == label:
            raise ConfigError(f"column {text!r} is both text and label: choose another of the two")
        return text, label

    def labels(self, rows: Dataset, config: DataConfig) -> tuple[str, ...]:
        """``data.labels``, or else the classes that occur; two or more."""
        column = self.columns(config, rows.column_names)[1]
        labels = config.labels or class_order(rows, column, "data.source")
        if len(labels) < 2:
            raise ConfigError(
                f"data.source has one class only, {labels[0]!r} in column {column!r}: "
                "classification needs two or more"
            )
        return labels

    def check(self, rows: Dataset, config: DataConfig, where: str) -> None:
        """Raise `ConfigError` naming the first row of ``where`` without a text or a known class."""
        columns = self.columns(config, rows.column_names)
        require_texts(rows, columns, where)
        for number, name in enumerate(class_names(rows, columns[1], where), start=1):
            if config.labels and name not in config.labels:
                raise ConfigError(
                    f"{where}: row {number} has the label {name!r}, which is none of the classes "
                    "(those of data.labels, else of the training rows)"
                )

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

    def compute_metrics(self, prediction: EvalPrediction) -> Mapping[str, float]:
        """None of its own."""
        return {}
