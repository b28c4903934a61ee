"""Which layers of a base model are adapted.

PEFT's own ``all-linear`` turns stacked experts into adapted parameters and takes every linear layer
that it finds, also those of parts that text never reaches. (`peft.tuners.tuners_utils` and
`peft.utils.transformers_weight_conversion` are private in part: only this module imports them.)
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import _check_lora_target_modules_mamba
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from prelort.errors import ConfigError

WORTH_SAYING = 0.01
"""The share of the weights from which on it is said that they stay frozen."""


def all_linear(
    model: PreTrainedModel, saved: Sequence[str], kind: str, parameters: Sequence[str] = ()
) -> list[str]:
    """The linear layers that text goes through and plain PEFT can adapt, by their full names.

    Left out are the output layer, ``saved`` modules and what is in them, the towers of other
    inputs than text, and layers whose names PEFT takes for a mixture's experts or refuses (Mamba's
    fused projections). ``parameters``: the stacks of experts that are adapted besides.
    """
    heads = SEQ_CLS_HEAD_NAMES if kind == "classification" else []  # PEFT trains them in full
    ends = (*saved, *heads)
    output = model.get_output_embeddings()
    left_out = [n for n, m in model.named_modules() if m is output or (ends and n.endswith(ends))]
    left_out += _other_towers(model)
    inside = tuple(f"{name}." for name in left_out)
    names = [
        name
        for name, module in model.named_modules()
        if is_linear(module) and name not in left_out and not name.startswith(inside)
    ]
    usable = {part: _usable(model, part) for part in last_parts(names)}
    chosen = [name for name in names if usable[name.split(".")[-1]]]
    stacks = {n: p for n, p in stacked(model).items() if n not in parameters}
    frozen = {n: model.get_submodule(n).weight for n in {*names} - {*chosen}} | stacks
    share = sum(w.numel() for w in frozen.values()) / sum(p.numel() for p in model.parameters())
    if share > WORTH_SAYING:
        remedy = "; lora.target_parameters adapts stacked experts" if stacks else ""
        warnings.warn(
            f"lora.target_modules = 'all-linear' leaves {share:.0%} of the weights frozen, which "
            f"are no linear layers to PEFT: {', '.join(last_parts(frozen))}{remedy}",
            stacklevel=2,
        )
    return chosen


def check_targets(model: nn.Module, names: list[str]) -> None:
    """Every name must match at the end of some module's name, and linear layers only."""
    for name in names:
        matches = [m for n, m in model.named_modules() if f".{n}".endswith(f".{name}")]
        strange = [m for m in matches if not is_linear(m)]
        if not matches or strange:
            what = f"a {type(strange[0]).__name__}, no linear layer" if strange else "no layer"
            if any(f".{own}".endswith(f".{name}") for own in stacked(model)):
                what = "stacked experts, which are for lora.target_parameters"
            linear = {n for n, m in model.named_modules() if is_linear(m)}
            raise ConfigError(
                f"lora.target_modules = {names!r}: {name!r} matches {what}: this model has "
                f"{', '.join(last_parts(linear))}"
            )


def stacked_targets(model: nn.Module, names: Sequence[str]) -> list[str]:
    """The full names of the stacks of experts that ``names`` match at their ends.

    In the model's order, by which PEFT nests its wrappers. Raises `ConfigError`.
    """
    stacks = {n: p for n, p in stacked(model).items() if p.ndim == 3 and len(p) > 1}
    for name in names:
        if not any(f".{own}".endswith(f".{name}") for own in stacks):
            ends = sorted({".".join(own.split(".")[-2:]) for own in stacks})
            raise ConfigError(
                f"lora.target_parameters = {list(names)!r}: {name!r} matches no stack of experts "
                f"[experts, ., .]: this model has {', '.join(ends) or 'none'}"
            )
    return [own for own in stacks if any(f".{own}".endswith(f".{name}") for name in names)]


@torch.no_grad()
def is_linear(module: nn.Module) -> bool:
    """Whether a layer maps vectors to vectors: some routers are derived from one and do not."""
    if not isinstance(module, nn.Linear):
        return isinstance(module, Conv1D)
    if type(module).forward is nn.Linear.forward or type(module.weight) is not nn.Parameter:
        return True  # a quantised one has a type of its own
    output = module(module.weight.new_zeros(1, module.in_features))
    return isinstance(output, torch.Tensor) and output.shape == (1, module.out_features)


def last_parts(names: Iterable[str]) -> list[str]:
    """The last parts of the names of layers, once each."""
    return sorted({name.split(".")[-1] for name in names})


def stacked(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of several matrices in one tensor, such as a mixture's experts, by name."""
    convolutions = nn.Conv1d | nn.Conv2d | nn.Conv3d
    return {
        f"{owner}.{name}": parameter
        for owner, module in model.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim > 2 and not isinstance(module, convolutions)
    }


def _other_towers(model: PreTrainedModel) -> list[str]:
    """In a model of several kinds of input, all that stands beside the language model."""
    if model.config.get_text_config() is model.config:
        return []
    text = model.get_decoder()
    name = next((n for n, m in model.named_modules() if m is text), "")
    parts = name.split(".") if name else []
    return [
        ".".join([*parts[:depth], child])
        for depth in range(len(parts))
        for child, _ in model.get_submodule(".".join(parts[:depth])).named_children()
        if child != parts[depth]
    ]


def _usable(model: PreTrainedModel, part: str) -> bool:
    """Whether PEFT adapts a layer whose name ends with ``part`` as such."""
    config = LoraConfig(target_modules=[part])
    try:
        _check_lora_target_modules_mamba(config, model, part)
        convert_peft_config_for_transformers(config, model, None)
    except ValueError:
        return False
    return part in (config.target_modules or ())
