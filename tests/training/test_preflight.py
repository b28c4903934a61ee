"""What is refused before anything is trained, and that checking changes nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    DebertaV2Config,
    GPT2Config,
    OPTConfig,
    PreTrainedModel,
    RobertaConfig,
    XLNetConfig,
)

import prelort
from prelort.adapters import ScaleRule
from prelort.config import Config
from prelort.errors import ConfigError
from prelort.experiment.assemble import assemble, preflight
from prelort.models.lora import initial_adapter, lora_layers
from prelort.tasks import get, token_losses
from prelort.tasks.interface import Example
from prelort.training.preflight import check_examples, check_model, positions, rehearse
from prelort.training.runtime import ModelRuntime
from prelort.training.truncation import Truncation
from tiny_models import adapted, ragged_examples

RULE = ScaleRule("constant", 0.5)


def runtime_of(folder: Path) -> ModelRuntime:
    model = adapted(folder, 4)
    return ModelRuntime(model, Truncation(model, RULE), get("causal-lm"), pad_id=0)


def rehearsed(make_config: Callable[..., Config], runtime: ModelRuntime, folder: Path) -> Any:
    initial = initial_adapter(runtime.model, RULE, seed=0)
    return rehearse(make_config(), runtime, initial, ragged_examples(folder))


def test_nothing_is_changed(make_config: Callable[..., Config], tiny_llama: Path) -> None:
    runtime = runtime_of(tiny_llama)
    weights = {n: p.clone() for n, p in runtime.model.named_parameters() if "lora" not in n}
    modes = [module.training for module in runtime.model.modules()]
    state = torch.get_rng_state()
    found = rehearsed(make_config, runtime, tiny_llama)
    assert 4 < found.loss < 8
    assert not found.idle
    assert torch.equal(torch.get_rng_state(), state)
    assert modes == [module.training for module in runtime.model.modules()]
    after = dict(runtime.model.named_parameters())
    assert all(torch.equal(after[name], weight) for name, weight in weights.items())
    assert all(parameter.grad is None for parameter in after.values())


def counted(make_config: Callable[..., Config], tokenizer: Any, **texts: str) -> None:
    """Check one example of each client; an ``x`` is a word that the tokenizer does not know."""
    ids = {"x": tokenizer.unk_token_id, "e": tokenizer.eos_token_id}
    examples = {name: [Example([ids.get(c, 9) for c in own], 0)] for name, own in texts.items()}
    config = make_config(task="classification", data={"max_length": 12})
    check_examples(config, tokenizer, examples)


@pytest.fixture
def knows_not_all(tokenizer: Any) -> Any:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"unk_token": "<unk>"})
    return tokenizer


def test_unknown_tokens_are_said_or_refused(
    make_config: Callable[..., Config], knows_not_all: Any, recwarn: pytest.WarningsRecorder
) -> None:
    with pytest.raises(ConfigError, match="100% of the tokens of client 'b' are unknown to its"):
        counted(make_config, knows_not_all, a="eexxa", b="xxxe")
    with pytest.warns(UserWarning, match="50% of the tokens of client 'b' are unknown"):
        counted(make_config, knows_not_all, a="aaa", b="axe")
    recwarn.clear()
    counted(make_config, knows_not_all, a="aaaeee", b="e")
    assert not recwarn


def test_examples_that_are_cut_are_said(make_config: Callable[..., Config], tokenizer: Any) -> None:
    with pytest.warns(UserWarning, match="max_length = 12 tokens cuts 100% of .* client 'b'"):
        counted(make_config, tokenizer, a="aaa", b="a" * 12)


def test_a_rate_for_a_smaller_model_is_said(
    make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    assembly = assemble(make_config(training={"learning_rate": 0.1}))
    monkeypatch.setattr(PreTrainedModel, "num_parameters", lambda _: 4e8)
    with pytest.warns(UserWarning, match="learning_rate = 0.1 is high for a model of 400 million"):
        preflight(assembly)


def test_texts_longer_than_the_model_is_made_for_are_said(
    make_config: Callable[..., Config], tiny_llama: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    with pytest.warns(UserWarning, match="max_length = 400 is more than the 128 tokens for which"):
        check_model(make_config(data={"max_length": 400}), model, "causal")


class Wrong(torch.autograd.Function):
    """The identity with another gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0].flip(-1)


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda x: x.detach(), "is meant to learn and has no gradient"),
        (Wrong.apply, "the gradient of layers .* is wrong"),
        (lambda x: x * float("nan"), "the base model itself gives loss nan.*overflows"),
    ],
)
def test_a_broken_base_is_refused(
    make_config: Callable[..., Config],
    tiny_llama: Path,
    change: Callable[[Tensor], Tensor],
    says: str,
) -> None:
    runtime = runtime_of(tiny_llama)
    second = runtime.model.get_base_model().model.layers[1]
    second.register_forward_pre_hook(lambda module, inputs: (change(inputs[0]), *inputs[1:]))
    with pytest.raises(ConfigError, match=says):
        rehearsed(make_config, runtime, tiny_llama)


