from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, BertTokenizerFast

from prelort.config import DataConfig
from prelort.data import sources
from prelort.tasks import get
from prelort.tasks.interface import IGNORED

pytestmark = pytest.mark.real_data


def read(shared: Path, name: str, number: int) -> Dataset:
    rows, _ = sources.read(DataConfig(source=str(shared / "data" / name)))
    return rows.select(range(number))


def test_instructions_end_in_their_responses(shared: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared / "weights" / "tokenizers" / "gpt2")
    rows = read(shared, "dolly15k/dolly15k.jsonl", 400)
    config = DataConfig(max_length=96)
    examples = list(get("instruction").encode(rows, tokenizer, config, ()))
    assert len(examples) == 400
    for example, response in zip(examples, rows["response"][:], strict=True):
        assert isinstance(example.labels, list)
        kept = [label for label in example.labels if label != IGNORED]
        assert len(example.input_ids) <= 96
        assert example.labels[: example.prompt_length] == [IGNORED] * example.prompt_length
        assert (response + tokenizer.eos_token).startswith(tokenizer.decode(kept).rstrip("\ufffd"))
        if kept[-1] != tokenizer.eos_token_id:
            assert (example.prompt_length, len(example.input_ids)) == (1, 96)


def test_classes_have_the_encoders_special_tokens(shared: Path) -> None:
    folder = shared / "weights" / "tokenizers" / "bert-base-uncased"
    tokenizer = BertTokenizerFast.from_pretrained(folder)
    rows = read(shared, "sst2/dev.tsv", 100)
    config = DataConfig(max_length=16)
    examples = list(get("classification").encode(rows, tokenizer, config, ("0", "1")))
    assert [str(e.labels) for e in examples] == rows["label"][:]
    for example in examples:
        assert len(example.input_ids) <= 16
        assert example.input_ids[0] == tokenizer.cls_token_id
        assert example.input_ids[-1] == tokenizer.sep_token_id


def test_a_pretrained_model_finds_stories_likelier_than_code(shared: Path, tmp_path: Path) -> None:
    folder = shared / "weights" / "stories260K"
    tokenizer, model = (
        kind.from_pretrained(folder) for kind in (AutoTokenizer, AutoModelForCausalLM)
    )
    task = get("causal-lm")

    def loss(texts: list[str]) -> float:
        rows = Dataset.from_dict({"text": texts})
        examples = list(task.encode(rows, tokenizer, DataConfig(max_length=64), ()))
        batch: Any = task.collate(examples, pad_id=2)
        with torch.no_grad():
            return task.losses(model, batch).sum().item() / task.weight(batch)

    story = "Once upon a time there was a little girl named Lily. She loved to play in the park."
    assert loss([story]) < 2.5
    assert loss(["def load(path): return json.loads(path.read_text())"]) > loss([story]) + 1
