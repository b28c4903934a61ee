"""The base model: loaded from a local folder, a hub name or the package; never unpickled."""

from __future__ import annotations

import hashlib
import importlib.resources
import importlib.util
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)
from transformers.utils import cached_file

from prelort import hub
from prelort.config import EMBEDDED, ModelConfig
from prelort.errors import ConfigError

_BLOCK = 4096
_BLOCKS = 64


def location(name: str) -> str:
    """The path or hub name behind ``model.name``."""
    if name != EMBEDDED:
        return name
    return str(importlib.resources.files("prelort") / "embedded" / "base")


def device_of(name: str) -> torch.device:
    """The device that ``model.device`` names. Raises `ConfigError` for CUDA where there is none."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"model.device = {name!r} is unknown: use auto, cpu or cuda") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"model.device = {name!r}, but no CUDA device is available: use 'cpu'")
    return device


def load_configuration(config: ModelConfig) -> PretrainedConfig:
    """The base model's configuration, without its weights. Raises `ConfigError`."""
    return _from_pretrained(AutoConfig, config, "configuration")


def check_kind(config: ModelConfig, kind: str) -> None:
    """Raise `ConfigError` for an encoder where the task needs a causal language model.

    transformers would give it a head that was never trained to predict what comes next.
    """
    found = load_configuration(config)
    if kind != "causal" or "AutoModelForCausalLM" in (getattr(found, "auto_map", None) or {}):
        return
    causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(found.model_type)
    encoder = found.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if causal is None or (encoder and causal not in (found.architectures or ())):
        raise ConfigError(
            f"model.name = {config.name!r} is no causal language model but of type "
            f'{found.model_type!r}: set task = "classification", or choose another model'
        )


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The base model's tokenizer, with a padding token (the end token where it has none)."""
    tokenizer = _from_pretrained(AutoTokenizer, config, "tokenizer")
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise ConfigError(f"model.name = {config.name!r}: its tokenizer has no padding token")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    config: ModelConfig, kind: str, labels: Sequence[str] = (), *, pad_id: int
) -> PreTrainedModel:
    """The pretrained model with a causal or a classification head, frozen, on its device.

    A new classification head is initialised from torch's global generator: seed it first.
    Raises `ConfigError` for a missing model, for one without safetensors weights, and where
    weights other than the new head are missing.
    """
    device = device_of(config.device)
    options: dict[str, Any] = {
        "use_safetensors": True,
        "dtype": config.dtype,
        "output_loading_info": True,
    }
    if kind == "classification":
        options |= {"num_labels": len(labels)}
        numbers = {name: number for number, name in enumerate(labels)}
        options |= {"id2label": dict(enumerate(labels)), "label2id": numbers}
        options |= {"ignore_mismatched_sizes": True}
    if config.quantization != "none":
        options |= {"quantization_config": _quantized(config, device), "device_map": str(device)}
    auto = AutoModelForSequenceClassification if kind == "classification" else AutoModelForCausalLM
    model, loading = _from_pretrained(auto, config, "model", **options)
    _check_whole(config, model, kind, loading)
    model.config.pad_token_id = pad_id
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.pad_token_id = pad_id
    model.requires_grad_(False)
    return model if config.quantization != "none" else model.to(device)


def _check_whole(config: ModelConfig, model: Any, kind: str, loading: dict[str, Any]) -> None:
    """Raise `ConfigError` naming a weight that transformers drew at random outside a new head."""
    drawn = {*loading["missing_keys"], *(entry[0] for entry in loading["mismatched_keys"])}
    if kind == "classification":
        # Encoders come with and without a pooler; it stands between the encoder and the head.
        inside = f"{model.base_model_prefix}."
        drawn = {name for name in drawn if name.startswith(inside) and ".pooler." not in name}
    if drawn:
        raise ConfigError(
            f"model.name = {config.name!r}: its weights lack {min(drawn)!r} in the shape that its "
            f"configuration says ({len(drawn)} such tensors): this is not the whole model"
        )


def fingerprint(config: ModelConfig) -> str:
    """A hash of the base model's files: configuration, tensor names and shapes, sampled weights.

    Equal for equal files wherever they lie, and independent of how they are loaded (type,
    quantisation, device). Reads at most 64 blocks of 4 KiB of each weights file.
    """
    digest = hashlib.sha256()
    load_configuration(config)  # says in one sentence what is wrong
    config_file = _file(config, "config.json")
    # The file and not the object: another release of transformers adds other defaults to that.
    values = json.loads(config_file.read_text(encoding="utf-8")) if config_file is not None else {}
    for key in ("_name_or_path", "transformers_version", "torch_dtype", "dtype"):
        values.pop(key, None)
    digest.update(json.dumps(values, sort_keys=True, default=str).encode())
    for path in _weight_files(config):
        size = path.stat().st_size
        digest.update(f"{size}".encode())
        with path.open("rb") as file:
            for index in range(_BLOCKS):
                file.seek(max(0, size - _BLOCK) * index // (_BLOCKS - 1))
                digest.update(file.read(_BLOCK))
    return digest.hexdigest()[:16]


def _weight_files(config: ModelConfig) -> list[Path]:
    """The safetensors files, in order: one, or the shards that an index names."""
    index = _file(config, "model.safetensors.index.json")
    names = ["model.safetensors"]
    if index is not None:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    files = [_file(config, name) for name in names]
    if None in files:
        raise ConfigError(
            f"model.name = {config.name!r} has no safetensors weights ({', '.join(names)}); "
            "pickled weights are never loaded: convert them with save_pretrained"
        )
    return [path for path in files if path is not None]


def _file(config: ModelConfig, name: str) -> Path | None:
    found = cached_file(
        os.path.expanduser(location(config.name)),
        name,
        revision=config.revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )
    return Path(found) if found is not None else None


def _from_pretrained(auto: Any, config: ModelConfig, what: str, **options: Any) -> Any:
    """``auto.from_pretrained`` with each of its errors as one sentence."""
    name = location(config.name)
    looks_local = os.path.isabs(name) or name.startswith((".", "~")) or name.count("/") > 1
    if looks_local and not Path(name).expanduser().is_dir():
        raise ConfigError(f"model.name = {config.name!r}: there is no such folder")
    local = looks_local or Path(name).is_dir()
    without_hub = not local and hub.offline()
    try:
        return auto.from_pretrained(
            str(Path(name).expanduser()) if looks_local else name,
            revision=config.revision or "main",
            trust_remote_code=config.trust_remote_code,
            **options,
        )
    except (OSError, ValueError, ImportError, KeyError, RuntimeError, SafetensorError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error)
        if without_hub:
            first_line = "the hub is not reachable, and its cache does not have it"
        raise ConfigError(
            f"model.name = {config.name!r}: its {what} cannot be loaded "
            f"(give 'embedded', a local folder or a hub name): {first_line}"
        ) from error


def _quantized(config: ModelConfig, device: torch.device) -> Any:
    """The settings of bitsandbytes. Raises `ConfigError` without the library."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"model.quantization = {config.quantization!r} needs bitsandbytes: "
            "pip install 'prelort[quantised]'"
        )
    from transformers import BitsAndBytesConfig

    if config.quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    compute = torch.bfloat16 if device.type == "cuda" else torch.float32
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute
    )
