"""Greedy continuations of prompts, in batches padded on the left."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from transformers import GenerationConfig


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The ids that end a generation: the model's own, else the tokenizer's; possibly none.

    The model comes first since a chat model ends its turn with a token of its own.
    """
    settings = getattr(model, "generation_config", None)
    ends = getattr(settings, "eos_token_id", None)
    if ends is None:
        ends = tokenizer.eos_token_id
    if ends is None:
        return []
    return [int(end) for end in ends] if isinstance(ends, list | tuple) else [int(ends)]


def fit_prompt(model: Any, prompt: Sequence[int], max_new_tokens: int) -> list[int]:
    """The prompt's last tokens that leave room for the answer in the model's positions.

    Beyond them learnt positions (GPT-2) raise an index error. It depends on the example alone, so
    that the generated text does not depend on the batch.
    """
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if not isinstance(positions, int):
        return list(prompt)
    return list(prompt)[-max(1, positions - max_new_tokens) :]


def continuations(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    pad_id: int,
    max_new_tokens: int,
    device: torch.device | str,
) -> list[str]:
    """The text that the model adds to each prompt (lists of token ids, none of them empty).

    Greedy, whatever the model's own settings of generation are; in one batch, without special
    tokens and surrounding blanks. The model must be in eval mode and gradients off.
    """
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad_id, dtype=torch.long)
    mask = torch.zeros((len(prompts), width), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(list(prompt))
        mask[row, width - len(prompt) :] = 1
    ends = end_tokens(model, tokenizer)
    greedy = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        use_cache=True,  # training with gradient checkpointing may have switched it off
        pad_token_id=pad_id,
        eos_token_id=ends or None,
    )
    with _without_settings(model) as base:
        output = base.generate(
            input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=greedy
        )
    # Rows that ended early are filled up with the padding, which need not be a special token.
    kept = [_until(row, ends) for row in output[:, width:].tolist()]
    return [tokenizer.decode(row, skip_special_tokens=True).strip() for row in kept]


@contextmanager
def _without_settings(model: Any) -> Iterator[Any]:
    """The base model, whose own settings of generation do not count.

    `generate` adds them to those that it is given: penalties of repetition, suppressed tokens, ...
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    own = base.generation_config
    base.generation_config = GenerationConfig()
    try:
        yield base
    finally:
        base.generation_config = own


def _until(tokens: list[int], ends: Sequence[int]) -> list[int]:
    """The tokens before the first that ends the text."""
    for position, token in enumerate(tokens):
        if token in ends:
            return tokens[:position]
    return tokens
