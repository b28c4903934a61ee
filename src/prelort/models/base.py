"""The base model: loaded from a local folder, a hub name or the package; never unpickled."""

from __future__ import annotations

import copy
import hashlib
import importlib.resources
import importlib.util
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from tokenizers.processors import Sequence as InOrder
from tokenizers.processors import TemplateProcessing
from torch import nn
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
from transformers.utils import cached_file, is_flash_attn_2_available

from prelort import hub
from prelort.config import EMBEDDED, ModelConfig
from prelort.errors import ConfigError

BALANCED = "balanced"
"""The ``model.device`` of a base whose layers are on several GPUs: a device map of accelerate."""

_BLOCK = 4096
_BLOCKS = 64

_OF_LOADING = {
    *("_name_or_path", "architectures", "attn_implementation", "dtype", "id2label", "label2id"),
    *("output_attentions", "output_hidden_states", "pad_token_id", "problem_type"),
    *("quantization_config", "return_dict", "torch_dtype", "transformers_version", "use_cache"),
}
"""Keys of a model's configuration that depend on how it was loaded."""


def location(name: str) -> str:
    """The path or hub name behind ``model.name``."""
    if name != EMBEDDED:
        return name
    return str(importlib.resources.files("prelort") / "embedded" / "base")


def device_of(name: str) -> torch.device:
    """The device that ``model.device`` names, the first one of several.

    Raises `ConfigError` for CUDA where there is none.
    """
    if name in ("auto", BALANCED):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(
            f"model.device = {name!r} is unknown: use auto, cpu, cuda or balanced"
        ) from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"model.device = {name!r}, but no CUDA device is available: use 'cpu'")
    return device


def linear_algebra_device(name: str) -> torch.device:
    """Where a server computes with this ``model.device``: as `device_of`, but the CPU if it has no
    CUDA device, since the key may be about the sites' machines.
    """
    return device_of(name) if torch.cuda.is_available() else torch.device("cpu")


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
    """The base model's tokenizer, completed where it does not suit the model.

    Where there is no padding token, or the embedding has no row for it, padding is the token that
    the model's configuration names, else the end token. An encoder-decoder classifies by the end
    token's state, so each text gets one: the tokenizer's, or that of the model's configuration.
    """
    own = (
        config
        if config.tokenizer is None
        else config.model_copy(update={"name": config.tokenizer, "revision": None})
    )
    tokenizer = _from_pretrained(AutoTokenizer, own, "tokenizer")
    if config.chat_template is not None:
        tokenizer.chat_template = config.chat_template
    model = load_configuration(config)
    text = model.get_text_config()
    rows = getattr(text, "vocab_size", None) or len(tokenizer)
    candidates = tokenizer.pad_token_id, getattr(text, "pad_token_id", None), tokenizer.eos_token_id
    pad = next((i for i in candidates if i is not None and 0 <= i < rows), None)
    if pad is None:
        raise ConfigError(
            f"model.name = {config.name!r}: its tokenizer has no padding token and no end token "
            f"among the {rows} tokens of the model: set one and save the tokenizer"
        )
    if pad != tokenizer.pad_token_id:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
    if model.is_encoder_decoder and not tokenizer.eos_token and isinstance(text.eos_token_id, int):
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(text.eos_token_id)
    end = tokenizer.eos_token_id
    if model.is_encoder_decoder and end is not None and end not in tokenizer("a")["input_ids"]:
        own = tokenizer.backend_tokenizer.post_processor
        template = {"single": f"$A {tokenizer.eos_token}", "pair": f"$A $B {tokenizer.eos_token}"}
        ending = TemplateProcessing(**template, special_tokens=[(tokenizer.eos_token, end)])
        tokenizer.backend_tokenizer.post_processor = (
            ending if own is None else InOrder([own, ending])
        )
    return tokenizer


