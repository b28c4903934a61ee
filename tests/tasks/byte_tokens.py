"""A tiny tokenizer: a token is a byte, so that what is learnt can be read."""

from __future__ import annotations

from functools import cache
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from prelort.tasks.interface import IGNORED, Example

SPECIAL = ["<pad>", "<bos>", "<eos>", "<user>", "<assistant>", "<end>"]
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@cache
def make_tokenizer(bos: bool = False, eos: bool = True, template: str | None = None) -> Any:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *alphabet])}
    inner = Tokenizer(models.BPE(vocabulary, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    if bos:
        inner.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", vocabulary["<bos>"])]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>" if eos else None,
        additional_special_tokens=["<user>", "<assistant>", "<end>"],
        model_max_length=64,
    )
    tokenizer.chat_template = template
    return tokenizer


def read(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def learnt(tokenizer: Any, example: Example) -> str:
    """The learnt tokens as text, with a bar where tokens between are not learnt."""
    assert isinstance(example.labels, list)
    assert len(example.labels) == len(example.input_ids)
    pieces: list[list[int]] = [[]]
    for token, label in zip(example.input_ids, example.labels, strict=True):
        if label == IGNORED:
            pieces.append([])
        else:
            assert label == token
            pieces[-1].append(token)
    return "|".join(read(tokenizer, piece) for piece in pieces if piece)
