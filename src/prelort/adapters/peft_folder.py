"""Adapters as standard PEFT folders: ``adapter_model.safetensors`` and ``adapter_config.json``.

Tensors survive bit for bit, in their own type. The scale rule is written both as PEFT's
``lora_alpha``/``use_rslora`` and, exactly, in the safetensors header.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from prelort.adapters.adapter import LoraAdapter
from prelort.adapters.scale import ScaleRule
from prelort.errors import AdapterError

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
PREFIX = "base_model.model."
"""What PEFT puts before the base model's own names."""

_UNSUPPORTED = {"use_dora": "DoRA", "lora_bias": "LoRA biases", "target_parameters": "parameters"}


def save(adapter: LoraAdapter, folder: Path, template: LoraConfig) -> None:
    """Write ``adapter`` as a PEFT folder.

    ``template`` holds what the tensors do not tell (base model, task, target modules); its rank,
    alpha and patterns are replaced by the adapter's. An existing folder's files are replaced.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        PREFIX + name: t.detach().cpu().contiguous() for name, t in adapter.tensors().items()
    }
    rule = {"scale_rule": adapter.scale.kind, "scale": adapter.scale.value}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt", "prelort": json.dumps(rule)})
    config_for(adapter, template).save_pretrained(str(folder))


def config_for(adapter: LoraAdapter, template: LoraConfig) -> LoraConfig:
    """The PEFT configuration under which plain PEFT computes the same function."""
    ranks = {name: factors.rank for name, factors in adapter.layers.items()}
    most = adapter.rank
    different = {name: rank for name, rank in ranks.items() if rank != most}
    rule = adapter.scale
    return dataclasses.replace(
        template,
        r=most,
        lora_alpha=_whole(rule.lora_alpha(most)),
        use_rslora=rule.kind == "rslora",
        # PEFT reads the keys as regular expressions matched at the end of a module's name.
        rank_pattern={re.escape(name): rank for name, rank in different.items()},
        alpha_pattern={
            re.escape(name): _whole(rule.lora_alpha(rank)) for name, rank in different.items()
        },
        inference_mode=True,
    )


def load(folder: Path) -> tuple[LoraAdapter, LoraConfig]:
    """Read a PEFT folder strictly.

    Raises `AdapterError` naming the file or tensor for anything missing, surplus, mis-shaped,
    unsupported (DoRA, LoRA on embeddings, biases) or at a scale that is not one rule.
    """
    config = _load_config(folder)
    tensors, recorded = _load_tensors(folder / WEIGHTS)
    bare: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if not name.startswith(PREFIX):
            raise AdapterError(
                f"{folder / WEIGHTS}: tensor {name!r} does not start with {PREFIX!r}"
            )
        bare[name.removeprefix(PREFIX)] = tensor
    try:
        adapter = LoraAdapter.from_tensors(bare, ScaleRule())
        _check_extras(adapter, config)
        rule = _scale_rule(adapter, config, recorded)
    except AdapterError as error:
        raise AdapterError(f"{folder}: {error}") from None
    return dataclasses.replace(adapter, scale=rule), config


def _load_config(folder: Path) -> LoraConfig:
    path = folder / CONFIG
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AdapterError(f"{str(path)!r} does not exist: not a PEFT adapter folder") from None
    except (OSError, ValueError) as error:
        raise AdapterError(f"{str(path)!r} cannot be read: {error}") from None
    if values.get("peft_type") != "LORA":
        raise AdapterError(f"{str(path)!r}: peft_type {values.get('peft_type')!r} is not 'LORA'")
    for key, what in _UNSUPPORTED.items():
        if values.get(key):
            raise AdapterError(f"{str(path)!r}: {key} = {values[key]!r}: {what} are not supported")
    if values.get("bias", "none") != "none":
        raise AdapterError(f"{str(path)!r}: bias = {values['bias']!r} is not supported: use 'none'")
    return LoraConfig.from_pretrained(str(folder))


def _load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise AdapterError(f"{str(path)!r} does not exist") from None
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{str(path)!r} is not a whole safetensors file: {error}") from None
    recorded = metadata.get("prelort")
    return tensors, json.loads(recorded) if recorded else None


def _check_extras(adapter: LoraAdapter, config: LoraConfig) -> None:
    """Every tensor that is no factor must belong to a module that PEFT trains in full."""
    modules = tuple(config.modules_to_save or ())
    for name in adapter.extras:
        if not any(part in modules for part in name.split(".")):
            raise AdapterError(
                f"tensor {name!r} is surplus: modules_to_save is {list(modules)} in {CONFIG}"
            )


def _scale_rule(
    adapter: LoraAdapter, config: LoraConfig, recorded: Mapping[str, Any] | None
) -> ScaleRule:
    """The one rule that gives every layer the scale in its PEFT configuration."""
    rules = set()
    for name, factors in adapter.layers.items():
        rank = _by_pattern(config.rank_pattern, name, config.r)
        if rank != factors.rank:
            raise AdapterError(
                f"tensor {name + '.lora_A.weight'!r} has rank {factors.rank}, "
                f"but {CONFIG} says {rank}"
            )
        alpha = _by_pattern(config.alpha_pattern, name, config.lora_alpha)
        rules.add(
            ScaleRule("rslora", float(alpha))
            if config.use_rslora
            else ScaleRule("constant", float(alpha) / rank)
        )
    values = [rule.value for rule in rules]
    if not rules or max(values) - min(values) > 1e-9 * max(values):
        raise AdapterError(f"the layers' scales differ ({sorted(values)}): one rule is needed")
    found = rules.pop()
    if recorded is None:
        return found
    exact = ScaleRule(recorded["scale_rule"], float(recorded["scale"]))
    if exact.kind != found.kind or not math.isclose(exact.value, found.value, rel_tol=1e-9):
        raise AdapterError(f"{WEIGHTS} says scale {exact}, but {CONFIG} says {found}")
    return exact


def _by_pattern(pattern: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """PEFT's rule: the first key that matches the end of the module's name."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default


def _whole(value: float) -> float:
    """An int where the value is one, as PEFT writes it."""
    return int(value) if float(value).is_integer() else value
