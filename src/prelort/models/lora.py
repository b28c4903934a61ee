"""A PEFT model whose one adapter can be exchanged for an adapter of any rank.

PEFT gives the layers, this module gives the exchange: `install` puts an adapter's tensors into the
layers as new parameters and sets the scale of its rank, `extract` reads them back. Both are
strict: what is missing, surplus or mis-shaped is an error. Where PEFT has one layer for a stack of
experts, the adapter has a layer for each (`prelort.adapters.experts`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from prelort.adapters import AdapterSchema, Factors, LoraAdapter, ScaleRule, Trained, experts
from prelort.adapters.initial import fresh
from prelort.config import LoraSettings
from prelort.errors import AdapterError, ConfigError
from prelort.models.targets import all_linear, check_targets, last_parts, stacked_targets

ADAPTER = "default"
"""The name of the adapter inside the PEFT model."""

FROZEN = "frozen"
"""The name of the second path, of what is folded into the base for a round."""


def attach(
    model: PreTrainedModel,
    settings: LoraSettings,
    rank: int,
    kind: str,
    new_modules: Sequence[str] = (),
) -> PeftModel:
    """Wrap the base in PEFT with LoRA layers of ``rank`` (smaller where a pattern says so).

    ``new_modules`` are trained in full, besides those of the settings (`base.new_modules`). Raises
    `ConfigError` if a target module, a module to save or a key of the rank pattern matches
    nothing (it lists what exists), or matches what cannot be adapted.
    """
    rule = ScaleRule(settings.scale_rule, settings.scale)
    targets = settings.target_modules
    names = [targets] if isinstance(targets, str) else list(targets)
    saved = list(dict.fromkeys([*(settings.modules_to_save or ()), *new_modules]))
    for name in settings.modules_to_save or ():
        if not any(own.endswith(name) for own, _ in model.named_modules()):
            raise ConfigError(f"lora.modules_to_save: {name!r} matches no module of this model")
    parameters = stacked_targets(model, settings.target_parameters)
    if parameters and settings.dropout > 0:
        raise ConfigError(
            f"lora.dropout = {settings.dropout:g} does not work with lora.target_parameters: PEFT "
            "adds the adapter to the experts' weights, so there is no input of its own to drop"
        )
    if names == ["all-linear"]:
        names = all_linear(model, saved, kind, parameters)
    else:
        check_targets(model, names)
    config = LoraConfig(
        task_type=TaskType.SEQ_CLS if kind == "classification" else TaskType.CAUSAL_LM,
        r=rank,
        lora_alpha=rule.lora_alpha(rank),
        use_rslora=rule.kind == "rslora",
        lora_dropout=settings.dropout,
        target_modules=names,
        target_parameters=parameters or None,
        modules_to_save=saved or None,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        rank_pattern={key: min(largest, rank) for key, largest in settings.rank_pattern.items()},
    )
    try:
        wrapped: PeftModel = get_peft_model(model, config, adapter_name=ADAPTER)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ConfigError(
            f"lora.target_modules or lora.modules_to_save do not suit this model: {error}"
        ) from error
    by_peft = sorted({*(config.target_parameters or ())} - {*parameters})
    if by_peft:
        raise ConfigError(
            f"lora.target_modules = {names!r}: PEFT adapts stacked experts for them "
            f"({', '.join(by_peft)}): name these in lora.target_parameters, and other layers here"
        )
    config.target_parameters = parameters or None  # PEFT may have made it a set, without order
    for wrapper in wrapped.modules():
        if isinstance(wrapper, ModulesToSaveWrapper):
            _train_in_float32(wrapper)
    for key in settings.rank_pattern:
        if not any(re.match(rf"(.*\.)?({key})$", name) for name in lora_layers(wrapped)):
            raise ConfigError(
                f"lora.rank_pattern: {key!r} matches no adapted layer: they are "
                f"{', '.join(last_parts(lora_layers(wrapped)))}"
            )
    return wrapped


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """PEFT's layers by the base model's own names; a stack of experts by its parameter's."""
    return {_layer_name(n, m): m for n, m in model.named_modules() if isinstance(m, LoraLayer)}


def factors_of(model: nn.Module) -> dict[str, Factors]:
    """The factors in the model by the adapter's layers, as views of the parameters."""
    found: dict[str, Factors] = {}
    for name, layer in lora_layers(model).items():
        names = _adapter_layers(name, layer)
        a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        found |= zip(names, experts.split(a, b, len(names)), strict=True)
    return found


def schema(model: nn.Module) -> AdapterSchema:
    """The shapes of the adapter that is in the model now."""
    return AdapterSchema.of(extract(model, ScaleRule()))


