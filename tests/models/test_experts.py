"""Adapters of a mixture's stacked experts: truncated, folded, run, stored, refused.

`test_architectures.py` compares them with plain PEFT at every rank.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch.nn.utils import parametrize
from transformers import AutoModelForCausalLM, GptOssConfig

import prelort
from prelort.adapters import AdapterSchema, Factors, LoraAdapter, ScaleRule, peft_folder
from prelort.config import Config, LoraSettings
from prelort.errors import AdapterError, ConfigError
from prelort.models.lora import ADAPTER, attach, extract, install, schema, shapes, trainable
from prelort.planning.skeleton import skeleton
from prelort.training.truncation import Truncation
from tiny_models import adapted, logits, trained_adapter

STACKS = ("experts.gate_up_proj", "experts.down_proj")
RULES = [ScaleRule("constant", 0.7), ScaleRule("rslora", 1.3)]
Make = Callable[..., Config]


@pytest.fixture(params=["qwen3", "gpt_oss"])
def mixture(request: pytest.FixtureRequest, tiny_moe: Path) -> PeftModel:
    """[experts, d_out, d_in], and [experts, d_in, d_out] with biases; rank 4."""
    if request.param == "qwen3":
        return adapted(tiny_moe, 4, target_parameters=STACKS)
    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        pad_token_id=0,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    base = AutoModelForCausalLM.from_config(config).requires_grad_(False)
    return attach(base, LoraSettings(target_parameters=STACKS), 4, "causal").eval()


def gradients(model: PeftModel, rule: ScaleRule) -> LoraAdapter:
    """The gradients of a loss, as an adapter, in place of the model's own."""
    model(input_ids=torch.arange(2, 26).view(3, 8)).logits.square().mean().backward()
    for parameters in trainable(model):
        for parameter in parameters:
            parameter.data = parameter.grad
    return extract(model, rule)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("rank", [1, 3])
def test_a_truncation_is_the_prefix_of_each_expert(
    mixture: PeftModel, rule: ScaleRule, rank: int
) -> None:
    adapter, truncation = trained_adapter(mixture, rule), Truncation(mixture, rule)
    install(mixture, adapter)
    with truncation.at(rank):
        seen, cut = logits(mixture), gradients(mixture, rule)
    install(mixture, adapter.prefix(rank))
    torch.testing.assert_close(seen, logits(mixture), rtol=1e-4, atol=1e-5)
    for name, wanted in gradients(mixture, rule).layers.items():
        own = cut.layers[name]
        torch.testing.assert_close(own.A[:rank], wanted.A, rtol=1e-3, atol=1e-7)
        torch.testing.assert_close(own.B[:, :rank], wanted.B, rtol=1e-3, atol=1e-7)
        assert not own.A[rank:].any()
        assert not own.B[:, rank:].any()


def test_a_fold_whose_experts_have_different_ranks_is_added(mixture: PeftModel) -> None:
    rule = RULES[0]
    Truncation(mixture, rule)
    adapter, other = trained_adapter(mixture, rule), trained_adapter(mixture, rule, seed=1)
    ranks = {name: index % 4 for index, name in enumerate(other.layers)}
    layers = {n: f.prefix(ranks[n]) for n, f in other.layers.items()}
    fold = replace(other, layers=layers, scale=RULES[1])
    ratios = {n: RULES[1](rank) / rule(1) for n, rank in ranks.items()}
    both = {
        n: Factors(torch.cat([f.A, layers[n].A]), torch.cat([f.B, ratios[n] * layers[n].B], 1))
        for n, f in adapter.layers.items()
    }
    install(mixture, adapter, frozen=fold)
    folded = logits(mixture)
    assert {f.rank for f in extract(mixture, rule).layers.values()} == {4}
    install(mixture, replace(adapter, layers=both))
    torch.testing.assert_close(folded, logits(mixture), rtol=1e-4, atol=1e-5)


def test_no_thread_keeps_the_weights_of_another_one(mixture: PeftModel) -> None:
    """While any thread is in PEFT's own forward pass, parametrizations are cached for all."""
    Truncation(mixture, RULES[0])
    one, two = (trained_adapter(mixture, RULES[0], seed) for seed in (0, 1))
    seen = []
    with parametrize.cached():
        for adapter in (one, two):
            install(mixture, adapter)
            seen.append(logits(mixture))
    torch.testing.assert_close(seen[1], logits(mixture))
    assert not torch.allclose(*seen)


