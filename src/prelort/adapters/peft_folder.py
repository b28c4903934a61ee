"""Adapters as standard PEFT folders: ``adapter_model.safetensors`` and ``adapter_config.json``.

Tensors survive bit for bit, in their own type. The scale rule is written both as PEFT's
``lora_alpha``/``use_rslora`` and, exactly, in the safetensors header.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from prelort.adapters import experts
from prelort.adapters.adapter import Factors, LoraAdapter
from prelort.adapters.scale import ScaleRule
from prelort.errors import AdapterError

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
PREFIX = "base_model.model."
"""PEFT's prefix of the base model's own names."""

_UNSUPPORTED = {
    "use_qalora": "QALoRA layers",
    "use_bdlora": "block-diagonal factors",
    "lora_bias": "LoRA biases",
    "alora_invocation_tokens": "activated LoRA layers",
    "arrow_config": "routed adapters",
    "kasa_config": "KaSA layers",
    "monteclora_config": "MonteCLoRA layers",
    "layer_replication": "repeated layers",
}
"""Options under which PEFT computes something else than ``s B A`` on the base model."""

_ALWAYS = (
    *("base_model_name_or_path", "bias", "fan_in_fan_out", "inference_mode", "lora_alpha"),
    *("lora_dropout", "modules_to_save", "peft_type", "r", "target_modules", "task_type"),
)
"""The keys that every release of PEFT and the tools that read its folders know."""

_CHANGES_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")
"""Initialisations that change the base model's own weights."""


def save(adapter: LoraAdapter, folder: Path, template: LoraConfig) -> None:
    """Write ``adapter`` as a PEFT folder.

    ``template`` gives what the tensors do not (base model, task, target modules); its rank, alpha
    and patterns are replaced by the adapter's. Existing files are overwritten. The configuration
    has only what differs from PEFT's defaults: older releases refuse keys that they do not know.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parameters = template.target_parameters or ()
    stacks = experts.of_parameters(adapter.layers, parameters)
    layers = {
        experts.peft_layer(name, parameters): Factors(*experts.join(own, adapter.scale))
        for name, own in stacks.items()
    }
    whole = dataclasses.replace(adapter, layers=layers)
    tensors = {PREFIX + name: t.detach().cpu().contiguous() for name, t in whole.tensors().items()}
    rule = {"scale_rule": adapter.scale.kind, "scale": adapter.scale.value}
    # save_file reports a full disk by an error of its own instead of an OSError.
    data = to_bytes(tensors, metadata={"format": "pt", "prelort": json.dumps(rule)})
    (folder / WEIGHTS).write_bytes(_sort_metadata(data))
    text = json.dumps(_minimal(config_for(adapter, template)), indent=2, sort_keys=True)
    (folder / CONFIG).write_text(text, encoding="utf-8")


def config_for(adapter: LoraAdapter, template: LoraConfig) -> LoraConfig:
    """The PEFT configuration under which plain PEFT computes the same function."""
    stacks = experts.of_parameters(adapter.layers, template.target_parameters or ())
    ranks = {name: max(factors.rank for factors in own) for name, own in stacks.items()}
    different = {name: rank for name, rank in ranks.items() if rank != adapter.rank}
    rule = adapter.scale
    return dataclasses.replace(
        template,
        r=adapter.rank,
        lora_alpha=_integer(rule.lora_alpha(adapter.rank)),
        use_rslora=rule.kind == "rslora",
        rank_pattern={_pattern(name, ranks): rank for name, rank in different.items()},
        alpha_pattern={
            _pattern(name, ranks): _integer(rule.lora_alpha(rank))
            for name, rank in different.items()
        },
        inference_mode=True,
    )


def load(folder: Path) -> tuple[LoraAdapter, LoraConfig]:
    """Read a PEFT folder strictly.

    Raises `AdapterError` naming the file or tensor for anything missing, surplus, mis-shaped or
    unsupported (DoRA, LoRA on embeddings, biases), and for scales that do not follow one rule.
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
        adapter = _with_experts(LoraAdapter.from_tensors(bare, ScaleRule()), config, recorded)
        _check_modules(adapter, config)
        rule = _scale_rule(adapter, config, recorded)
    except AdapterError as error:
        raise AdapterError(f"{folder}: {error}") from None
    return dataclasses.replace(adapter, scale=rule), config


