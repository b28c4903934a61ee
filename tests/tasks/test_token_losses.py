"""Losses in parts against all logits at once, for heads of every kind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    PhiConfig,
)

from prelort.config import LoraSettings
from prelort.models.lora import attach, install, trainable
from prelort.tasks import get, token_losses
from prelort.tasks.interface import IGNORED
from tiny_models import trained_adapter

SMALL = {
    "vocab_size": 200,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.5,
    "resid_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "embd_pdrop": 0.0,
}
MODELS: dict[str, Any] = {
    "llama": LlamaConfig(**SMALL),
    "gpt2, tied": GPT2Config(**SMALL, n_embd=32, n_layer=2, n_head=4),
    "opt, decoder inside": OPTConfig(**SMALL, ffn_dim=48, word_embed_proj_dim=16, dropout=0.0),
    "gemma2, soft-capped": Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=3.0),
    "cohere, scaled": CohereConfig(**SMALL, logit_scale=0.3),
    "phi, bias": PhiConfig(**SMALL),
}
HEADS: dict[str, dict[str, Any]] = {
    "frozen": {},
    "adapted": {"target_modules": ("q_proj", "lm_head")},
    "adapted with dropout": {"target_modules": ("q_proj", "lm_head"), "dropout": 0.2},
    "trained": {"target_modules": ("q_proj",), "modules_to_save": ("lm_head",)},
}


def batch() -> dict[str, torch.Tensor]:
    """Four rows, of which the last has nothing to learn, with padding and unlearnt prompts."""
    ids = torch.randint(2, 200, (4, 24), generator=torch.Generator().manual_seed(0))
    mask, labels = torch.ones_like(ids), ids.clone()
    for row, (prompt, end) in enumerate([(0, 24), (9, 20), (5, 13), (24, 24)]):
        labels[row, :prompt] = labels[row, end:] = IGNORED
        mask[row, end:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def adapted(config: Any, dtype: torch.dtype = torch.float32, **lora: Any) -> Any:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config).to(dtype).requires_grad_(False)
    model = attach(base, LoraSettings(**lora), 4, "causal")
    install(model, trained_adapter(model))
    return model.train()


def losses_and_gradients(model: Any, monkeypatch: Any, limit: int) -> list[torch.Tensor]:
    monkeypatch.setattr(token_losses, "LIMIT", limit)
    torch.manual_seed(0)
    losses = get("causal-lm").losses(model, batch())
    model.zero_grad()
    (losses * torch.tensor([0.1, 0.3, 0.05, 1.0])).sum().backward()
    learning = [p for parameters in trainable(model) for p in parameters]
    return [losses.detach(), *[p.grad.clone() for p in learning]]


@pytest.mark.parametrize(
    "model, head, dtype",
    [
        *[(name, "frozen", torch.float32) for name in MODELS],
        *[("gemma2, soft-capped", head, torch.float32) for head in HEADS if head != "frozen"],
        ("llama", "frozen", torch.bfloat16),
        ("llama", "adapted", torch.bfloat16),
    ],
)
def test_parts_have_the_losses_and_gradients_of_the_whole(
    model: str, head: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = adapted(MODELS[model], dtype, **HEADS[head])
    expected = losses_and_gradients(tried, monkeypatch, 10**9)
    found = losses_and_gradients(tried, monkeypatch, 7 * 200)
    rounding = 1e-5 if dtype == torch.float32 else 0.02
    for own, theirs in zip(found, expected, strict=True):
        assert float((own - theirs).norm()) <= rounding * float(theirs.norm())


@pytest.mark.parametrize("model", MODELS)
def test_parts_find_the_same_tokens_most_likely(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried, sizes = adapted(MODELS[model]).eval(), []
    expected, all_made = get("causal-lm").scores(tried, batch())
    head = tried.get_base_model().get_output_embeddings()
    head.register_forward_hook(lambda *call: sizes.append(call[-1].shape[:2].numel()))
    monkeypatch.setattr(token_losses, "LIMIT", 5 * 4 * 200)
    losses, made = get("causal-lm").scores(tried, batch())
    torch.testing.assert_close(losses, expected)
    assert torch.equal(made, all_made)
    assert sizes == [4, *[20] * 4, 16]


def test_only_labelled_tokens_have_logits_and_never_more_than_the_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, sizes = adapted(MODELS["llama"]), []
    head = model.get_base_model().lm_head
    head.register_forward_hook(lambda *call: sizes.append(call[-1].shape[:2].numel()))
    losses_and_gradients(model, monkeypatch, 10 * 200)
    learnt = int((batch()["labels"][:, 1:] != IGNORED).sum())
    assert sizes == [4, *[10] * (learnt // 10), learnt % 10]