def load_model(
    config: ModelConfig,
    kind: str,
    labels: Sequence[str] = (),
    *,
    pad_id: int,
    to_split: bool = False,
) -> PreTrainedModel:
    """The pretrained model with a causal or a classification head, frozen, on its device.

    A new classification head is initialised from torch's global generator: seed it first.
    ``to_split``: FSDP will split it over the GPUs.
    Raises `ConfigError` for a missing model, for one without safetensors weights, and where
    weights are missing that `new_modules` does not name.
    """
    device = device_of(config.device)
    options: dict[str, Any] = {}
    if config.quantization != "none":
        new = new_modules(config, kind, labels)
        options = {"quantization_config": _quantized(config, device, new, to_split)}
    if options or config.device == BALANCED or _is_quantised(config):
        options |= {"device_map": BALANCED if config.device == BALANCED else str(device)}
    model, loading = _load(config, kind, labels, **options)
    _check_places(config, device, getattr(model, "hf_device_map", {}))
    _new_modules(config, model, loading, kind)
    _freeze(model, pad_id)
    return model if options else model.to(device)


def _check_places(config: ModelConfig, device: torch.device, places: Mapping[str, object]) -> None:
    """Raise `ConfigError` for a base of which the GPUs hold only a part."""
    outside = [name for name, place in places.items() if place in ("cpu", "disk")]
    if outside and device.type != "cpu":
        raise ConfigError(
            f"model.device = {config.device!r}: the GPUs have no room for {outside[0]!r} "
            f"({len(outside)} such modules): use model.quantization, or a smaller model"
        )


def shared_copy(
    model: PreTrainedModel, name: str, kind: str, labels: Sequence[str], *, pad_id: int
) -> PreTrainedModel:
    """A frozen copy of a loaded model that shares its weights; the model itself does not change.

    ``name``: where it can be loaded from, for exported adapters.

    Raises `ConfigError` for a model with another head than the task needs.
    """
    classifies = type(model).__name__.endswith("ForSequenceClassification")
    has_head = classifies or model.get_output_embeddings() is not None
    if not has_head or classifies != (kind == "classification"):
        needed = "SequenceClassification" if kind == "classification" else "CausalLM"
        raise ConfigError(
            f"model is a {type(model).__name__}, and the task needs a model for {needed}: load it "
            f"by AutoModelFor{needed}, or choose another task"
        )
    if classifies and model.config.num_labels != len(labels):
        raise ConfigError(
            f"model has {model.config.num_labels} classes, and the data have {len(labels)}: load "
            f"it with num_labels={len(labels)}"
        )
    weights = [*model.parameters(), *model.buffers()]
    shared = {
        id(w): nn.Parameter(w.detach(), requires_grad=False) if type(w) is nn.Parameter else w
        for w in weights  # those that are quantised have a type of their own, and never learn
    }
    copied = copy.deepcopy(model, shared)
    copied.name_or_path = copied.config._name_or_path = location(name)
    _freeze(copied, pad_id)
    return copied


def is_stored(model: PreTrainedModel, config: ModelConfig) -> bool:
    """Whether a loaded model is the one in the files that ``config.name`` names.

    Compares its configuration and a sample of each weight that has a name there.
    """
    try:
        known, files = load_configuration(config).to_dict(), _weight_files(config)
    except ConfigError:
        return False
    own = model.config.to_dict()
    if any(own.get(key) != known.get(key) for key in known.keys() - _OF_LOADING):
        return False
    state, compared = model.state_dict(), 0
    for file in files:
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118
                mine = state.get(name)
                if mine is None or not mine.is_floating_point():  # renamed, or quantised
                    continue
                part = weights.get_slice(name)
                if list(mine.shape) != part.get_shape():
                    return False
                sample = part[:1] if mine.ndim else part[...]
                expected = sample.to(mine.dtype)
                if not torch.equal(expected, mine[:1].detach().cpu() if mine.ndim else mine.cpu()):
                    return False
                compared += 1
    return compared > 0


def _freeze(model: PreTrainedModel, pad_id: int) -> None:
    """Set the padding, and let no weight learn."""
    model.config.pad_token_id = pad_id
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.pad_token_id = pad_id
    for module in model.modules():
        # bitsandbytes packs a layer's 4-bit weights in the first evaluation on such a CPU, and they
        # stay packed: a product without a gradient, so that training would be wrong.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    model.requires_grad_(False)


def new_modules(config: ModelConfig, kind: str, labels: Sequence[str]) -> tuple[str, ...]:
    """The modules of a classifier that are trained in full: its head, and what is drawn at random.

    What the checkpoint lacks is transformers' own report, made without reading the weights. Raises
    `ConfigError` where something is missing that is not a linear layer outside the repeated ones:
    then this is not the whole model.
    """
    if kind != "classification":
        return ()
    # bitsandbytes unpacks a checkpoint that is quantised already, which needs its numbers.
    where = str(device_of(config.device)) if _is_quantised(config) else "meta"
    model, loading = _load(config, kind, labels, device_map=where)
    return _new_modules(config, model, loading, kind)