def test_an_adapted_layer_that_is_never_called_is_said(
    make_config: Callable[..., Config], tiny_llama: Path
) -> None:
    runtime = runtime_of(tiny_llama)
    del runtime.model.get_base_model().model.layers[1]
    runtime.model.get_base_model().model.config.num_hidden_layers = 1
    spare = lora_layers(runtime.model)["model.layers.0.mlp.up_proj"]
    runtime.model.get_base_model().add_module("spare", spare)
    runtime.model.get_base_model().model.layers[0].mlp.up_proj = torch.nn.Linear(32, 48, bias=False)
    with pytest.warns(UserWarning, match=r"uses 1 of its adapted layers on no text.*spare"):
        assert rehearsed(make_config, runtime, tiny_llama).idle == ("spare",)


def test_a_layer_whose_output_nobody_reads_is_no_broken_backward_pass(
    make_config: Callable[..., Config], tiny_llama: Path
) -> None:
    """As BigBird's pooler in a classification."""
    runtime = runtime_of(tiny_llama)
    inner = runtime.model.get_base_model().model
    spare = inner.layers[1].mlp
    inner.layers[1].mlp = torch.nn.Identity()
    inner.layers[0].add_module("spare", spare)
    inner.layers[0].register_forward_pre_hook(lambda _, inputs: (spare(inputs[0]), None)[1])
    with pytest.warns(UserWarning, match=r"uses 3 of its adapted layers on no text.*down_proj"):
        assert len(rehearsed(make_config, runtime, tiny_llama).idle) == 3


def test_damaged_weights_are_named_before_any_training(
    make_config: Callable[..., Config], tiny_llama: Path, tmp_path: Path, tokenizer: Any
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    config = make_config(model={"name": str(tmp_path / "base")})
    with pytest.raises(ConfigError, match=r"damaged, 'model\.layers\.0\.self_attn\.q_proj' has"):
        prelort.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_masked_language_model_and_tokens_without_a_row_are_refused(
    make_config: Callable[..., Config], tmp_path: Path, tokenizer: Any
) -> None:
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    small |= {"num_attention_heads": 4, "pad_token_id": 0}
    BertForMaskedLM(BertConfig(vocab_size=300, **small)).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    with pytest.raises(ConfigError, match="is no causal language model"):
        prelort.run(make_config(model={"name": str(tmp_path / "bert")}), tmp_path / "run")
    config = BertConfig(vocab_size=200, is_decoder=True, **small)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "few")
    tokenizer.save_pretrained(tmp_path / "few")
    with pytest.raises(ConfigError, match=r"have token \d+ .* its embedding has 200 rows"):
        prelort.run(make_config(model={"name": str(tmp_path / "few")}), tmp_path / "run")


def test_a_base_that_looks_ahead_is_refused_whatever_it_is_called(
    make_config: Callable[..., Config], tiny_llama: Path
) -> None:
    runtime = runtime_of(tiny_llama)
    for layer in runtime.model.get_base_model().model.layers:
        layer.register_forward_hook(lambda module, inputs, output: output + output.mean(1, True))
    with pytest.raises(ConfigError, match="is no causal language model"):
        rehearsed(make_config, runtime, tiny_llama)


