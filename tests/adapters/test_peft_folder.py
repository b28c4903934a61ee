from __future__ import annotations

import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from prelort.adapters import ScaleRule, peft_folder
from prelort.errors import AdapterError
from random_adapters import DIMENSIONS, random_adapter, ranks, same_bits, scale_rules, seeds

TEMPLATE = LoraConfig(
    target_modules=list(DIMENSIONS), modules_to_save=["score"], base_model_name_or_path="base"
)


@pytest.fixture
def folder(tmp_path):
    """A good folder of rank 4 to spoil."""
    peft_folder.save(random_adapter(4), tmp_path / "adapter", TEMPLATE)
    return tmp_path / "adapter"


def rewrite_config(folder, **changes):
    path = folder / peft_folder.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite_tensors(folder, change, metadata=None):
    tensors = load_file(folder / peft_folder.WEIGHTS)
    change(tensors)
    save_file(tensors, folder / peft_folder.WEIGHTS, metadata)


def drop_header(folder):
    """What a folder by another tool has: no record of the exact scale."""
    rewrite_tensors(folder, lambda tensors: None, {"format": "pt"})


# Round trips


@settings(
    deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    own=st.tuples(ranks, ranks),
    rule=scale_rules | st.builds(ScaleRule, st.just("constant"), st.floats(1e-3, 1e3)),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    modules_to_save=st.booleans(),
    seed=seeds,
)
def test_a_folder_gives_the_adapter_back_bit_for_bit(
    tmp_path, own, rule, dtype, modules_to_save, seed
):
    adapter = random_adapter(
        list(own), seed, scale=rule, dtype=dtype, modules_to_save=modules_to_save
    )
    peft_folder.save(adapter, tmp_path, TEMPLATE)
    loaded, config = peft_folder.load(tmp_path)
    assert same_bits(loaded, adapter)
    assert loaded.scale == rule
    assert config.r == max(own)
    assert config.base_model_name_or_path == "base"


