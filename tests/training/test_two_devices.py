"""A base whose layers are on two devices: fake tensors refuse an operation on both."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from bench import settings_of
from peft import PeftModel
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from prelort import tasks
from prelort.adapters import ScaleRule
from prelort.config import LoraSettings, ModelConfig
from prelort.methods.objective import TailPenalty, nested
from prelort.models.lora import extract, install
from prelort.planning.live import LiveBytes
from prelort.planning.skeleton import skeleton
from prelort.tasks.interface import Example
from prelort.training.adapter_stack import stackable
from prelort.training.local import train
from prelort.training.runtime import ModelRuntime
from prelort.training.steps import Assignment
from prelort.training.truncation import Truncation

FIRST, SECOND = "cpu", "meta"  # no more is needed of a device


def place(module: nn.Module, device: str) -> None:
    """Move a part of a model without weights as accelerate does."""
    for part in module.modules():
        for name, weight in part.named_parameters(recurse=False):
            new = torch.empty(weight.shape, device=device)
            setattr(part, name, nn.Parameter(new, requires_grad=weight.requires_grad))
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, torch.empty(buffer.shape, device=device))
    add_hook_to_module(module, AlignDevicesHook(device))


@pytest.mark.parametrize("fused", [True, False])
def test_training_uses_each_layer_where_it_is(tiny_llama, monkeypatch, fused):
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)  # of no meta device
    model: PeftModel = skeleton(ModelConfig(name=str(tiny_llama)), LoraSettings(), 8, "causal", 0)
    base = model.get_base_model()
    base.config.use_cache = False  # whose first tensors are not fake
    scale = ScaleRule("constant", 1.0)
    with FakeTensorMode(), LiveBytes([]):
        for part in (base.model.embed_tokens, base.model.rotary_emb, base.model.layers[0]):
            place(part, FIRST)
        for part in (base.model.layers[1], base.model.norm, base.lm_head):
            place(part, SECOND)
        add_hook_to_module(base, AlignDevicesHook(FIRST, io_same_device=True))
        runtime = ModelRuntime(model, Truncation(model, scale), tasks.get("causal-lm"), pad_id=0)
        install(model, extract(model, scale))
        objective = replace(nested("example", 8, (2, 4, 8)), tail=TailPenalty(0.1, 0.5, 1))
        work = Assignment("k", 0, 1, 0, objective)
        settings = settings_of(
            optimizer="adamw", shuffle=False, max_grad_norm=1.0, gradient_accumulation=2
        )
        examples = [Example([1, 2, 3], [1, 2, 3])] * 6
        assert train(runtime, examples, settings, work, fused=fused).steps == 3
        assert runtime.by_example()
        assert not stackable(runtime)
