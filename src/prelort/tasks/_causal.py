"""What the causal tasks share: how a batch of token sequences becomes a loss."""

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
from prelort.tasks.columns import require_texts
from prelort.tasks.interface import IGNORED, Batch, Example
from prelort.tasks.token_losses import token_losses, token_scores


class CausalTask:
    """Next-token prediction where an example's ``labels`` are not `IGNORED`."""

    kind: Literal["causal", "classification"] = "causal"

    def columns(self, config: DataConfig, available: Sequence[str]) -> tuple[str, ...]:
        """The columns read; each causal task says which."""
        raise NotImplementedError

    def labels(self, rows: Dataset, config: DataConfig) -> tuple[str, ...]:
        """None: a causal model predicts tokens."""
        return ()

    def check(self, rows: Dataset, config: DataConfig, where: str) -> None:
        """Raise `ConfigError` naming the first row of ``where`` whose cells are no text."""
        require_texts(rows, self.columns(config, rows.column_names), where)

    def collate(self, examples: Sequence[Example], pad_id: int) -> Batch:
        """``input_ids``, ``attention_mask`` and ``labels``, each [batch, longest], int64."""
        return {
            "input_ids": pad_right([e.input_ids for e in examples], pad_id),
            "attention_mask": attention_mask([len(e.input_ids) for e in examples]),
            "labels": pad_right([e.labels for e in examples], IGNORED),
        }

    def weight(self, batch: Batch) -> int:
        """The number of tokens predicted: the first of a sequence has nothing before it."""
        return int((batch["labels"][:, 1:] != IGNORED).sum())

    def losses(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """Each example's summed negative log likelihood in nats (float32 [examples]).

        The batch is one of `collate`, or of `prelort.tasks.packing.pack`.
        """
        losses = token_losses(model, *_inputs_and_labels(batch))
        if "example" not in batch:
            return losses.sum(dim=1)
        each = losses.new_zeros(len(batch["lengths"]))
        return each.index_add(0, batch["example"].flatten(), losses.flatten())

    def scores(self, model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """The same, and the most likely token after each place (int64 [batch, length])."""
        inputs, following = _inputs_and_labels(batch)
        losses, made = token_scores(model, inputs, following)
        return losses.sum(dim=1), made

    def compute_metrics(self, prediction: EvalPrediction) -> Mapping[str, float]:
        """None of its own."""
        return {}


def _inputs_and_labels(batch: Batch) -> tuple[Batch, torch.Tensor]:
    """What the model is given, and the label that follows each token."""
    names = {"input_ids", "attention_mask", "position_ids"} & batch.keys()
    inputs = {name: batch[name] for name in names}
    # What comes next is moved to where it is predicted: the logits need not be copied.
    return inputs, F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)


def opening(tokenizer: Any) -> list[int]:
    """The special tokens that the tokenizer itself puts before a text (bos), often none."""
    plain: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
    full: list[int] = tokenizer("a")["input_ids"]
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return full[:start]
    return []


def end_of_text(tokenizer: Any) -> int:
    """The end-of-sequence token; raises `ConfigError` if the tokenizer has none."""
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            "the tokenizer has no end-of-sequence token (eos_token), which tells where a text "
            "ends: use a causal language model's tokenizer"
        )
    return int(tokenizer.eos_token_id)


def answer_example(
    prompt: Sequence[int],
    prompt_labels: Sequence[int],
    answer: Sequence[int],
    reference: str,
    max_length: int,
    keep: int = 0,
) -> Example:
    """A prompt and an answer learnt in full, in at most ``max_length`` tokens.

    What is too long loses tokens on the prompt's left, after its first ``keep`` (bos); only when
    a single token of the prompt is left is the answer cut, on its right.
    """
    answer = list(answer)[: max_length - max(keep, min(1, len(prompt)))]
    room = max_length - len(answer)
    cut = max(0, len(prompt) - room)  # tokens to lose, from position `keep` on
    ids = [*prompt[:keep], *prompt[keep + cut :]]
    labels = [*prompt_labels[:keep], *prompt_labels[keep + cut :]]
    return Example([*ids, *answer], [*labels, *answer], len(ids), reference)