def _new_modules(
    config: ModelConfig, model: PreTrainedModel, loading: dict[str, Any], kind: str
) -> tuple[str, ...]:
    head = head_modules(model) if kind == "classification" else ()
    shapes = {entry[0] for entry in loading["mismatched_keys"]}
    drawn = {*loading["missing_keys"], *shapes}
    drawn = {name for name in drawn if not name.startswith(tuple(f"{own}." for own in head))}
    repeated = tuple(f"{n}." for n, m in model.named_modules() if isinstance(m, nn.ModuleList))
    owners = {name: name.rpartition(".")[0] for name in drawn}
    lacking = {
        name
        for name, owner in owners.items()
        if kind != "classification"
        or name in shapes
        or owner.startswith(repeated)
        or not isinstance(model.get_submodule(owner), nn.Linear)
    }
    if lacking:
        raise ConfigError(
            f"model.name = {config.name!r}: its weights lack {min(lacking)!r} in the shape that "
            f"its configuration says ({len(lacking)} such tensors): this is not the whole model"
        )
    return (*head, *sorted({*owners.values()}))


def _is_quantised(config: ModelConfig) -> bool:
    """Whether the checkpoint itself is quantised."""
    return hasattr(load_configuration(config), "quantization_config")


def can_quantise(config: ModelConfig) -> bool:
    """Whether this machine can load the base in 4 or 8 bits: not one that is quantised already."""
    return importlib.util.find_spec("bitsandbytes") is not None and not _is_quantised(config)


def token_table(model: PreTrainedModel) -> Any:
    """The embedding of tokens; None in a model of characters, which hashes them."""
    try:
        return model.get_input_embeddings()
    except NotImplementedError:
        return None


def head_modules(model: PreTrainedModel) -> tuple[str, ...]:
    """The names of a classifier's modules that stand beside its encoder or decoder."""
    inside = model.base_model
    return tuple(
        name
        for name, module in model.named_children()
        if module is not inside and inside is not model and any(True for _ in module.parameters())
    )


def _load(config: ModelConfig, kind: str, labels: Sequence[str], **options: Any) -> Any:
    """The model and transformers' report of how its tensors and the checkpoint's match."""
    options |= {"use_safetensors": True, "dtype": config.dtype, "output_loading_info": True}
    if kind == "classification":
        options |= {"num_labels": len(labels)}
        numbers = {name: number for number, name in enumerate(labels)}
        options |= {"id2label": dict(enumerate(labels)), "label2id": numbers}
        options |= {"ignore_mismatched_sizes": True}
    if config.attention != "auto":
        _check_attention(config)
        options |= {"attn_implementation": config.attention}
    auto = AutoModelForSequenceClassification if kind == "classification" else AutoModelForCausalLM
    return _from_pretrained(auto, config, "model", **options)


def _check_attention(config: ModelConfig) -> None:
    if config.attention == "flash_attention_2" and not is_flash_attn_2_available():
        raise ConfigError(
            "model.attention = 'flash_attention_2' needs the package flash-attn and a CUDA device: "
            "install it, or use 'sdpa'"
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


def _quantized(
    config: ModelConfig, device: torch.device, whole: Sequence[str], to_split: bool
) -> Any:
    """The settings of bitsandbytes; ``whole``: modules that keep their type because they learn.

    Raises `ConfigError` without the library.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"model.quantization = {config.quantization!r} needs bitsandbytes: "
            "pip install 'prelort[quantised]'"
        )
    from transformers import BitsAndBytesConfig

    skipped = list(whole) or None  # None: what transformers itself leaves out, the output layer
    if config.quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    on_gpu = device.type == "cuda" or (to_split and torch.cuda.is_available())
    compute = torch.bfloat16 if on_gpu else torch.float32
    storage: torch.dtype | str = torch.uint8
    if to_split:  # FSDP splits floating numbers of one type only; they hold four bits all the same
        own = load_configuration(config).dtype if config.dtype == "auto" else config.dtype
        storage = own or torch.float32
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=compute,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_quant_storage=storage,
        llm_int8_skip_modules=skipped,
    )
