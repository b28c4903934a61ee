"""Padding, and tokenising, as every task needs it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def tokenise(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, without special tokens and without truncation, in one batch."""
    if not texts:
        return []  # some tokenizers refuse an empty batch
    encoded = tokenizer(
        list(texts),
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # longer than the model's context is no fault here: it is cut afterwards
    )
    ids: list[list[int]] = encoded["input_ids"]
    return ids


def pad_right(sequences: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    """Sequences as one int64 tensor [batch, longest], filled on the right."""
    longest = max(map(len, sequences))
    rows = [[*ids, *[value] * (longest - len(ids))] for ids in sequences]
    return torch.tensor(rows, dtype=torch.long)


def attention_mask(lengths: Sequence[int]) -> torch.Tensor:
    """1 where there is a token, else 0: int64 [batch, longest]."""
    return (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