def without_prefixes(values: Mapping[str, Any]) -> str:
    """Why the prefixes of adapters with this PEFT configuration are none; empty if they are."""
    if values.get("use_dora"):
        return (
            "use_dora = True is not supported: DoRA scales W0 + s B A to a learnt norm, in which "
            "all rank dimensions take part: cutting some off scales the base anew, and the product "
            "B A, which methods average and fold, is not what it adds"
        )
    initial = values.get("init_lora_weights")
    if isinstance(initial, str) and initial.lower().startswith(_CHANGES_BASE):
        return (
            f"init_lora_weights = {initial!r} is not supported: it takes the initial B A out of "
            "the base's weights, and a prefix, such as a client of a lower rank has, puts only a "
            "part of it back"
        )
    return ""


def _load_config(folder: Path) -> LoraConfig:
    path = folder / CONFIG
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AdapterError(f"{str(path)!r} does not exist: not a PEFT adapter folder") from None
    except (OSError, ValueError) as error:
        raise AdapterError(f"{str(path)!r} cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise AdapterError(f"{str(path)!r} holds no JSON object: not a PEFT adapter folder")
    if values.get("peft_type") != "LORA":
        raise AdapterError(f"{str(path)!r}: peft_type {values.get('peft_type')!r} is not 'LORA'")
    for key, what in _UNSUPPORTED.items():
        if values.get(key):
            raise AdapterError(f"{str(path)!r}: {key} = {values[key]!r}: {what} are not supported")
    if values.get("bias", "none") != "none":
        raise AdapterError(f"{str(path)!r}: bias = {values['bias']!r} is not supported: use 'none'")
    reason = without_prefixes(values)
    if reason:
        raise AdapterError(f"{str(path)!r}: {reason}")
    _check_numbers(path, values)
    return LoraConfig.from_pretrained(str(folder))


def _check_numbers(path: Path, values: Mapping[str, Any]) -> None:
    """Ranks and alphas must be numbers above 0, in the patterns too."""
    numbers = {key: values[key] for key in ("r", "lora_alpha") if key in values}
    for key in ("rank_pattern", "alpha_pattern"):
        pattern = values.get(key) or {}
        if not isinstance(pattern, dict):
            raise AdapterError(f"{str(path)!r}: {key} = {pattern!r} is not a JSON object")
        numbers |= {f"{key}[{name!r}]": number for name, number in pattern.items()}
    for key, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, int | float) or not number > 0:
            raise AdapterError(f"{str(path)!r}: {key} = {number!r} is not a number above 0")


def _load_tensors(path: Path) -> tuple[dict[str, Tensor], ScaleRule | None]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise AdapterError(f"{str(path)!r} does not exist") from None
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{str(path)!r} is not a whole safetensors file: {error}") from None
    return tensors, _header_rule(path, metadata.get("prelort"))


def _header_rule(path: Path, text: str | None) -> ScaleRule | None:
    """The exact scale rule in the header; None in a folder of another tool."""
    if text is None:
        return None
    try:
        values = json.loads(text)
        return ScaleRule(values["scale_rule"], float(values["scale"]))
    except (ValueError, TypeError, KeyError, AdapterError) as error:
        raise AdapterError(f"{str(path)!r}: its header is damaged: {text!r} ({error})") from None


