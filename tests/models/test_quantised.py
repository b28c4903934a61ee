"""A base in 4 or 8 bits: nested training and prefixes work on it as on any other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, RobertaConfig, RobertaModel

import prelort
from prelort.adapters import ScaleRule
from prelort.adapters.algebra import concatenate
from prelort.config import Config, LoraSettings, ModelConfig
from prelort.models import base
from prelort.models.lora import FROZEN, attach, initial_adapter, install, lora_layers
from prelort.training.truncation import Truncation

pytest.importorskip("bitsandbytes", reason="pip install 'prelort[quantised]'")


@pytest.fixture(scope="module")
def wide_llama(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A random Llama whose widths are multiples of 64, bitsandbytes' block."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        pad_token_id=tokenizer.pad_token_id,
    )
    folder = tmp_path_factory.mktemp("models") / "wide"
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("bits, layer", [("4bit", "Linear4bit"), ("8bit", "Linear8bitLt")])
def test_a_prefix_is_the_mask_on_a_quantised_base(wide_llama: Path, bits: str, layer: str) -> None:
    settings = ModelConfig(name=str(wide_llama), device="cpu", quantization=bits)
    quantised = base.load_model(settings, "causal", pad_id=0)
    assert type(quantised.model.layers[0].self_attn.q_proj).__name__ == layer
    model = attach(quantised, LoraSettings(), 8, "causal").eval()
    rule = ScaleRule()
    adapter = initial_adapter(model, rule, seed=0)
    for factors in adapter.layers.values():
        factors.B.normal_(generator=torch.Generator().manual_seed(1))
    truncation = Truncation(model, rule)
    ids = torch.arange(2, 34).view(2, 16)
    install(model, adapter)
    with torch.no_grad():
        with truncation.at(2):
            masked = model(ids).logits
        with truncation.at(torch.tensor([2, 8])):
            each = model(ids).logits
        whole = model(ids).logits
        install(model, adapter.prefix(2))
        cut = model(ids).logits
    torch.testing.assert_close(masked, cut)
    # In 8 bits the rows of a batch share the activations' outlier columns, hence the tolerance.
    tolerance = 1e-4 if bits == "4bit" else 1e-2
    torch.testing.assert_close(each[0], cut[0], atol=tolerance, rtol=0)
    torch.testing.assert_close(each[1], whole[1], atol=tolerance, rtol=0)
    assert float((whole[0] - cut[0]).abs().max()) > 10 * tolerance


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
@pytest.mark.parametrize("rank", [4, 48], ids=["two products", "one matrix"])
def test_a_fold_beside_a_quantised_base_is_a_part_of_the_adapter(
    wide_llama: Path, bits: str, rank: int
) -> None:
    """Beside the base and not in it: the quantised weights are as they were."""
    settings = ModelConfig(name=str(wide_llama), device="cpu", quantization=bits)
    model = attach(base.load_model(settings, "causal", pad_id=0), LoraSettings(), 64, "causal")
    model.eval()
    rule, scale_multiplier = ScaleRule("rslora", 1.0), 1.5
    whole = initial_adapter(model, rule, seed=0)
    for factors in whole.layers.values():
        factors.B.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    adapter, fold = whole.prefix(8), replace(whole.prefix(rank), modules_to_save={})
    ids = torch.arange(2, 34).view(2, 16)

    def output(*installed: Any, **how: Any) -> torch.Tensor:
        install(model, *installed, **how)
        with torch.no_grad():
            return model(ids).logits

    alone = output(adapter)  # only now are the weights in the order that this device wants
    weights = {n: p.clone() for n, p in model.named_parameters() if "lora" not in n}
    folded = output(adapter, frozen=fold, scale_multiplier=scale_multiplier)
    one = any(
        isinstance(layer.lora_B[FROZEN], nn.Identity) for layer in lora_layers(model).values()
    )
    assert one == (rank == 48)
    together = output(concatenate([adapter, fold], [scale_multiplier, 1.0]))
    # The layers' inputs differ by rounding, which moves 8 bits' outlier columns.
    tolerance = 1e-4 if bits == "4bit" else 1e-2
    torch.testing.assert_close(folded, together, atol=tolerance, rtol=0)
    assert float((folded - alone).abs().max()) > 10 * tolerance
    assert torch.equal(output(adapter), alone)
    now = dict(model.named_parameters())
    assert all(torch.equal(now[name], weight) for name, weight in weights.items())


def test_a_whole_run_on_a_four_bit_base(
    make_config: Callable[..., Config], wide_llama: Path, tmp_path: Path
) -> None:
    config = make_config(model={"name": str(wide_llama), "quantization": "4bit"})
    result = prelort.run(config, tmp_path / "run")
    assert result.metrics[8]["perplexity"] < result.base["perplexity"]
    full = prelort.run(make_config(model={"name": str(wide_llama)}), tmp_path / "full")
    assert result.base["perplexity"] != full.base["perplexity"]


def test_an_evaluation_leaves_the_gradients_of_a_four_bit_base_as_they_were(
    wide_llama: Path,
) -> None:
    """On CPUs with bfloat16 instructions bitsandbytes would pack the weights in it."""
    settings = ModelConfig(name=str(wide_llama), device="cpu", quantization="4bit")
    model = attach(base.load_model(settings, "causal", pad_id=0), LoraSettings(), 4, "causal")
    ids = torch.arange(2, 34).view(2, 16)

    def gradients() -> list[torch.Tensor]:
        install(model, initial_adapter(model, ScaleRule(), seed=0))
        model.train()
        model(input_ids=ids).logits.square().sum().backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    before = gradients()
    with torch.no_grad():
        model.eval()(input_ids=ids)
    for first, second in zip(before, gradients(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_an_encoder_with_a_new_head_of_several_layers_is_trained_quantised(
    make_config: Callable[..., Config], tokenizer: Any, tmp_path: Path, bits: str
) -> None:
    shape = RobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=128,
        pad_token_id=0,
    )
    RobertaModel(shape, add_pooling_layer=False).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model = {"name": str(tmp_path / "base"), "quantization": bits}
    config = make_config(task="classification", model=model, federation={"rounds": 1})
    result = prelort.run(config, tmp_path / "run")
    assert "classifier.dense.weight" in result.global_adapter.modules_to_save