def initial_adapter(model: nn.Module, scale: ScaleRule, seed: int) -> LoraAdapter:
    """The federation's first global adapter: A uniform as in PEFT, B zero, the rest as it is.

    Every client's A is a prefix of one matrix, so that all start in the same coordinates. It has a
    generator of its own, so it does not depend on how the model was loaded.
    """
    return fresh(extract(model, scale), seed)


def shapes(model: nn.Module, scale: ScaleRule) -> LoraAdapter:
    """An adapter of the model's shapes that holds no numbers: they may be on the meta device."""
    layers = {n: Factors(f.A.detach(), f.B.detach()) for n, f in factors_of(model).items()}
    return LoraAdapter(layers, scale)


def install(
    model: nn.Module,
    adapter: LoraAdapter,
    *,
    frozen: LoraAdapter | None = None,
    trains: Trained = "AB",
    scale_multiplier: float = 1.0,
) -> None:
    """Make ``adapter`` (any rank) the model's adapter: new float32 parameters.

    The scale of every layer becomes ``scale_multiplier * s(rank of the layer)``. ``trains`` names
    the factors that learn. ``frozen`` is a second adapter beside it that never learns: what is
    folded into the base for now. The base's weights are not touched, so that it may be quantised,
    and taking the fold out again is exact. Optimisers of earlier parameters are void. Raises
    `AdapterError` if a layer or a module to save is missing, surplus or does not fit; the model is
    then left as it was.
    """
    layers, modules_to_save = lora_layers(model), saved_module_places(model)
    owners = {own: layer for n, layer in layers.items() for own in _adapter_layers(n, layer)}
    _check_names(owners.keys(), adapter.layers.keys(), "layer")
    _check_names(modules_to_save.keys(), adapter.modules_to_save.keys(), "tensor")
    for name, layer in owners.items():
        _check_fit(name, layer, adapter.layers[name])
        if frozen is not None and name in frozen.layers:
            _check_fit(name, layer, frozen.layers[name])
    if frozen is not None:
        _check_names(owners.keys(), owners.keys() | frozen.layers.keys(), "frozen layer")
    for name, (module, attribute) in modules_to_save.items():
        old, new = getattr(module, attribute), adapter.modules_to_save[name]
        if old.shape != new.shape:
            raise AdapterError(
                f"tensor {name!r} has shape {list(new.shape)}, expected {list(old.shape)}"
            )
    for name, layer in layers.items():
        names = _adapter_layers(name, layer)
        own = [adapter.layers[one] for one in names]
        _install_layer(layer, own, adapter.scale, trains, scale_multiplier)
        _fold(layer, names, frozen)
    for name, (module, attribute) in modules_to_save.items():
        device = getattr(module, attribute).device
        setattr(module, attribute, _parameter(adapter.modules_to_save[name], device))


def extract(model: nn.Module, scale: ScaleRule) -> LoraAdapter:
    """The adapter that is in the model, as float32 copies on the CPU."""
    layers = {n: Factors(_copy(f.A), _copy(f.B)) for n, f in factors_of(model).items()}
    modules_to_save = {
        name: _copy(getattr(module, attr)) for name, (module, attr) in _modules_to_save(model)
    }
    return LoraAdapter(layers, scale, modules_to_save)


def trainable(
    model: nn.Module,
) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
    """The parameters that learn: of A, of B, and of the modules trained in full."""
    layers = lora_layers(model).values()
    a, b = (
        [weight for one in factors if (weight := one[ADAPTER].weight).requires_grad]
        for factors in ([own.lora_A for own in layers], [own.lora_B for own in layers])
    )
    return a, b, [getattr(module, name) for _, (module, name) in _modules_to_save(model)]


def _layer_name(name: str, layer: LoraLayer) -> str:
    own = _own_name(name)
    if not isinstance(layer, ParamWrapper):
        return own
    while own.endswith(".base_layer"):  # inside the wrapper of another parameter of the module
        own = own.removesuffix(".base_layer")
    return f"{own}.{layer.parameter_name}"


def _adapter_layers(name: str, layer: LoraLayer) -> list[str]:
    """The names of the adapter's layers that are in PEFT's ``layer``."""
    if not isinstance(layer, ParamWrapper):
        return [name]
    return [f"{name}.{index}" for index in range(layer.num_experts)]


def _check_fit(name: str, layer: LoraLayer, factors: Factors) -> None:
    a, b = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
    if factors.A.shape[1] != a.in_features or factors.B.shape[0] != b.out_features:
        raise AdapterError(
            f"layer {name!r}: A is {list(factors.A.shape)} and B is {list(factors.B.shape)}, "
            f"expected [rank, {a.in_features}] and [{b.out_features}, rank]"
        )