def test_a_head_that_mixes_tokens_is_said_and_computes_all_logits_at_once(
    make_config: Callable[..., Config], tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = runtime_of(tiny_llama)
    head = runtime.model.get_base_model().lm_head
    head.register_forward_pre_hook(lambda module, inputs: (inputs[0].cumsum(1),))
    expected = runtime.task.losses(
        runtime.model, runtime.task.collate(ragged_examples(tiny_llama), 0)
    )
    with pytest.warns(UserWarning, match="does not compute its logits token by token"):
        rehearsed(make_config, runtime, tiny_llama)
    monkeypatch.setattr(token_losses, "LIMIT", 1)
    found = runtime.task.losses(runtime.model, runtime.task.collate(ragged_examples(tiny_llama), 0))
    assert torch.equal(found, expected)


WIDTHS = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    "auto, shape, longest",
    [
        (AutoModelForCausalLM, GPT2Config(**WIDTHS), 64),
        (AutoModelForCausalLM, OPTConfig(**WIDTHS, ffn_dim=48, word_embed_proj_dim=32), 64),
        (AutoModelForSequenceClassification, RobertaConfig(**WIDTHS, pad_token_id=1), 62),
    ],
    ids=["gpt2", "opt", "roberta"],
)
def test_the_positions_of_a_table_are_those_that_can_be_used(
    auto: Any, shape: Any, longest: int
) -> None:
    """The model runs at that length and fails at the next."""
    with torch.device("meta"):
        assert positions(auto.from_config(shape)) == longest
    model = auto.from_config(shape)
    model(input_ids=torch.full((1, longest), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, longest + 1), 5))


def test_a_length_beyond_the_positions_is_refused(
    make_config: Callable[..., Config], tiny_gpt2: Path, tmp_path: Path
) -> None:
    config = make_config(model={"name": str(tiny_gpt2)}, data={"max_length": 400})
    with pytest.raises(ConfigError, match=r"data\.max_length = 400 is more than the 128 positions"):
        prelort.run(config, tmp_path / "run")


@pytest.mark.parametrize(
    "shape",
    [
        DebertaV2Config(
            **WIDTHS, intermediate_size=48, relative_attention=True, pos_att_type=["p2c", "c2p"]
        ),
        XLNetConfig(vocab_size=300, d_model=32, n_layer=1, n_head=4, d_inner=48),
    ],
    ids=["deberta", "xlnet"],
)
def test_a_model_that_cannot_truncate_each_example_truncates_each_step(
    make_config: Callable[..., Config], tmp_path: Path, tokenizer: Any, shape: Any
) -> None:
    AutoModel.from_config(shape).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    changes: dict[str, Any] = {
        "task": "classification",
        "model": {"name": str(tmp_path / "base")},
        "data": {"max_length": 8},  # as many tokens as examples: sizes do not tell them apart
        "training": {"batch_size": 8},
        "federation": {"rounds": 1, "clients_per_round": 4, "quorum": 4},
    }

    def same(one: prelort.RunResult, other: prelort.RunResult) -> bool:
        theirs = other.global_adapter.tensors()
        return all(torch.equal(t, theirs[name]) for name, t in one.global_adapter.tensors().items())

    with pytest.warns(UserWarning, match=r"under method\.objective = 'step'"):
        result = prelort.run(make_config(**changes), tmp_path / "run")
    step = prelort.run(make_config(**changes, method={"objective": "step"}), tmp_path / "step")
    assert same(result, step)
    changes["federation"]["clients_per_batch"] = 4
    batched = prelort.run(make_config(**changes), tmp_path / "batched")
    assert same(result, batched)
    with pytest.raises(ConfigError, match="objective = 'example' does not work with"):
        prelort.run(make_config(**changes, method={"objective": "example"}), tmp_path / "refused")
