from __future__ import annotations

from itertools import chain
from typing import Any

import pytest
import torch
from byte_tokens import learnt, make_tokenizer, read
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from prelort.config import DataConfig
from prelort.errors import ConfigError
from prelort.tasks import get
from prelort.tasks.interface import IGNORED, Example

TASK = get("causal-lm")


def encode(texts: list[str | None], tokenizer: Any, max_length: int = 16) -> list[Example]:
    rows = Dataset.from_dict({"text": texts})
    return list(TASK.encode(rows, tokenizer, DataConfig(max_length=max_length), ()))


@settings(max_examples=50, deadline=None)
@given(texts=st.lists(st.text(max_size=30), max_size=6), length=st.integers(8, 20))
def test_blocks_are_the_text_in_order_with_eos_between(texts: list[str], length: int) -> None:
    tokenizer = make_tokenizer()
    examples = encode(list(texts), tokenizer, length) if texts else []
    whole = [list(text.encode()) for text in texts if text]
    number = sum(map(len, whole)) + max(len(whole) - 1, 0)  # a token a byte, and eos between
    tail = number % length
    assert sum(len(e.input_ids) for e in examples) == number - (tail if tail < 8 else 0)
    assert all(len(e.input_ids) == length for e in examples[:-1])
    stream = read(tokenizer, list(chain.from_iterable(e.input_ids for e in examples)))
    if tail == 0 or tail >= 8:
        assert stream == "<eos>".join(text for text in texts if text)
    assert all(e.labels == e.input_ids for e in examples)


@pytest.mark.parametrize("length, kept", [(7, []), (8, [8]), (16, [16]), (23, [16]), (24, [16, 8])])
def test_the_last_block_needs_eight_tokens(tokenizer: Any, length: int, kept: list[int]) -> None:
    assert [len(e.input_ids) for e in encode(["x" * length], tokenizer)] == kept


def test_a_tokenizer_that_begins_texts_with_bos_does_so() -> None:
    tokenizer = make_tokenizer(bos=True)
    (example,) = encode(["one", "two"], tokenizer)
    assert learnt(tokenizer, example) == "<bos>one<eos><bos>two"


def test_texts_longer_than_the_model_are_no_warning(
    tokenizer: Any, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    encode(["x" * 200], tokenizer)
    assert caplog.text == ""
    assert capfd.readouterr() == ("", "")


def test_needs_an_end_of_sequence_token() -> None:
    with pytest.raises(ConfigError, match=r"the tokenizer has no end-of-sequence token"):
        encode(["one"], make_tokenizer(eos=False))


def test_a_batch_is_padded_on_the_right() -> None:
    batch = TASK.collate([Example([5, 6, 7], [IGNORED, 6, 7]), Example([8], [8])], pad_id=9)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7], [8, IGNORED, IGNORED]]
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())
    assert TASK.weight(batch) == 2  # the first token of a sequence is not predicted


def test_the_loss_is_the_sum_over_predicted_tokens(causal_model: torch.nn.Module) -> None:
    examples = [Example([5, 6, 7, 8], [IGNORED, IGNORED, 7, 8]), Example([9, 10], [9, 10])]
    expected = 0.0
    for example in examples:
        with torch.no_grad():
            logits = causal_model(input_ids=torch.tensor([example.input_ids])).logits[0].double()
        for position, label in enumerate(example.labels[1:]):  # type: ignore[index]
            if label != IGNORED:
                expected -= float(logits[position].log_softmax(-1)[label])
    loss = TASK.losses(causal_model, TASK.collate(examples, pad_id=0)).sum()
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_the_loss_does_not_depend_on_padding(causal_model: torch.nn.Module) -> None:
    examples = [Example([5, 6, 7, 8], [5, 6, 7, 8]), Example([9, 10], [9, 10])]
    apart = sum(TASK.losses(causal_model, TASK.collate([e], 0)).sum().item() for e in examples)
    together = TASK.losses(causal_model, TASK.collate(examples, 3)).sum().item()
    assert together == pytest.approx(apart, rel=1e-5)
