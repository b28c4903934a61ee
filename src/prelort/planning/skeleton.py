"""The base model without weights: all shapes and no memory, from its configuration alone."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert

from prelort.config import LoraSettings, ModelConfig
from prelort.errors import ConfigError
from prelort.models.base import BALANCED, head_modules, load_configuration
from prelort.models.lora import ADAPTER, attach

BLOCK = 64
"""Weights that share one scale in 4 bits (bitsandbytes' block for NF4)."""


def skeleton(
    config: ModelConfig, lora: LoraSettings, rank: int, kind: str, labels: int
) -> PeftModel:
    """The frozen base with LoRA layers of ``rank``, on torch's meta device.

    `Quantised` layers replace linear ones if the base is quantised. Raises `ConfigError` like
    `models.base.load_model` and `models.lora.attach`.
    """
    configuration = load_configuration(config)
    configuration.pad_token_id = 0
    auto: Any = AutoModelForCausalLM
    if kind == "classification":
        auto, configuration.num_labels = AutoModelForSequenceClassification, labels
    name = getattr(configuration, "dtype", None) if config.dtype == "auto" else config.dtype
    dtype = getattr(torch, str(name or "float32").removeprefix("torch."))
    # Of flash attention there are no allocations without its kernels; those of sdpa are like them.
    attention = {"auto": None, "flash_attention_2": "sdpa"}.get(config.attention, config.attention)
    try:
        with torch.device("meta"):
            model = auto.from_config(
                configuration,
                dtype=dtype,
                attn_implementation=attention,
                trust_remote_code=config.trust_remote_code,
            )
            model.requires_grad_(False)
            whole = get_keys_to_not_convert(model)
            new = head_modules(model) if kind == "classification" else ()
            wrapped = attach(model, lora, rank, kind, new)
    except (ValueError, ImportError, KeyError) as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"model.name = {config.name!r}: no {kind} model can be built from its configuration: "
            f"{first_line}"
        ) from error
    if config.quantization != "none":
        compute = torch.bfloat16 if for_gpu(config) else torch.float32  # as in models.base
        _quantise_linear_layers(wrapped, config.quantization, compute, whole)
    return wrapped


def for_gpu(config: ModelConfig) -> bool:
    """Whether the model is meant for a GPU, which may be in another machine."""
    return config.device.startswith("cuda") or (
        config.device in ("auto", BALANCED) and torch.cuda.is_available()
    )


def materialise(model: nn.Module) -> None:
    """Give a meta model tensors of the current mode on the CPU: fake ones in a `FakeTensorMode`.

    By hand and not by `to_empty`: tied weights stay one tensor.
    """
    copies: dict[int, Tensor] = {}

    def copy_of(tensor: Tensor) -> Tensor:
        if id(tensor) not in copies:
            new = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            learns = tensor.requires_grad
            is_parameter = isinstance(tensor, nn.Parameter)
            copies[id(tensor)] = nn.Parameter(new, requires_grad=learns) if is_parameter else new
        return copies[id(tensor)]

    old = [*model.parameters(), *model.buffers()]  # kept alive, so that no id is used twice
    for module in model.modules():
        tensors: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for named in tensors:
            named |= {name: copy_of(t) for name, t in named.items() if t is not None}
    del old


class Quantised(nn.Module):
    """A linear layer with the allocations of bitsandbytes.

    ``4bit``: half a byte per weight, a byte per block for its scale and a float32 for each 256 of
    these (double quantisation); ``8bit``: a byte per weight and a float32 scale per output. The
    forward and the backward pass each allocate the matrix temporarily: in the type ``compute`` for
    4 bits, in the input's for 8. In 8 bits the input is kept as long as the graph.
    """

    def __init__(
        self, d_in: int, d_out: int, bias: Tensor | None, quantization: str, compute: torch.dtype
    ) -> None:
        super().__init__()
        self.compute = compute
        self.in_features, self.out_features = d_in, d_out
        self.keeps_input = quantization == "8bit"
        count = d_in * d_out
        blocks = -(-count // BLOCK)
        sizes = (
            (count, 4 * d_out) if self.keeps_input else (count // 2, blocks + 4 * -(-blocks // 256))
        )
        for name, size in zip(("packed", "scales"), sizes, strict=True):
            self.register_buffer(name, torch.empty(size, dtype=torch.uint8, device="meta"))
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """[..., d_in] -> [..., d_out]."""
        shape = (self.out_features, self.in_features)
        used = x if self.keeps_input else x.to(self.compute)
        out: Tensor = _Dequantising.apply(used, shape, self.keeps_input)  # type: ignore[no-untyped-call]
        out = out if self.bias is None else out + self.bias.to(out.dtype)
        return out if self.keeps_input else out.to(x.dtype)


class _Dequantising(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: tuple[int, int], keeps_input: bool) -> Tensor:
        ctx.shape, ctx.dtype = shape, x.dtype
        # As an attribute, as bitsandbytes does: it lives as long as the whole graph.
        ctx.x = x if keeps_input else None
        return nn.functional.linear(x, torch.empty(shape, dtype=x.dtype, device=x.device))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        weight = torch.empty(ctx.shape, dtype=ctx.dtype, device=gradients[0].device)
        return gradients[0].to(ctx.dtype) @ weight, None, None


class OnFakeTensors(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """What fake tensors lack: a mixture's products in other types than bfloat16, and `nonzero`.

    All elements are nonzero: every token has a label.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator, or allocate what it returns."""
        kwargs = kwargs or {}
        if func is torch.ops.aten.nonzero.default:
            return args[0].new_empty((args[0].numel(), args[0].ndim), dtype=torch.int64)
        if func is not torch.ops.aten._grouped_mm.default:
            return func(*args, **kwargs)
        # [rows, k] and [groups, k, n]; for a weight's gradient [k, rows] and [rows, n].
        left, right = args[:2]
        ends = kwargs["offs"] if "offs" in kwargs else args[2]
        groups = [len(ends)] if right.ndim == 2 else []
        return left.new_empty(*groups, left.shape[-2], right.shape[-1])


def _quantise_linear_layers(
    model: nn.Module, quantization: str, compute: torch.dtype, whole: list[str]
) -> None:
    """Replace the linear layers that transformers would quantise: not ``whole``, not the head."""
    for name, parent in list(model.named_modules()):
        learns = {"original_module", "modules_to_save"} & {*name.split(".")}
        if learns or isinstance(parent, ModulesToSaveWrapper):
            continue
        for child, layer in list(parent.named_children()):
            own = f"{name}.{child}".removeprefix("base_model.model.").removesuffix(".base_layer")
            if own in whole or child == ADAPTER or not isinstance(layer, nn.Linear | Conv1D):
                continue
            d_in, d_out = layer.weight.shape[1], layer.weight.shape[0]
            if isinstance(layer, Conv1D):
                d_in, d_out = d_out, d_in
            setattr(parent, child, Quantised(d_in, d_out, layer.bias, quantization, compute))
