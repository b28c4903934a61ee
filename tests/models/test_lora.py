from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from prelort.adapters import AdapterSchema, Factors, LoraAdapter, ScaleRule, peft_folder
from prelort.errors import AdapterError, ConfigError
from prelort.models.lora import (
    ADAPTER,
    extract,
    initial_adapter,
    install,
    lora_layers,
    schema,
    trainable,
)
from random_adapters import same_bits
from tiny_models import adapted, base_model, kind_of, logits, trained_adapter

RULES = [ScaleRule("constant", 0.7), ScaleRule("rslora", 1.3)]
rules = pytest.mark.parametrize("rule", RULES, ids=str)

PATTERNS = {"llama": "q_proj", "gpt2": "c_attn", "bert": "query"}
"""Per model, the end of the names of some layers."""


# Attach


def test_layers_and_extras_have_the_base_models_own_names(folder):
    model = adapted(folder, 4)
    own = {name for name, _ in base_model(folder).named_modules()}
    assert lora_layers(model).keys() <= own
    modules_to_save = set(extract(model, RULES[0]).modules_to_save)
    assert modules_to_save == (
        {"classifier.weight", "classifier.bias"} if "bert" in folder.name else set()
    )


def test_all_linear_layers_but_the_output_are_adapted(folder):
    names = set(lora_layers(adapted(folder, 4)))
    per_block = {"llama": 7, "gpt2": 4, "bert": 6}[folder.name]
    pooler = folder.name == "bert"
    assert len(names) == 2 * per_block + pooler
    assert not names & {"lm_head", "classifier"}


@pytest.mark.parametrize("names", ["nothing", ("nothing", "nobody"), ("q_proj", "nobody")])
def test_target_modules_that_match_nothing_are_an_error_that_lists_what_exists(tiny_llama, names):
    with pytest.raises(ConfigError, match=r"lora\.target_modules .* down_proj, .* q_proj") as error:
        adapted(tiny_llama, target_modules=names)
    wrong = "nothing" if "nothing" in names else "nobody"
    assert f"'{wrong}'" in str(error.value)


@pytest.mark.parametrize("name", ["embed_tokens", "norm"])
def test_modules_that_are_no_linear_layers_are_refused(tiny_llama, name):
    with pytest.raises(ConfigError, match=rf"lora\.target_modules .*'{name}'"):
        adapted(tiny_llama, target_modules=("q_proj", name))


def test_target_modules_may_be_names_with_dots(tiny_llama):
    names = lora_layers(adapted(tiny_llama, target_modules=("0.mlp.up_proj", "v_proj")))
    assert set(names) == {
        "model.layers.0.mlp.up_proj",
        "model.layers.0.self_attn.v_proj",
        "model.layers.1.self_attn.v_proj",
    }


def test_modules_to_save_that_match_nothing_are_an_error(tiny_llama):
    with pytest.raises(ConfigError, match=r"lora\.modules_to_save: 'classifier'"):
        adapted(tiny_llama, modules_to_save=("classifier",))


def test_a_rank_pattern_that_matches_nothing_is_an_error(tiny_llama):
    with pytest.raises(ConfigError, match=r"lora\.rank_pattern: 'query' matches no"):
        adapted(tiny_llama, rank_pattern={"query": 2})


def test_a_rank_pattern_bounds_its_layers(folder):
    end = PATTERNS[folder.name]
    ranks = {
        n: r for n, (_, _, r) in schema(adapted(folder, 8, rank_pattern={end: 3})).layers.items()
    }
    assert all(rank == (3 if name.endswith(end) else 8) for name, rank in ranks.items())
    assert 3 in ranks.values()


def test_a_module_trained_in_full_is_an_extra(tiny_llama):
    model = adapted(tiny_llama, 4, modules_to_save=("lm_head",))
    adapter = trained_adapter(model)
    assert list(adapter.modules_to_save) == ["lm_head.weight"]
    before = logits(model)
    install(model, adapter)
    assert not torch.allclose(logits(model), before)


# The first adapter


def test_the_initial_adapter_leaves_the_function_as_it_is(folder):
    model = adapted(folder, 4)
    install(model, initial_adapter(model, RULES[0], seed=1))
    torch.testing.assert_close(logits(model), logits(base_model(folder)), rtol=0, atol=0)


