"""The forward pass of a stack of experts: W + s B A for each expert, then the base's own pass."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor

from prelort.models.lora import ADAPTER


def forward(
    layer: ParamWrapper, mask: Tensor | None, x: Tensor, *arguments: Any, **named: Any
) -> Tensor:
    """What PEFT computes, with its adapter's rank dimensions times ``mask`` [r].

    PEFT replaces the parameter by a parametrization, whose cache is one for all threads of the
    process: clients that train side by side would get each other's weights.
    """
    base = layer.get_base_layer()
    own = base._parameters[layer.parameter_name]
    weight: Tensor = own
    with torch.autocast(x.device.type, enabled=False):  # as in PEFT, the sum has the base's type
        for adapter in layer.active_adapters:
            # [experts, ., r] and [experts, r, .]
            left, right, scale = layer.get_delta_factors(adapter)
            if adapter == ADAPTER and mask is not None:
                right = right * mask[:, None].to(right.dtype)
            weight = torch.baddbmm(weight, left, right, alpha=scale)
    base._parameters[layer.parameter_name] = weight
    try:
        output: Tensor = layer.base_layer(x, *arguments, **named)
    finally:
        base._parameters[layer.parameter_name] = own
    return output
