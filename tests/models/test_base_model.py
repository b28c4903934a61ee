from __future__ import annotations

import json
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from prelort.config import ModelConfig
from prelort.errors import ConfigError
from prelort.models import base
from prelort.models.base import (
    device_of,
    fingerprint,
    linear_algebra_device,
    load_model,
    load_tokenizer,
)
from tiny_models import LABELS, base_model, logits, token_batch


def config_of(folder, **settings):
    return ModelConfig(name=str(folder), device="cpu", **settings)


@pytest.fixture
def copy(tiny_llama, tmp_path):
    """A copy of the tiny Llama to change."""
    return shutil.copytree(tiny_llama, tmp_path / "elsewhere" / "copied")


def change_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_loaded_model_is_frozen_and_pads_with_the_given_token(tiny_llama):
    model = load_model(config_of(tiny_llama), "causal", pad_id=1)
    assert not any(p.requires_grad for p in model.parameters())
    assert model.config.pad_token_id == 1
    assert model.generation_config.pad_token_id == 1


def test_a_loaded_model_is_the_saved_one(tiny_llama):
    plain = AutoModelForCausalLM.from_pretrained(tiny_llama)
    assert torch.equal(logits(base_model(tiny_llama)), logits(plain.eval()))


def test_a_classification_head_has_the_given_labels_and_follows_the_global_seed(tiny_bert):
    heads = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        model = load_model(config_of(tiny_bert), "classification", LABELS, pad_id=0)
        assert model.config.id2label == dict(enumerate(LABELS))
        heads.append(model.classifier.weight)
    assert heads[0].shape == (3, 32)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_base_is_loaded_in_the_type_asked_for(tiny_llama, dtype):
    model = base_model(tiny_llama, dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}


def test_a_tokenizer_without_padding_pads_as_the_model_says_or_with_its_end(tiny_llama, copy):
    assert load_tokenizer(config_of(tiny_llama)).pad_token == "<pad>"
    path = copy / "tokenizer_config.json"
    values = json.loads(path.read_text())
    del values["pad_token"]
    path.write_text(json.dumps(values))
    assert load_tokenizer(config_of(copy)).pad_token == "<pad>"
    change_config(copy, pad_token_id=None)
    assert load_tokenizer(config_of(copy)).pad_token == "<eos>"
    del values["eos_token"]
    path.write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=r"copied'.*no padding token"):
        load_tokenizer(config_of(copy))


# Fingerprint


def test_the_fingerprint_of_a_copied_folder_is_the_same(tiny_llama, copy):
    assert fingerprint(config_of(copy)) == fingerprint(config_of(tiny_llama))


def test_the_fingerprint_does_not_depend_on_how_the_model_is_loaded(tiny_llama):
    assert fingerprint(config_of(tiny_llama, dtype="bfloat16")) == fingerprint(
        config_of(tiny_llama)
    )


def test_one_changed_number_of_one_weight_changes_the_fingerprint(copy):
    before = fingerprint(config_of(copy))
    tensors = load_file(copy / "model.safetensors")
    for name in tensors:
        changed = tensors | {name: tensors[name].clone()}
        changed[name].view(-1)[-1] += 1e-3
        save_file(changed, copy / "model.safetensors", {"format": "pt"})
        assert fingerprint(config_of(copy)) != before, name


def test_another_configuration_changes_the_fingerprint(copy):
    before = fingerprint(config_of(copy))
    change_config(copy, rope_theta=777.0, rms_norm_eps=1e-2)
    assert fingerprint(config_of(copy)) != before