def of_moe(make_config: Make, tiny_moe: Path, **changes: Any) -> Config:
    values: dict[str, Any] = {
        "model": {"name": str(tiny_moe), "device": "cpu"},
        "lora": {"target_parameters": STACKS},
        "federation": {"rounds": 2, "clients_per_round": 4},
        "training": {"learning_rate": 3e-2, "local_steps": 1},
    }
    return make_config(**{k: {**values.get(k, {}), **changes.get(k, {})} for k in values | changes})


METHODS = ["prelort", "zero-padding", "florist", "fedex-lora", "ffa-lora", "hetlora", "fslora"]


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning")
@pytest.mark.parametrize("name", METHODS)
def test_each_kind_of_method_trains_and_exports_experts(
    name: str, make_config: Make, tiny_moe: Path, tmp_path: Path
) -> None:
    """What is exported is loaded and compared, adapters by PEFT."""
    config = of_moe(make_config, tiny_moe, method={"name": name})
    learnt = prelort.run(config, tmp_path / "run").global_adapter
    moved = [n for n, f in learnt.layers.items() if ".experts." in n and f.B.any()]
    assert len(moved) > 8, "most of the 16 experts' matrices"
    prelort.export(tmp_path / "run", tmp_path / "merged", None, merge=True)


def test_a_server_without_weights_knows_the_experts(make_config: Make, tiny_moe: Path) -> None:
    config = of_moe(make_config, tiny_moe)
    bare = shapes(skeleton(config.model, config.lora, 4, "causal", labels=0), RULES[0])
    assert AdapterSchema.of(bare) == schema(adapted(tiny_moe, 4, target_parameters=STACKS))


def test_a_folder_is_read_as_it_was_written(mixture: PeftModel, tmp_path: Path) -> None:
    adapter = trained_adapter(mixture)
    peft_folder.save(adapter, tmp_path, mixture.peft_config[ADAPTER])
    loaded, _ = peft_folder.load(tmp_path)
    assert loaded.layers.keys() == adapter.layers.keys()
    for name, factors in adapter.layers.items():
        assert torch.equal(loaded.layers[name].A, factors.A)
        assert torch.equal(loaded.layers[name].B, factors.B)
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**values, "r": 3}))
    with pytest.raises(AdapterError, match="16 rows, which are not those of experts of rank 3"):
        peft_folder.load(tmp_path)
    mixture.save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match=r"target_parameters = .* of another tool"):
        peft_folder.load(tmp_path)


@pytest.mark.parametrize(
    "lora, sentence",
    [
        ({"target_parameters": ["experts.up"]}, "has experts.down_proj, experts.gate_up_proj"),
        ({"dropout": 0.1}, "dropout = 0.1 does not work with lora.target_parameters"),
        ({"target_modules": ["down_proj"]}, "experts, which are for lora.target_parameters"),
    ],
)
def test_what_cannot_be_adapted_is_refused(
    lora: dict[str, Any], sentence: str, make_config: Make, tiny_moe: Path, tmp_path: Path
) -> None:
    config = of_moe(make_config, tiny_moe, lora=lora)
    with pytest.raises(ConfigError, match=sentence):
        prelort.run(config, tmp_path / "run")


def test_examples_have_no_truncation_of_their_own(
    make_config: Make, tiny_moe: Path, tmp_path: Path
) -> None:
    config = of_moe(make_config, tiny_moe, method={"objective": "example"})
    with pytest.raises(ConfigError, match="cannot truncate each example by itself"):
        prelort.run(config, tmp_path / "run")
    merged = {"method": {"objective": "mean"}, "training": {"batch_truncations": True}}
    one = prelort.run(of_moe(make_config, tiny_moe, **merged), tmp_path / "merged")
    merged["training"] = {"batch_truncations": False}
    two = prelort.run(of_moe(make_config, tiny_moe, **merged), tmp_path / "apart")
    for name, tensor in two.global_adapter.tensors().items():
        assert torch.equal(tensor, one.global_adapter.tensors()[name])