def _with_experts(
    adapter: LoraAdapter, config: LoraConfig, recorded: ScaleRule | None
) -> LoraAdapter:
    """The adapter with each expert of PEFT's stacks as a layer.

    Only a folder with our header has the parameters in the model's order, by which PEFT names them.
    """
    parameters = config.target_parameters or ()
    if parameters and recorded is None:
        raise AdapterError(
            f"target_parameters = {sorted(parameters)!r} is not supported in a folder of another "
            "tool, which does not say which tensors belong to which parameter"
        )
    of_layer = {experts.peft_layer(name, parameters): name for name in parameters}
    for name in sorted(of_layer.keys() - adapter.layers.keys()):
        raise AdapterError(f"tensor {name + '.lora_A.weight'!r} is missing")
    layers: dict[str, Factors] = {}
    for name, factors in adapter.layers.items():
        if name not in of_layer:
            layers[name] = factors
            continue
        rank = _by_pattern(config.rank_pattern, of_layer[name], config.r)
        count, rest = divmod(factors.rank, rank)
        if rest or count == 0:
            raise AdapterError(
                f"tensor {name + '.lora_A.weight'!r} has {factors.rank} rows, which are not those "
                f"of experts of rank {rank}"
            )
        for index, own in enumerate(experts.split(factors.A, factors.B, count)):
            layers[f"{of_layer[name]}.{index}"] = own
    return dataclasses.replace(adapter, layers=layers)


def _check_modules(adapter: LoraAdapter, config: LoraConfig) -> None:
    """Every tensor that is no factor must belong to a module that PEFT trains in full.

    PEFT takes the modules whose name ends with a word of ``modules_to_save``.
    """
    modules = tuple(config.modules_to_save or ())
    for name in adapter.modules_to_save:
        parts = name.split(".")
        owners = [".".join(parts[:count]) for count in range(1, len(parts))]
        if not any(owner.endswith(modules) for owner in owners):
            raise AdapterError(
                f"tensor {name!r} is surplus: modules_to_save is {list(modules)} in {CONFIG}"
            )


def _scale_rule(adapter: LoraAdapter, config: LoraConfig, recorded: ScaleRule | None) -> ScaleRule:
    """The one rule that gives every layer the scale in its PEFT configuration."""
    if not adapter.layers:
        raise AdapterError(f"{WEIGHTS} holds no LoRA layer")
    rules: list[ScaleRule] = []
    for layer, factors in adapter.layers.items():
        name = experts.parameter_of(layer, config.target_parameters or ())
        rank = _by_pattern(config.rank_pattern, name, config.r)
        if rank != factors.rank:
            raise AdapterError(
                f"tensor {name + '.lora_A.weight'!r} has rank {factors.rank}, "
                f"but {CONFIG} says {rank}"
            )
        alpha = _by_pattern(config.alpha_pattern, name, config.lora_alpha)
        rules.append(
            ScaleRule("rslora", float(alpha))
            if config.use_rslora
            else ScaleRule("constant", float(alpha) / rank)
        )
    values = [rule.value for rule in rules]
    if max(values) - min(values) > 1e-9 * max(values):
        raise AdapterError(f"the layers' scales differ ({sorted(set(values))}): one rule is needed")
    rule = rules[0]
    if recorded is None:
        return rule
    if recorded.kind != rule.kind or not math.isclose(recorded.value, rule.value, rel_tol=1e-9):
        raise AdapterError(f"{WEIGHTS} says scale {recorded}, but {CONFIG} says {rule}")
    return recorded


def _sort_metadata(data: bytes) -> bytes:
    """Safetensors bytes with the metadata in order, so that equal adapters are equal files."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def _minimal(config: LoraConfig) -> dict[str, Any]:
    """The values of a PEFT configuration that are not its defaults; sets in order."""
    values, default = config.to_dict(), LoraConfig().to_dict()
    kept = {k: v for k, v in values.items() if k in _ALWAYS or v != default.get(k)}
    kept.pop("peft_version", None)
    return {k: sorted(v) if isinstance(v, set) else v for k, v in kept.items()}


def _pattern(name: str, names: Iterable[str]) -> str:
    """A pattern for one layer: PEFT matches its keys, as regular expressions, at a name's end.

    That is the name itself, which older releases compare as it is, unless others match it too.
    """
    alone = all(other == name or not _matches(name, other) for other in names)
    return name if alone else f"^{re.escape(name)}"


def _by_pattern(pattern: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """PEFT's rule: the first key that matches the end of the module's name."""
    for key, value in (pattern or {}).items():
        if _matches(key, name):
            return value
    return default


def _matches(key: str, name: str) -> bool:
    return re.match(rf"(.*\.)?({key})$", name) is not None


def _integer(value: float) -> float:
    """An int where the value is one, as PEFT writes it."""
    return int(value) if float(value).is_integer() else value
