from __future__ import annotations

from typing import Any

import pytest
import torch
from byte_tokens import TEMPLATE, make_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture(scope="session")
def chat_tokenizer() -> Any:
    return make_tokenizer(template=TEMPLATE)


@pytest.fixture
def causal_model() -> torch.nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    model: torch.nn.Module = LlamaForCausalLM(config).eval()
    return model