@settings(
    deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(own=st.tuples(ranks, ranks), rule=scale_rules)
def test_without_our_header_the_rule_is_read_from_pefts_configuration(tmp_path, own, rule):
    peft_folder.save(random_adapter(list(own), scale=rule), tmp_path, TEMPLATE)
    drop_header(tmp_path)
    loaded, _ = peft_folder.load(tmp_path)
    assert loaded.scale.kind == rule.kind
    assert loaded.scale.value == pytest.approx(rule.value, rel=1e-12)


def test_a_pattern_does_not_reach_a_layer_whose_name_ends_alike(tmp_path):
    dimensions = {"q": (5, 5), "inner.q": (5, 5), "inner-q": (5, 5)}
    adapter = random_adapter([2, 4, 4], dimensions=dimensions)
    peft_folder.save(adapter, tmp_path, TEMPLATE)
    assert same_bits(peft_folder.load(tmp_path)[0], adapter)


def test_equal_adapters_are_equal_files(tmp_path):
    for name, targets in (("one", ["wide", "tall", "x"]), ("two", ["x", "tall", "wide"])):
        template = LoraConfig(target_modules=targets, modules_to_save=["score"])
        peft_folder.save(random_adapter([4, 2]), tmp_path / name, template)
    for file in (peft_folder.WEIGHTS, peft_folder.CONFIG):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


OF_PEFT_0_13 = """
alpha_pattern auto_mapping base_model_name_or_path bias fan_in_fan_out inference_mode
init_lora_weights layer_replication layers_pattern layers_to_transform loftq_config lora_alpha
lora_dropout megatron_config megatron_core modules_to_save peft_type r rank_pattern revision
target_modules task_type use_dora use_rslora
"""


@pytest.mark.parametrize("kind", ["constant", "rslora"])
def test_older_releases_know_every_key_and_its_meaning(tmp_path, kind):
    """They refuse unknown keys, and take a pattern's key as a layer's whole name."""
    peft_folder.save(random_adapter([4, 2], scale=ScaleRule(kind, 2.0)), tmp_path, TEMPLATE)
    values = json.loads((tmp_path / peft_folder.CONFIG).read_text())
    assert values.keys() <= {*OF_PEFT_0_13.split()}
    assert values["rank_pattern"] in ({"tall": 2}, {"wide": 2})
    assert None not in [values[key] for key in values if key != "task_type"]


# Strictness


def test_a_missing_folder_or_file_is_named(tmp_path, folder):
    with pytest.raises(AdapterError, match=r"nowhere/adapter_config\.json' does not exist"):
        peft_folder.load(tmp_path / "nowhere")
    for name in (peft_folder.WEIGHTS, peft_folder.CONFIG):
        (folder / name).unlink()
        with pytest.raises(AdapterError, match=f"{name}' does not exist"):
            peft_folder.load(folder)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_weights_are_named(folder, keep):
    path = folder / peft_folder.WEIGHTS
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(AdapterError, match=r"safetensors' is not a whole safetensors file"):
        peft_folder.load(folder)


@pytest.mark.parametrize(
    "key, value, says",
    [
        ("use_dora", True, "DoRA"),
        ("lora_bias", True, "biases"),
        ("bias", "all", "bias = 'all'"),
        ("target_parameters", ["mlp.experts.up"], r"'mlp\.experts\.lora_A\.weight' is missing"),
        ("use_qalora", True, "use_qalora"),
        ("alora_invocation_tokens", [1, 2], "alora_invocation_tokens"),
        ("kasa_config", {"beta": 0.1}, "kasa_config"),
        ("layer_replication", [[0, 1], [0, 1]], "layer_replication"),
        ("init_lora_weights", "pissa_niter_4", "init_lora_weights"),
        ("init_lora_weights", "olora", "init_lora_weights"),
        ("peft_type", "IA3", "peft_type 'IA3' is not 'LORA'"),
    ],
)
def test_variants_that_compute_something_else_are_named(folder, key, value, says):
    rewrite_config(folder, **{key: value})
    with pytest.raises(AdapterError, match=says):
        peft_folder.load(folder)


@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_a_missing_factor_is_named(folder, factor):
    rewrite_tensors(folder, lambda t: t.pop(f"base_model.model.tall.{factor}.weight"))
    with pytest.raises(AdapterError, match=rf"'tall\.{factor}\.weight' is missing"):
        peft_folder.load(folder)
    rewrite_tensors(folder, lambda t: [t.pop(n) for n in list(t) if "lora" in n])
    with pytest.raises(AdapterError, match="no LoRA layer"):
        peft_folder.load(folder)


@pytest.mark.parametrize(
    "name, says",
    [
        ("other.weight", "does not start with 'base_model.model.'"),
        ("base_model.model.other.weight", "tensor 'other.weight' is surplus"),
        ("base_model.model.embed.lora_embedding_A", "'embed.lora_embedding_A' is not supported"),
        ("base_model.model.tall.lora_B.bias", "'tall.lora_B.bias' is not supported"),
        ("base_model.model.tall.lora_magnitude_vector", "lora_magnitude_vector' is not supported"),
    ],
)
def test_a_surplus_tensor_is_named(folder, name, says):
    rewrite_tensors(folder, lambda t: t.update({name: torch.zeros(2)}))
    with pytest.raises(AdapterError, match=says):
        peft_folder.load(folder)


@pytest.mark.parametrize("module", ["score", "head.score", "core"])
def test_modules_to_save_are_matched_as_peft_matches_them(folder, module):
    """At the end of the module's name, dots or not."""
    name = "base_model.model.head.score.weight"
    rewrite_config(folder, modules_to_save=[module])
    rewrite_tensors(folder, lambda t: t.update({name: t.pop("base_model.model.score.weight")}))
    assert list(peft_folder.load(folder)[0].modules_to_save) == ["head.score.weight"]


def test_a_rank_that_contradicts_the_configuration_is_named(folder):
    rewrite_config(folder, r=3)
    with pytest.raises(AdapterError, match=r"lora_A\.weight' has rank 4, but .*json says 3"):
        peft_folder.load(folder)
    rewrite_config(folder, r=4, rank_pattern={"tall": 2})
    with pytest.raises(AdapterError, match=r"'tall\.lora_A\.weight' has rank 4, .* says 2"):
        peft_folder.load(folder)


@pytest.mark.parametrize(
    "changes", [{"alpha_pattern": {"tall": 1}}, {"use_rslora": True, "alpha_pattern": {"tall": 1}}]
)
def test_layers_at_different_scales_are_refused(folder, changes):
    rewrite_config(folder, **changes)
    with pytest.raises(AdapterError, match=r"scales differ .* one rule is needed"):
        peft_folder.load(folder)


@pytest.mark.parametrize("changes", [{"lora_alpha": 16}, {"use_rslora": True}])
def test_a_header_that_contradicts_the_configuration_is_refused(folder, changes):
    rewrite_config(folder, **changes)
    with pytest.raises(AdapterError, match=r"says scale constant 2, but adapter_config\.json says"):
        peft_folder.load(folder)