def test_sharded_weights_have_a_fingerprint_of_all_shards(tiny_llama, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    before = fingerprint(config_of(tmp_path))
    for shard in shards:
        whole = shard.read_bytes()
        shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        assert fingerprint(config_of(tmp_path)) != before, shard.name
        shard.write_bytes(whole)
    assert fingerprint(config_of(tmp_path)) == before


def test_a_folder_in_the_home_directory_is_found(copy, monkeypatch):
    monkeypatch.setenv("HOME", str(copy.parent))
    config = ModelConfig(name="~/copied", device="cpu")
    assert fingerprint(config) == fingerprint(config_of(copy))
    assert load_model(config, "causal", pad_id=0) is not None


# What bad input gets


def test_cuda_asked_for_and_absent_is_an_error(tiny_llama, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("cuda", "cuda:1"):
        with pytest.raises(ConfigError, match=rf"model\.device = '{name}', but no CUDA device"):
            load_model(ModelConfig(name=str(tiny_llama), device=name), "causal", pad_id=0)
    assert device_of("auto") == torch.device("cpu")


@pytest.mark.parametrize("there", [False, True])
def test_a_server_computes_on_cuda_if_it_has_it(there, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert linear_algebra_device("cpu") == torch.device("cpu")
    assert linear_algebra_device("auto") == torch.device("cuda" if there else "cpu")
    assert linear_algebra_device("cuda:1") == torch.device("cuda:1" if there else "cpu")


def test_a_base_over_several_devices_must_fit_them(tiny_llama, monkeypatch):
    config = ModelConfig(name=str(tiny_llama), device="balanced")
    assert load_model(config, "causal", pad_id=0).device.type == "cpu"  # all that there is
    monkeypatch.setattr(base, "device_of", lambda name: torch.device("cuda"))
    places = {"model.layers.0": 0, "model.layers.1": "cpu"}
    monkeypatch.setattr(LlamaForCausalLM, "hf_device_map", places, raising=False)
    with pytest.raises(ConfigError, match=r"no room for .model\.layers\.1"):
        load_model(config, "causal", pad_id=0)


def test_an_unknown_device_is_an_error():
    with pytest.raises(ConfigError, match=r"'gpu' is unknown: use auto, cpu, cuda or balanced"):
        device_of("gpu")


@pytest.mark.parametrize("what", [fingerprint, load_tokenizer])
@pytest.mark.parametrize("name", ["/no/such/folder", "./nowhere", "~/nowhere", "a/b/c"])
def test_a_folder_that_does_not_exist_is_named(what, name):
    with pytest.raises(ConfigError, match=rf"model\.name = '{name}': there is no such folder"):
        what(ModelConfig(name=name))


def test_a_folder_without_a_model_is_named(tmp_path):
    for what in (fingerprint, load_tokenizer, lambda c: load_model(c, "causal", pad_id=0)):
        with pytest.raises(ConfigError, match=rf"model\.name = '{tmp_path}': its .* cannot be"):
            what(config_of(tmp_path))


class Trap:
    """Ends the test run if it is ever unpickled."""

    def __reduce__(self):
        return exec, ("raise SystemExit('unpickled')",)


def test_pickled_weights_are_refused_without_being_opened(copy):
    (copy / "model.safetensors").unlink()
    (copy / "pytorch_model.bin").write_bytes(pickle.dumps({"lm_head.weight": Trap()}))
    with pytest.raises(ConfigError, match=r"copied'.*safetensors"):
        load_model(config_of(copy), "causal", pad_id=0)
    with pytest.raises(ConfigError, match=r"has no safetensors weights \(model\.safetensors\)"):
        fingerprint(config_of(copy))


@pytest.mark.parametrize("keep", [0, 100, -7])
def test_truncated_weights_are_named(copy, keep):
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ConfigError, match=r"copied': its model cannot be loaded"):
        load_model(config_of(copy), "causal", pad_id=0)


def test_a_causal_model_that_lacks_weights_is_refused(copy):
    """Transformers would draw them at random, and nobody would train them."""
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(config_of(copy), "causal", pad_id=0)


def test_tied_weights_are_not_missing(tiny_gpt2):
    model = base_model(tiny_gpt2)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert torch.isfinite(logits(model, token_batch())).all()


def test_an_encoder_of_other_shapes_is_refused_even_where_a_head_may_be_new(tiny_bert, tmp_path):
    folder = shutil.copytree(tiny_bert, tmp_path / "copied")
    change_config(folder, intermediate_size=64)
    with pytest.raises(ConfigError, match=r"lack 'bert\.encoder\.layer\.0\.intermediate"):
        load_model(config_of(folder), "classification", LABELS, pad_id=0)
    change_config(folder, intermediate_size=48)
    assert load_model(config_of(folder), "classification", LABELS, pad_id=0) is not None


def test_the_attention_is_the_one_that_is_configured(tiny_llama):
    for given, used in {"auto": "sdpa", "sdpa": "sdpa", "eager": "eager"}.items():
        model = load_model(config_of(tiny_llama, attention=given), "causal", pad_id=0)
        assert model.config._attn_implementation == used
    with pytest.raises(ConfigError, match="'flash_attention_2' needs the package flash-attn"):
        load_model(config_of(tiny_llama, attention="flash_attention_2"), "causal", pad_id=0)
