"""Tiny models and data, made once per session without downloads."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from command_line import CommandLine
from prelort.config import Config, check
from prelort.report import describe, write
from prelort.study import run as studies

torch.set_num_threads(1)

DRAWS = [(describe, "picture"), (studies, "write_results"), (studies, "write_page")]
DRAWN = [getattr(module, name) for module, name in DRAWS]

SENTENCE = "the quick brown fox jumps over a lazy dog while seven red cats sleep near blue boxes"
WORDS = SENTENCE.split()


@pytest.fixture(scope="session", autouse=True)
def _no_pictures() -> Iterator[None]:
    """Runs leave tables and an empty page: drawing takes longer than training a tiny model."""

    def empty(*arguments: Any) -> Any:
        arguments[-1].touch()
        return arguments[-1]

    with pytest.MonkeyPatch.context() as patch:
        for draw, quick in zip(DRAWS, (empty, write.write_tables, empty), strict=True):
            patch.setattr(*draw, quick)
        yield


@pytest.fixture
def pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs leave their pictures and pages too, as for a user."""
    for draw, original in zip(DRAWS, DRAWN, strict=True):
        monkeypatch.setattr(*draw, original)


@pytest.fixture
def command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> CommandLine:
    """``command_line("run", "--out", ...)`` does what a shell would."""
    monkeypatch.setenv("COLUMNS", "120")
    return CommandLine(monkeypatch, capsys)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 300 tokens with end and padding tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


@pytest.fixture(scope="session")
def tiny_llama(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast
) -> Path:
    """The folder of a random Llama with two layers of width 32."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )
    return _saved(model, tokenizer, tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """The folder of a random GPT-2: its layers are transposed (Conv1D)."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=128,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=tokenizer.eos_token_id,
        )
    )
    return _saved(model, tokenizer, tmp_path_factory.mktemp("models") / "gpt2")


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """The folder of a random BERT encoder."""
    torch.manual_seed(0)
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=128,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    return _saved(model, tokenizer, tmp_path_factory.mktemp("models") / "bert")


@pytest.fixture(scope="session")
def tiny_moe(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """The folder of a random mixture of four experts, of which each token goes through two."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        max_position_embeddings=128,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return _saved(Qwen3MoeForCausalLM(config), tokenizer, tmp_path_factory.mktemp("models") / "moe")


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JSON lines: 6 clients with 12 sentences each, columns client, text, label."""
    path = tmp_path_factory.mktemp("data") / "sentences.jsonl"
    generator = torch.Generator().manual_seed(1)
    rows = []
    for client in range(6):
        for _ in range(12):
            order = torch.randperm(len(WORDS), generator=generator).tolist()
            text = " ".join(WORDS[i] for i in order)
            rows.append({"client": f"site-{client}", "text": text, "label": WORDS[order[0]] > "m"})
    labelled = [{**row, "label": "late" if row["label"] else "early"} for row in rows]
    path.write_text("\n".join(map(json.dumps, labelled)), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def make_config(tiny_llama: Path, text_file: Path) -> Callable[..., Config]:
    """A function of ``section={...}`` keywords that returns a small, fast configuration.

    6 clients of ranks 2, 2, 4, 4, 8, 8; 3 rounds of 3 clients with 2 steps each.
    """
    defaults: dict[str, dict[str, object]] = {
        "model": {"name": str(tiny_llama), "device": "cpu"},
        "data": {"source": str(text_file), "max_length": 32},
        "partition": {"by": "column", "column": "client"},
        "ranks": {"mix": "2, 2, 4, 4, 8, 8", "assign": "in-order"},
        "training": {"local_steps": 2, "batch_size": 4, "learning_rate": 1e-2},
        "federation": {"rounds": 3, "clients_per_round": 3},
    }

    def make(**changes: object) -> Config:
        values: dict[str, object] = {"threads": 1}
        for section in defaults.keys() | changes.keys():
            given = changes.get(section, {})
            default = defaults.get(section)
            values[section] = {**default, **given} if isinstance(given, dict) and default else given
        return check(values)

    return make


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and weights that are not in the repository.

    Its ``data`` and ``weights`` are described in the README, section "Real data".
    """
    folder = os.environ.get("PRELORT_SHARED")
    if not folder or not Path(folder).is_dir():
        pytest.skip("set PRELORT_SHARED to a folder with data/ and weights/ to run this test")
    return Path(folder)


def _saved(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, folder: Path) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