def test_the_initial_a_is_uniform_in_pefts_bound_and_b_is_zero(tiny_llama):
    adapter = initial_adapter(adapted(tiny_llama, 64), RULES[0], seed=1)
    for factors in adapter.layers.values():
        bound = 1 / math.sqrt(factors.A.shape[1])
        assert not factors.B.any()
        assert 0.95 * bound < float(factors.A.abs().max()) <= bound
        assert float(factors.A.std()) == pytest.approx(bound / math.sqrt(3), rel=0.1)
        assert abs(float(factors.A.mean())) < 0.1 * bound


def test_the_initial_bound_is_that_of_peft_itself(tiny_llama):
    config = LoraConfig(r=64, target_modules=["q_proj"])
    plain = extract(get_peft_model(base_model(tiny_llama), config), RULES[0])
    ours = initial_adapter(adapted(tiny_llama, 64, target_modules="q_proj"), RULES[0], seed=1)
    for name, factors in ours.layers.items():
        assert float(factors.A.abs().max()) == pytest.approx(
            float(plain.layers[name].A.abs().max()), rel=0.05
        )


def test_the_initial_adapter_depends_on_the_seed_alone(tiny_llama):
    torch.manual_seed(1)
    first = initial_adapter(adapted(tiny_llama, 8), RULES[0], seed=7)
    torch.manual_seed(2)
    model = adapted(tiny_llama, 8)
    before = torch.get_rng_state()
    second = initial_adapter(model, RULES[0], seed=7)
    assert torch.equal(torch.get_rng_state(), before)
    assert same_bits(first, second)
    other = initial_adapter(model, RULES[0], seed=8)
    assert not any(torch.equal(f.A, other.layers[n].A) for n, f in first.layers.items())


# Install and extract


@rules
def test_what_is_installed_is_extracted_bit_for_bit(folder, rule):
    model = adapted(folder, 8, rank_pattern={PATTERNS[folder.name]: 3})
    adapter = trained_adapter(model, rule)
    for rank in (8, 1, 5, 8):
        install(model, adapter.prefix(rank))
        assert same_bits(extract(model, rule), adapter.prefix(rank))
        assert schema(model) == AdapterSchema.of(adapter.prefix(rank))


