from __future__ import annotations

from typing import Any

import pytest
import torch
from byte_tokens import make_tokenizer, read
from datasets import Dataset
from transformers import BertConfig, BertForSequenceClassification

from prelort.config import DataConfig
from prelort.errors import ConfigError
from prelort.tasks import get
from prelort.tasks.interface import Example

TASK = get("classification")
LABELS = ("no", "yes", "maybe")


def encode(rows: Dataset, tokenizer: Any, max_length: int = 16) -> list[Example]:
    return list(TASK.encode(rows, tokenizer, DataConfig(max_length=max_length), LABELS))


@pytest.fixture
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=300,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        num_labels=3,
    )
    built: torch.nn.Module = BertForSequenceClassification(config).eval()
    return built


def test_a_row_is_its_text_and_the_number_of_its_class() -> None:
    tokenizer = make_tokenizer(bos=True)
    rows = Dataset.from_dict({"text": ["one", "two" * 10], "label": ["yes", "no"]})
    examples = encode(rows, tokenizer)
    assert [read(tokenizer, e.input_ids) for e in examples] == [
        "<bos>one",
        "<bos>" + ("two" * 10)[:15],
    ]
    assert [e.labels for e in examples] == [1, 0]


def test_an_empty_text_is_one_token_also_in_a_batch_of_its_own() -> None:
    rows = Dataset.from_dict({"text": ["", None, "a"], "label": ["no", "yes", "no"]})
    for tokenizer in (make_tokenizer(), make_tokenizer(bos=True)):
        empty, missing, _ = examples = encode(rows, tokenizer)
        assert read(tokenizer, empty.input_ids) == read(tokenizer, missing.input_ids) == "<bos>"
        for batch in (TASK.collate(examples, 0), TASK.collate([empty], 0)):
            assert batch["input_ids"].dtype == torch.int64
            assert batch["attention_mask"].sum(dim=1).min() == 1


def test_an_unknown_label_is_named(tokenizer: Any) -> None:
    rows = Dataset.from_dict({"text": ["x"], "label": ["never"]})
    with pytest.raises(ConfigError, match="the label 'never' is not among those of the training"):
        encode(rows, tokenizer)


@pytest.mark.parametrize(
    "available, found",
    [
        (["text", "category"], ("text", "category")),
        (["sentence", "label"], ("sentence", "label")),
        (["label", "category", "question"], ("question", "label")),
        (["Query", "Intent"], ("Query", "Intent")),
    ],
)
def test_finds_its_columns(available: list[str], found: tuple[str, str]) -> None:
    assert TASK.columns(DataConfig(), available) == found


def test_one_column_cannot_be_both_text_and_label() -> None:
    with pytest.raises(ConfigError, match="column 'label' is both text and label"):
        TASK.columns(DataConfig(text_column="label"), ["text", "label"])


def test_a_batch_weighs_its_examples() -> None:
    batch = TASK.collate([Example([5, 6, 7], 2), Example([8], 0)], pad_id=9)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [2, 0]
    assert TASK.weight(batch) == 2


def test_the_loss_is_the_sum_of_cross_entropies(model: torch.nn.Module) -> None:
    examples = [Example([5, 6, 7], 2), Example([8], 0)]
    expected = 0.0
    for example in examples:
        logits = model(input_ids=torch.tensor([example.input_ids])).logits[0].double()
        assert isinstance(example.labels, int)
        expected -= float(logits.log_softmax(-1)[example.labels].detach())
    loss = TASK.losses(model, TASK.collate(examples, pad_id=0)).sum()
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert TASK.losses(model.bfloat16(), TASK.collate(examples, 0)).sum().dtype == torch.float32
