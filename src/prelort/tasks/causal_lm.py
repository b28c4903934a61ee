"""Plain text: every token is learnt."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

from datasets import Dataset

from prelort.config import DataConfig
from prelort.tasks._batches import tokenise
from prelort.tasks._causal import CausalTask, end_of_text, opening
from prelort.tasks.columns import find, texts
from prelort.tasks.interface import Example

TEXT_COLUMNS = ("text", "content", "document", "body", "sentence")
SHORTEST_BLOCK = 8
"""Tokens that the last block of a client must have to be kept."""


class CausalLM(CausalTask):
    """A client's documents, one after another with eos between, in blocks of equal length."""

    name = "causal-lm"
    metrics: tuple[str, ...] = ("perplexity",)

    def columns(self, config: DataConfig, available: Sequence[str]) -> tuple[str, ...]:
        """The text column; raises `ConfigError` if there is none."""
        return (find("data.text_column", config.text_column, TEXT_COLUMNS, available),)

    def encode(
        self, rows: Dataset, tokenizer: Any, config: DataConfig, labels: Sequence[str]
    ) -> list[Example]:
        """Blocks of ``max_length`` tokens; a shorter one at the end if it has 8 or more.

        A tokenizer that begins texts with bos does so here for each document. Empty documents
        count for nothing. The result is empty if all rows together have fewer than 8 tokens.
        """
        (column,) = self.columns(config, rows.column_names)
        before, after = opening(tokenizer), end_of_text(tokenizer)
        documents = tokenise(tokenizer, [text for text in texts(rows, column) if text])
        # One eos more than 'between' needs is cut off again: the text ends, but is not learnt to.
        stream = list(chain.from_iterable([*before, *ids, after] for ids in documents))[:-1]
        blocks = [
            stream[i : i + config.max_length] for i in range(0, len(stream), config.max_length)
        ]
        return [Example(ids, ids) for ids in blocks if len(ids) >= SHORTEST_BLOCK]