def _install_layer(
    layer: LoraLayer,
    factors: Sequence[Factors],
    scale: ScaleRule,
    trains: Trained,
    scale_multiplier: float,
) -> None:
    a, b = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
    rank = max(own.rank for own in factors)
    device = a.weight.device
    new_a, new_b = experts.join(factors, scale)
    a.weight = _parameter(new_a, device).requires_grad_("A" in trains)
    b.weight = _parameter(new_b, device).requires_grad_("B" in trains)
    a.out_features = b.in_features = len(new_a)
    layer.r[ADAPTER] = rank
    layer.lora_alpha[ADAPTER] = scale.lora_alpha(rank) * scale_multiplier
    layer.scaling[ADAPTER] = scale(rank) * scale_multiplier


def _fold(layer: LoraLayer, names: Sequence[str], frozen: LoraAdapter | None) -> None:
    """Put a frozen second path beside the layer's adapter, or take it out.

    PEFT adds up the paths of all active adapters. Where two narrow products would cost more than
    one full one, the path is one full matrix; only clients ever build it.
    """
    for part in (layer.lora_A, layer.lora_B, layer.lora_dropout):
        if FROZEN in part:
            del part[FROZEN]
    layer.scaling.pop(FROZEN, None)
    layer._active_adapter = [ADAPTER]
    if frozen is None:
        return
    own_a, own_b = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
    d_in, d_out = own_a.in_features, own_b.out_features
    nothing = Factors(torch.zeros(0, d_in), torch.zeros(d_out, 0))
    factors = [frozen.layers.get(name, nothing) for name in names]
    rank = max(own.rank for own in factors)
    if rank == 0:
        return
    weight = own_a.weight
    a, b = (t.to(weight.device, weight.dtype) for t in experts.join(factors, frozen.scale))
    if len(names) == 1 and rank * (d_in + d_out) > d_in * d_out:
        layer.lora_A[FROZEN], layer.lora_B[FROZEN] = _frozen_linear(b @ a), nn.Identity()
    else:
        layer.lora_A[FROZEN], layer.lora_B[FROZEN] = _frozen_linear(a), _frozen_linear(b)
    layer.lora_dropout[FROZEN] = nn.Identity()
    layer.scaling[FROZEN] = frozen.scale(rank)
    layer._active_adapter = [ADAPTER, FROZEN]


def _frozen_linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.detach().contiguous(), requires_grad=False)
    return linear


def _train_in_float32(wrapper: ModulesToSaveWrapper) -> None:
    """Let the trained copy of a module compute in float32 inside a base of another type.

    Its output has the type that the base's own module would give.
    """
    kinds = {p.dtype for p in wrapper.original_module.parameters()}
    if not all(kind.is_floating_point for kind in kinds):
        raise ConfigError(
            "lora.modules_to_save names a quantised layer, which cannot be trained in full: use "
            "model.quantization = 'none', or leave it out"
        )
    if kinds == {torch.float32}:
        return
    outer = kinds.pop()

    def enter(module: nn.Module, inputs: Any, named: Any) -> Any:
        return tree_map(lambda x: _cast(x, torch.float32), (inputs, named))

    def leave(module: nn.Module, inputs: Any, output: Any) -> Any:
        return tree_map(lambda x: _cast(x, outer), output)

    copy = wrapper.modules_to_save[ADAPTER]
    copy.register_forward_pre_hook(enter, with_kwargs=True)
    copy.register_forward_hook(leave)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def saved_module_places(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Where the tensors are that are trained in full: own name -> (module, attribute)."""
    return dict(_modules_to_save(model))


def _modules_to_save(model: nn.Module) -> Iterator[tuple[str, tuple[nn.Module, str]]]:
    for wrapper_name, wrapper in model.named_modules():
        if not isinstance(wrapper, ModulesToSaveWrapper):
            continue
        copy = wrapper.modules_to_save[ADAPTER]
        for name, _ in copy.named_parameters():
            path, _, attribute = name.rpartition(".")
            yield f"{_own_name(wrapper_name)}.{name}", (copy.get_submodule(path), attribute)


def _own_name(name: str) -> str:
    """The base model's name of a module inside the PEFT model."""
    return name.removeprefix("base_model.model.")


def _parameter(tensor: Tensor, device: torch.device) -> nn.Parameter:
    return nn.Parameter(tensor.detach().to(device, torch.float32, copy=True).contiguous())


def _copy(parameter: Tensor) -> Tensor:
    return parameter.detach().to("cpu", torch.float32, copy=True)


def _check_names(expected: object, given: object, what: str) -> None:
    missing = sorted(set(expected) - set(given))  # type: ignore[call-overload]
    surplus = sorted(set(given) - set(expected))  # type: ignore[call-overload]
    if missing:
        raise AdapterError(f"{what} {missing[0]!r} of the base model is missing in the adapter")
    if surplus:
        raise AdapterError(f"{what} {surplus[0]!r} of the adapter is not in the base model")