def test_installing_copies_and_extracting_copies(folder):
    model = adapted(folder, 4)
    adapter = trained_adapter(model)
    before = {n: t.clone() for n, t in adapter.tensors().items()}
    install(model, adapter)
    taken = extract(model, adapter.scale)
    with torch.no_grad():
        for parameters in trainable(model):
            for parameter in parameters:
                parameter.add_(1.0)
    for found in (adapter, taken):
        assert all(torch.equal(t, before[n]) for n, t in found.tensors().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_is_stored_in_half_is_trained_in_float32(tiny_llama, dtype):
    model = adapted(tiny_llama, 4)
    adapter = trained_adapter(model).to(dtype)
    install(model, adapter)
    assert {p.dtype for p in trainable(model)[1]} == {torch.float32}
    assert same_bits(extract(model, adapter.scale), adapter.to(torch.float32))


@rules
def test_the_scale_of_every_layer_is_that_of_its_rank_in_use(folder, rule):
    model = adapted(folder, 8, rank_pattern={PATTERNS[folder.name]: 3})
    install(model, trained_adapter(model, rule).prefix(5))
    for name, layer in lora_layers(model).items():
        rank = 3 if name.endswith(PATTERNS[folder.name]) else 5
        assert layer.scaling[ADAPTER] == rule(rank)
        assert layer.r[ADAPTER] == rank


def spoilt(adapter: LoraAdapter, how: str) -> LoraAdapter:
    layers, name = dict(adapter.layers), min(adapter.layers)
    a, b = layers[name].A, layers[name].B
    if how == "missing layer":
        del layers[name]
    elif how == "surplus layer":
        layers["elsewhere"] = layers[name]
    elif how == "other d_in":
        layers[name] = Factors(torch.zeros(a.shape[0], a.shape[1] + 1), b)
    else:
        layers[name] = Factors(a, torch.zeros(b.shape[0] - 1, b.shape[1]))
    return replace(adapter, layers=layers)


@pytest.mark.parametrize("how", ["missing layer", "surplus layer", "other d_in", "other d_out"])
def test_a_layer_that_does_not_fit_is_named_and_nothing_is_installed(folder, how):
    model = adapted(folder, 4)
    good = trained_adapter(model)
    install(model, good)
    bad = spoilt(trained_adapter(model, seed=1), how)
    name = "elsewhere" if how == "surplus layer" else min(good.layers)
    with pytest.raises(AdapterError, match=rf"layer '{name}'"):
        install(model, bad)
    assert same_bits(extract(model, good.scale), good)


@pytest.mark.parametrize("how", ["missing", "surplus", "shape"])
def test_an_extra_that_does_not_fit_is_named_and_nothing_is_installed(tiny_bert, how):
    model = adapted(tiny_bert, 4)
    good = trained_adapter(model)
    install(model, good)
    modules_to_save = dict(trained_adapter(model, seed=1).modules_to_save)
    if how == "missing":
        del modules_to_save["classifier.bias"]
    elif how == "surplus":
        modules_to_save["classifier.scale"] = torch.zeros(3)
    else:
        modules_to_save["classifier.bias"] = torch.zeros(4)
    name = "classifier.scale" if how == "surplus" else "classifier.bias"
    with pytest.raises(AdapterError, match=rf"tensor '{name}'"):
        install(model, replace(trained_adapter(model, seed=1), modules_to_save=modules_to_save))
    assert same_bits(extract(model, good.scale), good)


# Plain PEFT


@rules
@pytest.mark.parametrize("pattern", [False, True], ids=["one rank", "rank_pattern"])
def test_plain_peft_computes_the_installed_prefix_at_each_rank(folder, rule, pattern, tmp_path):
    settings = {"scale_rule": rule.kind, "scale": rule.value}
    if pattern:
        settings["rank_pattern"] = {PATTERNS[folder.name]: 3}
    model = adapted(folder, 8, **settings)
    adapter = trained_adapter(model, rule)
    template = model.peft_config[ADAPTER]
    seen = []
    for rank in (1, 2, 3, 5, 8):
        install(model, adapter.prefix(rank))
        seen.append(logits(model))
        peft_folder.save(adapter.prefix(rank), tmp_path / str(rank), template)
        plain = PeftModel.from_pretrained(base_model(folder), tmp_path / str(rank)).eval()
        torch.testing.assert_close(logits(plain), seen[-1], rtol=1e-6, atol=1e-6)
    assert all(float((x - seen[-1]).abs().max()) > 1e-2 for x in seen[:-1])


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("pattern", [False, True], ids=["one rank", "rank_pattern"])
def test_a_folder_that_plain_peft_wrote_is_the_same_function_here(
    folder, rslora, pattern, tmp_path
):
    end = PATTERNS[folder.name]
    config = LoraConfig(
        task_type="SEQ_CLS" if kind_of(folder) == "classification" else "CAUSAL_LM",
        r=6,
        lora_alpha=9,
        use_rslora=rslora,
        target_modules="all-linear",
        rank_pattern={end: 2} if pattern else {},
        alpha_pattern={end: 9 if rslora else 3} if pattern else {},
        init_lora_weights=False,
        fan_in_fan_out=folder.name == "gpt2",
    )
    torch.manual_seed(3)
    plain = get_peft_model(base_model(folder), config).eval()
    plain.save_pretrained(tmp_path)
    adapter, _ = peft_folder.load(tmp_path)
    assert adapter.scale == ScaleRule("rslora" if rslora else "constant", 9.0 if rslora else 1.5)
    model = adapted(folder, 8)
    install(model, adapter)
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-6, atol=1e-6)


def test_lora_layers_that_plain_peft_put_on_embeddings_are_refused(tiny_llama, tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"], task_type="CAUSAL_LM")
    get_peft_model(base_model(tiny_llama), config).save_pretrained(
        tmp_path, save_embedding_layers=False
    )
    with pytest.raises(AdapterError, match=r"'model\.embed_tokens\.lora_embedding_[AB]'"):
        peft_folder.load(tmp_path)


def test_a_dora_folder_that_plain_peft_wrote_is_refused(tiny_llama, tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj"], use_dora=True, task_type="CAUSAL_LM")
    get_peft_model(base_model(tiny_llama), config).save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="DoRA"):
        peft_folder.load(tmp_path)
